"""All triplets of a memory that several ranks hold between them. There are no few sums to add up: an anchor's positives
are on all of the ranks, and each rank's negatives meet them all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .losses import Triplet
from .options import LossOptions
from .plain.chunks import exact
from .plain.loss_of_memory import BankSimilarities, Ranked
from .plain.triplets import AllTriplets
from .shards import Shards


class _OfShards(AllTriplets):
    def __init__(self, loss: Triplet, z: Tensor, anchors: Tensor | None, shards: Shards) -> None:
        super().__init__(loss, z, anchors)
        self.averages = False
        self.shards, self.settles = shards, shards.place == 0

    def most(self, positives: Tensor) -> int:
        return int(self.shards.gather(torch.cat([positives, positives.new_zeros(1)]).max()).max())

    def of_all(self, thresholds: Tensor) -> Tensor:
        return self.shards.gather(thresholds).transpose(0, 1).flatten(1).contiguous()

    def total(self, negatives: Tensor) -> Tensor:
        return self.shards.total(negatives)


@exact
def triplet_sums(
    z: Tensor, labels: Tensor, memory: Any, loss: Triplet, shards: Shards, need_grad: bool, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """The block's share of totals `[7]`, as `ops.settle_sums` has them, and of the gradient `[A, D]`, not yet averaged,
    of the anchors `z [A, D]` of a line. In plain PyTorch, on all devices. The hosts wait for the number of rounds."""
    similarities = BankSimilarities(z, labels, memory.bank, memory.bank_labels, Ranked(**options))
    pairs = _OfShards(loss, similarities.grad, similarities.anchors, shards)
    pairs.run(similarities, need_grad)
    ranking = pairs.number_of_anchors() * pairs.settles
    return torch.cat([pairs.value, pairs.number, ranking[None], pairs.counts]), similarities.gradient()
