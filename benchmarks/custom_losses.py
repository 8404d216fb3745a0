"""Native losses as a user would write them, bring them along, or give them other pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xbn_ext import Contrastive, CustomLoss, InChunks, MultiSimilarity, SelectPairs
from xbn_ext.losses import PairLoss

from .comparisons import COMPARISONS


class CustomContrastive(CustomLoss):
    """`Contrastive` with "mean"."""

    def __init__(self, native: Contrastive) -> None:
        super().__init__()
        self.pos_margin, self.neg_margin = native.pos_margin, native.neg_margin

    def positive(self, s: Tensor) -> Tensor:
        return (self.pos_margin - s).relu()

    def negative(self, s: Tensor) -> Tensor:
        return (s - self.neg_margin).relu()


class CustomMultiSimilarity(CustomLoss):
    """`MultiSimilarity` without mining."""

    reduction = "logsumexp"

    def __init__(self, native: MultiSimilarity) -> None:
        super().__init__()
        self.alpha, self.beta, self.base = native.alpha, native.beta, native.base

    def positive(self, s: Tensor) -> Tensor:
        return -self.alpha * (s - self.base)

    def negative(self, s: Tensor) -> Tensor:
        return self.beta * (s - self.base)

    def anchor(self, positives: Tensor, negatives: Tensor) -> Tensor:
        return F.softplus(positives) / self.alpha + F.softplus(negatives) / self.beta


def custom(loss: PairLoss) -> CustomLoss | None:
    """The same loss, if it is one of these."""
    match loss:
        case Contrastive(reduction="mean"):
            return CustomContrastive(loss)
        case MultiSimilarity(mining=None):
            return CustomMultiSimilarity(loss)
    return None


def in_chunks(loss: str) -> InChunks | None:
    """That of pytorch-metric-learning, with its miner, if it has the same value and not a multiple of it."""
    comparison = COMPARISONS[loss]
    return None if comparison.sums else InChunks(*comparison.their_parts())


def related(loss: PairLoss) -> SelectPairs:
    """The same loss, by a relation that gives the same pairs."""
    return SelectPairs(loss, torch.eq)
