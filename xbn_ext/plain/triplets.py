"""The loss of all triplets, a chunk of the bank at a time: `reference.losses.triplet_all` in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..losses import Triplet
from ..reference.losses import nearness, nearness_slope
from .pairs import Chunk, Pairs, Similarities

HELD = 1 << 20  # thresholds of all anchors together
LEAST_HELD = 256  # of one anchor


class AllTriplets(Pairs[Triplet]):
    """Without the triplets themselves: see `reference.losses.triplet_all`.

    The similarities of an anchor's positives are its thresholds. They are held in a fixed amount of memory: if that is
    too little for them, all is done in rounds, each for the next positives of every anchor. How many rounds there are
    depends on the labels, so the host waits for that one number.

    The bank may be a part of a longer one, if a subclass has the thresholds and the numbers of negatives of all parts.
    """

    settles = True  # False: another part adds what there is once of an anchor

    def __init__(self, loss: Triplet, z: Tensor, anchors: Tensor | None) -> None:
        super().__init__(loss, z, anchors)
        self.negatives = self.zeros()

    def run(self, similarities: Similarities, need_grad: bool) -> None:
        most = self.most(similarities.positives())
        held = min(most, max(HELD // max(self.B, 1), LEAST_HELD))
        for first in range(0, most, max(held, 1)):
            self.go_round(similarities, need_grad, first, held)
        self.counts[1] = self.negatives.sum()
        if need_grad:
            similarities.scale(self.shares()[0].to(self.dtype))

    def most(self, positives: Tensor) -> int:
        """The largest of `positives [B]`, the numbers of each anchor, in all parts."""
        return int(positives.max()) if self.B > 0 else 0

    def of_all(self, thresholds: Tensor) -> Tensor:
        """`[B, n]` those of all parts in a round, from `[B, held]` those of this one."""
        return thresholds

    def total(self, negatives: Tensor) -> Tensor:
        """`[B, n]` how many negatives of all parts are above each threshold, from those of this one."""
        return negatives

    def go_round(self, similarities: Similarities, need_grad: bool, first: int, held: int) -> None:
        """For positives [first, first + held) of every anchor."""
        thresholds = self.of_all(self.collect(similarities, first, held))
        not_a_number = thresholds.isnan()
        sorted_thresholds = torch.where(not_a_number, -torch.inf, thresholds).sort(1).values  # NaN is below every x
        above = torch.zeros_like(thresholds, dtype=torch.float64)  # how many negatives are above each
        negatives = self.zeros()
        for chunk in similarities.chunks():
            x = nearness(self.loss, chunk.s) + self.loss.margin
            raised = torch.where(x.isnan(), torch.inf, x)  # a NaN x is above every threshold
            below = torch.searchsorted(sorted_thresholds, raised).masked_fill_(~chunk.negative, 0)
            self.value[0] += torch.where(below > 0, below * x.double(), 0).sum()
            self.number[0] += below.sum()
            negatives += (below > 0).sum(1)
            raised = raised.masked_fill_(~chunk.negative, -torch.inf).sort(1).values
            above += x.shape[1] - torch.searchsorted(raised, sorted_thresholds, right=True)
            if need_grad:
                similarities.add(chunk, below.to(self.dtype) * nearness_slope(self.loss, chunk.s))
        above = self.total(above)
        if self.settles:
            lost = torch.where(not_a_number.any(1) & (above[:, 0] > 0), torch.nan, 0)
            self.value[0] += (lost - torch.where(above > 0, above * sorted_thresholds.double(), 0).sum(1)).sum()
            self.counts[0] += (above > 0).sum()
        self.negatives = torch.maximum(self.negatives, negatives)  # the round of the lowest threshold has all of them
        if need_grad:
            for chunk, _, inside in self.positives_of(similarities, first, held):
                near = nearness(self.loss, chunk.s)
                near = torch.where(near.isnan(), -torch.inf, near)
                place = torch.searchsorted(sorted_thresholds, near).clamp_(max=thresholds.shape[1] - 1)
                weight = torch.where(inside, -above.gather(1, place), 0).to(self.dtype)
                similarities.add(chunk, weight * nearness_slope(self.loss, chunk.s))

    def positives_of(self, similarities: Similarities, first: int, held: int) -> Iterator[tuple[Chunk, Tensor, Tensor]]:
        """Each chunk, the place `[B, n]` of its pairs among the round's positives, and whether they are of these."""
        seen = torch.full_like(self.zeros(), -1 - first, dtype=torch.int64)[:, None]
        for chunk in similarities.chunks():
            place = chunk.positive.cumsum(1) + seen
            seen = place[:, -1:]
            yield chunk, place, chunk.positive & (place >= 0) & (place < held)

    def collect(self, similarities: Similarities, first: int, held: int) -> Tensor:
        """`[B, held]` how near the round's positives are in the order of the bank, then inf."""
        thresholds = self.value.new_full((self.B, held + 1), torch.inf, dtype=self.dtype)
        for chunk, place, inside in self.positives_of(similarities, first, held):
            near = nearness(self.loss, chunk.s)
            thresholds.scatter_(1, torch.where(inside, place, held), near)  # the last column takes all others
        return thresholds[:, :held]
