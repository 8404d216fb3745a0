"""Losses with margins, a chunk of the bank at a time, with dLoss/ds in closed form. `triplets.py` has that of all
triplets."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses import Contrastive, Margin, Triplet
from ..reference.losses import is_not_zero, nearness, nearness_slope, softplus
from .pairs import Chunk, Hardest, Pairs, Similarities
from .triplets import AllTriplets


class ContrastivePairs(Pairs[Contrastive | Margin]):
    """With "mean" what sums are divided by is known before; else a look counts the pairs that pay."""

    def __init__(self, loss: Contrastive | Margin, z: Tensor, anchors: Tensor | None) -> None:
        super().__init__(loss, z, anchors)
        self.per_anchor = not isinstance(loss, Margin) and loss.reduction == "mean"
        self.groups = [0, loss.groups - 1]  # of negatives, of positives
        if not self.per_anchor:
            self.looks = [self.look]

    def costs(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Of positives, and of negatives."""
        near, (pos_limit, neg_limit) = nearness(self.loss, chunk.s), self.loss.limits
        pull = torch.where(chunk.positive, pos_limit - near, 0).relu_()
        return pull, torch.where(chunk.negative, near - neg_limit, 0).relu_()

    def look(self, chunk: Chunk) -> None:
        pull, push = self.costs(chunk)
        for group, cost in zip(self.groups, (push, pull), strict=True):
            self.value[group] += cost.sum()
        self.count(is_not_zero(pull), is_not_zero(push))

    def finish(self) -> None:
        if self.per_anchor:
            self.number[0] = self.number_of_anchors()
        elif self.groups == [0, 0]:
            self.number[0] = self.counts.sum()
        else:
            self.number = self.counts.flip(0)

    def weigh(self, chunk: Chunk) -> Tensor:
        if self.per_anchor:
            self.look(chunk)
        positive, negative = map(is_not_zero, self.costs(chunk))
        shares, by_s = self.shares().to(self.dtype), nearness_slope(self.loss, chunk.s)
        push, pull = (shares[group] * by_s for group in self.groups)
        return torch.where(negative, push, 0) - torch.where(positive, pull, 0)


class HardestTriplets(Pairs[Triplet]):
    """Only a look: two rows of each anchor have a weight."""

    def __init__(self, loss: Triplet, z: Tensor, anchors: Tensor | None) -> None:
        super().__init__(loss, z, anchors)
        self.hardest = Hardest(z)
        self.has_positive = z.new_zeros(len(z), dtype=torch.bool)
        self.has_negative = self.has_positive.clone()

    def look(self, chunk: Chunk) -> None:
        self.has_positive |= chunk.positive.any(1)
        self.has_negative |= chunk.negative.any(1)
        self.hardest.look(chunk)

    def run(self, similarities: Similarities, need_grad: bool) -> None:
        for chunk in similarities.chunks():
            self.look(chunk)
        hardest, both = self.hardest, self.has_positive & self.has_negative
        near_positive, near_negative = (nearness(self.loss, s) for s in (hardest.positive, hardest.negative))
        violation = torch.where(both, near_negative - near_positive + self.loss.margin, -torch.inf)
        cost = softplus(violation.double()) if self.loss.soft else violation.relu()
        paying = both if self.loss.soft else ~(cost <= 0)
        self.value[0], self.number[0] = cost.double().sum(), paying.sum()
        self.count(paying, paying)
        if need_grad:
            of_rows = paying & (hardest.positive_row >= 0) & (hardest.negative_row >= 0)
            share = self.shares()[0].to(self.dtype).expand(self.B)
            if self.loss.soft:
                share = share * violation.sigmoid()
            for row, s, weight in (
                (hardest.negative_row, hardest.negative, share),
                (hardest.positive_row, hardest.positive, -share),
            ):
                # No row, and not a weight of 0: 0 times a row that is NaN would be NaN.
                similarities.add_columns(torch.where(of_rows, row, -1), weight * nearness_slope(self.loss, s))


BY_FORMULA = {
    "contrastive": ContrastivePairs,
    "contrastive_mean": ContrastivePairs,
    "margin": ContrastivePairs,
    "triplet_hardest": HardestTriplets,
    "triplet_soft": HardestTriplets,
    "triplet_all": AllTriplets,
}
