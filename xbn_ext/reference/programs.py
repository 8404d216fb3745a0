"""The losses as programs, for `parts.py`: which slots each pass fills, and what an anchor pays by its sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..losses import (
    DCL,
    DCLW,
    NCA,
    Circle,
    Contrastive,
    LiftedStructure,
    Margin,
    MultiSimilarity,
    NTXent,
    PairLoss,
    SigLIP,
    SupCon,
    Triplet,
)
from .losses import nearness, nearness_slope, softplus

ONE_SLOT = ((0,),)

LARGEST_EXPONENT = 60.0
"""Of a DCLW weight; larger than that of any pair that is in the mean, whose weight is at most the number of these."""

Formula = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Of similarities, whether a pair is a positive, what the anchor is given: value (or x), weight, whether it counts."""


class Slot(NamedTuple):
    """Which pairs are added up, and how: as sums, as exponents, or only the largest."""

    pairs: str  # negatives, positives, all
    adds: str  # values, exponents, extreme
    formula: Formula


def program(loss: PairLoss) -> list[dict[int, Slot]]:
    """The passes of a loss, and the slots that each fills."""
    match loss:
        case Contrastive() | Margin() if loss.passes == ONE_SLOT:
            return [{0: Slot("all", "values", margin(loss))}]
        case Contrastive():
            return [{0: Slot("negatives", "values", margin(loss)), 1: Slot("positives", "values", margin(loss))}]
        case SigLIP():
            return [{k: Slot(pairs, "values", sigmoid(loss)) for k, pairs in enumerate(("negatives", "positives"))}]
        case SupCon():
            a = 1 / loss.temperature
            return [{0: Slot("all", "exponents", exponent(a)), 1: Slot("positives", "values", times(a))}]
        case NTXent():
            a = 1 / loss.temperature
            return [
                {0: Slot("negatives", "exponents", exponent(a))},
                {1: Slot("positives", "values", cross_entropy(a))},
            ]
        case DCL():
            a = 1 / loss.temperature
            return [{0: Slot("negatives", "exponents", exponent(a)), 1: Slot("positives", "values", times(a))}]
        case DCLW():
            push = Slot("negatives", "exponents", exponent(1 / loss.temperature))
            return [
                {0: push, 1: Slot("positives", "exponents", exponent(1 / loss.sigma))},
                {1: Slot("positives", "values", weighted(loss))},
            ]
        case NCA():
            of_both = exponent(loss.softmax_scale)
            return [{0: Slot("negatives", "exponents", of_both), 1: Slot("positives", "exponents", of_both)}]
        case LiftedStructure():
            return [{0: Slot("negatives", "exponents", exponent(1)), 1: Slot("positives", "exponents", exponent(-1))}]
        case MultiSimilarity():
            mined = loss.mining is not None
            push = Slot("negatives", "exponents", exponent(loss.beta, mined))
            pull = Slot("positives", "exponents", exponent(-loss.alpha, mined))
            return (
                [{1: Slot("positives", "extreme", times(-1))}, {0: push}, {1: pull}] if mined else [{0: push, 1: pull}]
            )
        case Circle():
            return [{k: Slot(pairs, "exponents", paced(loss)) for k, pairs in enumerate(("negatives", "positives"))}]
        case Triplet(mining="hardest"):
            return [{0: Slot("negatives", "extreme", times(1)), 1: Slot("positives", "extreme", times(-1))}]
    raise TypeError(f"{loss.kind} has no sums that could be added up")


def always(s: Tensor) -> Tensor:
    return torch.ones_like(s, dtype=torch.bool)


def margin(loss: Contrastive | Margin) -> Formula:
    scale = scale_of(loss)

    def formula(s: Tensor, positive: Tensor, given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        near, (pos_limit, neg_limit) = nearness(loss, s), loss.limits
        cost = torch.where(positive, pos_limit - near, near - neg_limit)
        weight = torch.where(positive, -1.0, 1.0).to(s.dtype) * nearness_slope(loss, s)
        return cost / scale, weight / scale, ~(cost <= 0)

    return formula


def scale_of(loss: Contrastive | Margin) -> float:
    """A loss of squared distances is twice one of similarities, and adds these up."""
    return 2.0 if isinstance(loss, Contrastive) and loss.distance == "squared_euclidean" else 1.0


def times(a: Any) -> Formula:
    return lambda s, positive, given: (a * s, torch.ones_like(s), always(s))


def cross_entropy(a: Any) -> Formula:
    """Of a positive with all negatives, whose log-sum-exp the anchor is given."""
    return lambda s, positive, given: (softplus(given - a * s), (given - a * s).sigmoid(), always(s))


def weighted(loss: DCLW) -> Formula:
    """Less of what is similar already; all anchors are given the log of the mean of e^(s / sigma)."""

    def formula(s: Tensor, positive: Tensor, given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight = 2 - (s / loss.sigma - given).clamp(max=LARGEST_EXPONENT).exp()
        return weight * s, weight, always(s)

    return formula


def sigmoid(loss: SigLIP) -> Formula:
    def formula(s: Tensor, positive: Tensor, given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = s / loss.temperature + loss.bias
        x = torch.where(positive, -x, x)
        return softplus(x), torch.where(positive, -x.sigmoid(), x.sigmoid()), always(s)

    return formula


def exponent(a: Any, mined: bool = False) -> Formula:
    """`x = a s`; if mined only negatives above, positives below what the anchor is given."""

    def formula(s: Tensor, positive: Tensor, given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        left_out = torch.where(positive, s >= given, s <= given)
        return a * s, torch.full_like(s, a), ~left_out if mined else always(s)

    return formula


def paced(loss: Circle) -> Formula:
    def formula(s: Tensor, positive: Tensor, given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pace = loss.gamma * torch.where(positive, 1 + loss.m - s, s + loss.m).relu()
        x = torch.where(positive, -pace * (s - (1 - loss.m)), pace * (s - loss.m))
        return x, torch.where(positive, -pace, pace), always(s)

    return formula


def log_sum(sums: Tensor) -> Tensor:
    return torch.where(sums[..., 2] == 0, -torch.inf, sums[..., 0].log() + sums[..., 3])


def given_in_common(loss: PairLoss, ranks: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Of a loss that `gives_in_common`: the log of the sum of e^(s / sigma) over the positives of anchors that have
    negatives, and of how many that is, from sums `[2, B, 4]` of the anchors that `ranks [B]`."""
    assert isinstance(loss, DCLW)
    first, second = sums
    x, number = log_sum(second), second[:, 2]
    common = ranks & (first[:, 2] > 0) & x.isfinite()
    return x.masked_fill(~common, -torch.inf).logsumexp(0), torch.where(common, number, 0).sum()


def mean_in_common(log_sum: Tensor, number: Tensor) -> Tensor:
    """What that comes to, and all anchors are given."""
    return torch.where(number > 0, log_sum - number.log(), 0)


def given_for(loss: PairLoss, number: int, sums: Tensor) -> Tensor:
    """`[B]` what pass `number` is given, from sums `[2, B, 4]`."""
    if isinstance(loss, NTXent):
        return log_sum(sums[0])
    assert isinstance(loss, MultiSimilarity) and loss.mining is not None
    if number == 1:
        return -sums[1, :, 3] - loss.mining  # negatives above the hardest positive, nearly
    return sums[0, :, 3] / loss.beta + loss.mining  # positives below the hardest negative


def finish(loss: PairLoss, sums: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of each anchor: value and count of the groups `[2, B]`, the factors of the slots' gradients `[2, B]`, and how
    many positives and negatives have a weight `[B]`, from sums `[2, B, 4]`."""
    first, second = sums
    value, count, factor = (torch.zeros_like(sums[..., 0]) for _ in range(3))
    negatives, positives = first[:, 2], second[:, 2]
    match loss:
        case Contrastive() if loss.groups == 2:
            value[:], factor[:], count[:] = scale_of(loss) * sums[..., 0], scale_of(loss), sums[..., 2]
        case Contrastive() | Margin() if loss.passes == ONE_SLOT:  # negatives have one weight, positives its negative
            value[0], factor[0] = scale_of(loss) * first[:, 0], scale_of(loss)
            negatives, positives = (first[:, 2] + first[:, 1]) / 2, (first[:, 2] - first[:, 1]) / 2
            count[0] = first[:, 2] if isinstance(loss, Margin) else 1
        case Contrastive():
            value[0], factor[:], count[0] = first[:, 0] + second[:, 0], 1, 1
        case SigLIP():
            value[0], count[0], factor[:] = first[:, 0] + second[:, 0], 1, 1 / loss.temperature
            negatives, positives = first[:, 1], -second[:, 1]
        case SupCon():
            has = positives > 0
            pays = has & (first[:, 2] > 1)
            value[0] = torch.where(has, log_sum(first) - second[:, 0] / positives, 0)
            count[0] = pays
            factor[0] = torch.where(has, 1 / first[:, 0], 0)
            factor[1] = torch.where(has, -1 / (loss.temperature * positives), 0)
            positives, negatives = positives * pays, (first[:, 2] - positives) * pays
        case NTXent():
            value[0], count[0] = second[:, 0], positives
            factor[0], factor[1] = torch.where(negatives == 0, 0, second[:, 1] / first[:, 0]), -1 / loss.temperature
            both = (positives > 0) & (negatives > 0)
            positives, negatives = positives * both, negatives * both
        case DCL() | DCLW():
            both = (positives > 0) & (negatives > 0)
            positives, negatives = positives * both, negatives * both
            pull = second[:, 0] / loss.temperature if isinstance(loss, DCLW) else second[:, 0]
            value[0] = torch.where(both, positives * log_sum(first) - pull, 0)
            count[0] = positives
            factor[0] = torch.where(both, positives / first[:, 0], 0)
            factor[1] = torch.where(both, -1 / loss.temperature, 0)
        case NCA():
            has, both = positives > 0, (positives > 0) & (negatives > 0)
            x = torch.where(has, log_sum(first) - log_sum(second), -torch.inf)
            value[0], count[0] = softplus(x), has
            factor[0] = torch.where(both, x.sigmoid() / first[:, 0], 0)
            factor[1] = torch.where(has, -x.sigmoid() / second[:, 0], 0)
            positives, negatives = positives * both, negatives * both
        case LiftedStructure():
            push = torch.where(negatives > 0, log_sum(first) - loss.neg_margin, 0)
            pull = torch.where(positives > 0, log_sum(second) + loss.pos_margin, 0)
            x = push + pull
            pays = ~(x <= 0)
            value[0], count[0] = torch.where(pays, x, 0), 1
            factor[:] = torch.where(pays & (sums[..., 2] > 0), 1 / sums[..., 0], 0)
            positives, negatives = positives * pays, negatives * pays
        case MultiSimilarity():
            count[0] = 1
            for k, a in enumerate((loss.beta, -loss.alpha)):
                x = log_sum(sums[k]) - a * loss.base
                value[0] += softplus(x) / abs(a)
                factor[k] = torch.where(sums[k, :, 2] == 0, 0, x.sigmoid() / (abs(a) * sums[k, :, 0]))
        case Circle():
            both = (positives > 0) & (negatives > 0)
            x = torch.where(both, log_sum(first) + log_sum(second), -torch.inf)
            value[0], count[0] = softplus(x), both
            factor[:] = torch.where(both, x.sigmoid() / sums[..., 0], 0)
            positives, negatives = positives * both, negatives * both
        case Triplet():
            cost = nearness(loss, first[:, 3]) - nearness(loss, -second[:, 3]) + loss.margin
            pays = (positives > 0) & (negatives > 0) & (loss.soft | ~(cost <= 0))
            value[0], count[0] = torch.where(pays, softplus(cost) if loss.soft else cost, 0), pays
            of_rows = pays & (first[:, 0] >= 0) & (second[:, 0] >= 0)  # an infinite similarity is no row's
            weight = cost.sigmoid() if loss.soft else torch.ones_like(cost)
            factor[0] = torch.where(of_rows, weight * nearness_slope(loss, first[:, 3]), 0)
            factor[1] = torch.where(of_rows, -weight * nearness_slope(loss, -second[:, 3]), 0)
            positives = negatives = pays.double()
    return value, count, factor, positives, negatives
