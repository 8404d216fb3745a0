"""Losses over pairs of pytorch-metric-learning, where a call for some of the anchors has few pairs.

A loss derived from its `GenericPairLoss` costs nothing where a call has at most one positive and one negative pair, and
some losses also where it has none of one kind. Of a call for some of the anchors that must not decide. So such a call
gets other pairs too, of copies of its anchors, and what these cost is dropped.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

COPIES = 5
"""Of the anchors: themselves, two for other positives, two for other negatives."""
REGULARIZERS = ("embedding_reg_loss", "weight_reg_loss")
"""Sub-losses that look at no pairs."""


class Pairs(NamedTuple):
    """Of some anchors, each a number of an anchor and one of a row, as pytorch-metric-learning has them."""

    anchors: Tensor
    positives: Tensor
    anchors_of_negatives: Tensor
    negatives: Tensor

    def with_others(self, anchors: int) -> Pairs:
        """Those, of so many anchors, and two positive and two negative ones of each copy."""
        numbers = torch.arange(COPIES * anchors, device=self.anchors.device)
        _, *others = numbers.split(anchors)
        positive, negative = torch.cat(others[:2]), torch.cat(others[2:])
        return Pairs(
            torch.cat((self.anchors, positive)),
            torch.cat((self.positives, torch.zeros_like(positive))),
            torch.cat((self.anchors_of_negatives, negative)),
            torch.cat((self.negatives, torch.zeros_like(negative))),
        )


def decide(loss: Any) -> bool:
    """Whether it costs nothing where a call has few pairs."""
    return _is(loss, "GenericPairLoss", "AngularLoss")


def pairs_of(picked: Any, labels: Tensor, of_rows: Tensor) -> Pairs:
    """What a miner has picked, or all pairs for None."""
    if picked is None:
        same = labels[:, None] == of_rows
        return Pairs(*torch.where(same), *torch.where(~same))
    if len(picked) == 3:
        anchors, positives, negatives = picked
        return Pairs(anchors, positives, anchors, negatives)
    return Pairs(*picked)


class Counts:
    """How many positive and negative pairs the calls have had."""

    def __init__(self) -> None:
        self.calls = self.positive = self.negative = 0

    def are_few(self, picked: Any, labels: Tensor, of_rows: Tensor) -> bool:
        """Whether a call with these has few pairs. It is counted."""
        if picked is None:
            positive = int((labels[:, None] == of_rows).sum())
            negative = len(labels) * len(of_rows) - positive
        else:
            positive, negative = len(picked[0]), len(picked[-1])
        self.calls += 1
        self.positive += positive
        self.negative += negative
        return min(positive, negative) == 0 or max(positive, negative) <= 1

    def cost_nothing(self, loss: Any) -> bool:
        """Whether all of them in one call would."""
        if self.calls == 0:
            return False
        if _is(loss, "SupConLoss", "AngularLoss") and 0 in (self.positive, self.negative):
            return True
        return _is(loss, "GenericPairLoss") and self.positive <= 1 and self.negative <= 1


def _is(loss: Any, *names: str) -> bool:
    return any(kind.__name__ in names for kind in type(loss).__mro__)
