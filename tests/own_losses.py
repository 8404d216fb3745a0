"""Losses of the user's own, and what they come to by autograd over all pairs at once."""

import torch
import torch.nn.functional as F
from torch import nn

from xbn_ext import CustomLoss


class Margins(CustomLoss):
    """Its margins learn."""

    def __init__(self):
        super().__init__()
        self.margins = nn.Parameter(torch.tensor([0.8, 0.1], dtype=torch.float64))

    def positive(self, s):
        return (self.margins[0].to(s.dtype) - s).relu()

    def negative(self, s):
        return (s - self.margins[1].to(s.dtype)).relu() ** 2


class Exponents(Margins):
    reduction = "logsumexp"

    def positive(self, s):
        return -3 * (s - self.margins[0].to(s.dtype))

    def negative(self, s):
        return 20 * (s - self.margins[1].to(s.dtype))

    def anchor(self, positives, negatives):
        return F.softplus(positives) / 3 + F.softplus(negatives) / 20


class Mixed(Exponents):
    reduction = ("mean", "logsumexp")
    needs_both = True

    def anchor(self, positives, negatives):
        return (positives + negatives + self.margins.sum()).relu()


class Hardest(Margins):
    reduction = "max"
    needs_both = True

    def positive(self, s):
        return -s

    def anchor(self, positives, negatives):
        return (positives + negatives + self.margins[0].to(positives.dtype)).relu()


class WithoutFalseNegatives(Margins):
    """A negative that is nearer than the farthest positive by 0.5 costs nothing."""

    first = "positives"
    reduction = ("max", "sum")
    needs_both = True

    def negative(self, s, farthest):
        return torch.where(s > self.margins[0].to(s.dtype) - farthest + 0.5, 0.0, super().negative(s))


class EachPositive(Margins):
    """Each positive against all negatives, whose number has a derivative only by way of the positives."""

    first = "negatives"
    reduction = ("sum", "logsumexp")
    average = "pairs"

    def positive(self, s, negatives):
        return F.softplus(negatives - 5 * s * self.margins[0].to(s.dtype))

    def negative(self, s):
        return 5 * s + self.margins[1].to(s.dtype)

    def anchor(self, positives, negatives):
        return positives


class BothAndEach(EachPositive):
    needs_both = True
    reduction = ("mean", "logsumexp")

    def anchor(self, positives, negatives):
        return positives + F.softplus(negatives) * self.margins.sum().to(positives.dtype)


def averaged(loss, by):
    return type(f"{loss.__name__}By{by.replace(' ', '')}", (loss,), {"average": by})


KINDS = [
    Margins, Exponents, Mixed, Hardest, averaged(Margins, "pairs"), averaged(Mixed, "active pairs"),
    WithoutFalseNegatives, EachPositive, BothAndEach,
]  # fmt: skip


def at_once(loss, s, positive, negative, anchors):
    """The loss from all similarities `[B, M]`, by torch alone."""
    reduced, number, active = [None, None], [None, None], [None, None]
    sides = [(loss.positive, positive), (loss.negative, negative)]
    for k in [1, 0] if loss.first == "negatives" else [0, 1]:
        (term, which), reduction = sides[k], loss.reductions[k]
        other = reduced[1 - k]
        terms = term(s) if loss.first is None or other is None else term(s, other[:, None])
        n = which.sum(1)
        number[k], active[k] = n, (which & (terms != 0)).sum(1)
        some = n > 0
        filled = torch.where(which, terms, -torch.inf)
        filled = torch.where(some[:, None], filled, 0.0)
        match reduction:
            case "sum":
                value = torch.where(which, terms, 0.0).sum(1)
            case "mean":
                value = torch.where(which, terms, 0.0).sum(1) / n.clamp(min=1)
            case "logsumexp":
                value = torch.where(some, filled.logsumexp(1), -torch.inf)
            case "max":
                value = torch.where(some, filled.max(1).values, -torch.inf)
        reduced[k] = value
    pays = (number[0] > 0) & (number[1] > 0) if loss.needs_both else number[0] + number[1] > 0
    costs = torch.where(pays, loss.anchor(*reduced), 0.0)
    count = {
        "anchors": pays.sum() if loss.needs_both else anchors.sum(),
        "pairs": (number[0] + number[1])[pays].sum(),
        "active pairs": (active[0] + active[1])[pays].sum(),
    }[loss.average]
    return costs.sum() / count.clamp(min=1)
