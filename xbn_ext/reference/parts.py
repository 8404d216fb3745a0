"""A loss in parts, as the ranks of a group compute one. Of a batch against itself: `batch_sums` of some of its anchors.
Against a bank: `memory_sums` of each part, pass by pass, and `settle_sums` of all; the same in kernels:
`csrc/math/losses.h`.

A loss adds up, for each anchor, what one or two *slots* say of its pairs: of its negatives, its positives or all. A
slot's *formula* gives each pair a value and a weight, `weight = d value / d s` up to a factor that is known only at the
end. Sums `[B, 4]` are

    value   the sum of the values; of exponents x, of e^(x - shift); of an extreme, its row, or -1
    weight  the sum of the weights
    pairs   how many counted
    shift   of exponents, the largest x; of an extreme, it

and `grads [B, D]` the sum of weight times row, scaled as the values are; of an extreme, its row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..losses import (
    DCL,
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
from ..options import LossOptions
from .losses import evaluate, nearness, nearness_slope, softplus
from .ops import pairs_in_batch, similarities

Formula = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Of similarities, whether a pair is a positive, what the anchor is given: value (or x), weight, whether it counts."""


class Slot(NamedTuple):
    """Which pairs are added up, and how: as sums, as exponents, or only the largest."""

    pairs: str  # negatives, positives, all
    adds: str  # values, exponents, extreme
    formula: Formula


def memory_sums(
    z: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, loss: PairLoss, *, number: int = 0,
    given: Tensor | None = None, first: int = 0, need_grad: bool = True, **options: Unpack[LossOptions],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Pass `number` of the loss: sums `[2, B, 4]` and grads `[2, B, D]` of its slots, zeros in the other. Rows are
    those of a longer bank from its row `first` on."""
    s, positive, pair, rows = similarities(z, labels, bank, bank_labels, options)
    sums, grads = s.new_zeros(2, len(z), 4, dtype=torch.float64), torch.zeros_like(z).repeat(2, 1, 1)
    of_anchor = z.new_zeros(len(z)) if given is None else given.to(z.dtype)
    anchors = options.get("anchors")
    for k, slot in program(loss)[number].items():
        sums[k], grads[k] = score(slot, s, positive, pair, of_anchor, rows, first)
        if anchors is not None:
            sums[k][~anchors] = 0
    return sums, grads if need_grad else grads[:, :0]


def score(
    slot: Slot, s: Tensor, positive: Tensor, pair: Tensor, given: Tensor, rows: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    """Sums `[B, 4]` and grads `[B, D]` of one slot, from similarities `s [B, n]` with the `rows [n, D]`."""
    take = {"negatives": pair & ~positive, "positives": pair & positive, "all": pair}[slot.pairs]
    value, weight, counts = slot.formula(s, positive, given[:, None])
    take = take & counts
    sums = no_sums(slot, s)
    sums[:, 2] = take.sum(1)
    if s.shape[1] == 0:
        return sums, s.new_zeros(len(s), rows.shape[1])
    if slot.adds == "extreme":
        best, row = value.masked_fill(~take, -torch.inf).max(1)
        some = ~(best <= -torch.inf)
        sums[:, 0], sums[:, 3] = torch.where(some, row + first, -1), best.double()
        return sums, torch.where(some[:, None], rows[row], 0)
    if slot.adds == "exponents":
        largest = value.masked_fill(~take, -torch.inf).max(1).values
        sums[:, 3] = largest.double()
        value = (value - torch.where(largest == -torch.inf, 0, largest)[:, None]).exp()
        weight = weight * value
    else:
        sums[:, 1] = torch.where(take, weight, 0).sum(1, dtype=torch.float64)
    sums[:, 0] = torch.where(take, value, 0).sum(1, dtype=torch.float64)
    return sums, torch.where(take, weight, 0) @ rows


def no_sums(slot: Slot, like: Tensor) -> Tensor:
    """`[B, 4]` before the first pair."""
    sums = like.new_zeros(len(like), 4, dtype=torch.float64)
    sums[:, 0] = -1 if slot.adds == "extreme" else 0
    sums[:, 3] = 0 if slot.adds == "values" else -torch.inf
    return sums


def add(slot: Slot, left: Tensor, right: Tensor) -> Tensor:
    """The sums `[B, 4]` of two parts of a bank, the second further on."""
    (value, weight, pairs, shift), (other, _, others, to) = left.unbind(1), right.unbind(1)
    if slot.adds == "extreme":
        exceeds = ~(to <= shift) & ~shift.isnan()
        second = (other >= 0) & (exceeds | ((to == shift) & (other < value)))
        return torch.stack(
            [torch.where(second, other, value), weight, pairs + others, torch.where(second, to, shift)], 1
        )
    if slot.adds == "exponents":
        largest = torch.maximum(shift, to)
        value = value * rescale(shift, largest) + other * rescale(to, largest)
        return torch.stack([value, weight, pairs + others, largest], 1)
    return left + right


def add_grads(slot: Slot, left: Tensor, grad: Tensor, right: Tensor, other: Tensor, both: Tensor) -> Tensor:
    """The grads `[B, D]` that go with the sums of two parts and with those of both."""
    if slot.adds == "values":
        return grad + other
    if slot.adds == "extreme":
        return torch.where(((both[:, 0] == right[:, 0]) & (right[:, 0] >= 0))[:, None], other, grad)
    of_left, of_right = (rescale(sums[:, 3], both[:, 3]).to(grad.dtype)[:, None] for sums in (left, right))
    return grad * of_left + other * of_right


def rescale(shift: Tensor, to: Tensor) -> Tensor:
    """What is scaled by e^-shift, times this, is scaled by e^-to."""
    return torch.where(shift == to, 1.0, (shift - to).exp())


def settle_sums(
    parts: Tensor, loss: PairLoss, passes: int, anchors: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """From the sums `[n, 2, B, 4]` of n parts after so many passes: given `[B]` for the next; or, after the last, scale
    `[n, 2, B]` of the parts' gradients, and totals `[7]`: value and count of the two groups, anchors, positives and
    negatives that have a weight."""
    n, _, B, _ = parts.shape
    given, scale, totals = parts.new_zeros(B), parts.new_zeros(n, 2, B), parts.new_zeros(7)
    ranks = torch.ones(B, dtype=torch.bool, device=parts.device) if anchors is None else anchors
    slots: dict[int, Slot] = {}
    for filled in program(loss)[:passes]:
        slots |= filled
    sums = torch.zeros_like(parts[0])
    for k, slot in slots.items():
        sums[k] = no_sums(slot, parts[0, k])
        for part in parts:
            sums[k] = add(slot, sums[k], part[k])
    if passes < len(program(loss)):
        return torch.where(ranks, given_for(loss, passes, sums), given), scale, totals
    value, count, factor, positives, negatives = finish(loss, sums)
    for k, slot in slots.items():
        of_slot = factor[k].expand(n, B)
        if slot.adds == "exponents":
            of_slot = of_slot * rescale(parts[:, k, :, 3], sums[k, :, 3])
        if slot.adds == "extreme":
            of_slot = torch.where(parts[:, k, :, 0] == sums[k, :, 0], of_slot, 0)
        scale[:, k] = torch.where(ranks, of_slot, 0)
    of_anchors = torch.stack([*value, *count, torch.ones_like(positives), positives, negatives])
    return given, scale, torch.where(ranks, of_anchors, 0).sum(1)


def batch_sums(
    dots: Tensor, labels: Tensor, loss: PairLoss, *, first: int = 0, ids: Tensor | None = None,
    anchors: Tensor | None = None, need_grad: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the rows from `first` on of a batch add to its loss against itself, from their similarities `dots [A, B]`
    with all of it: totals `[7]` as `settle_sums` has them, and the derivative `[A, B]` of what they cost, which is not
    yet averaged."""
    positive, pair = pairs_in_batch(labels, ids, slice(first, first + len(dots)))
    own = dots.diagonal(first)  # a row with itself
    with torch.enable_grad():
        s = dots.detach().requires_grad_()
        finite = torch.where(own * 0 == 0, 1.0, torch.nan).to(s.dtype)
        costs, counts, p, n = evaluate(loss, s * finite[:, None], positive, pair, anchors)
        (grad,) = torch.autograd.grad(torch.stack(costs).sum(), s)
    totals = dots.new_zeros(7, dtype=torch.float64)
    totals[: len(costs)] = torch.stack(costs).detach()
    totals[2 : 2 + len(counts)] = torch.stack(counts)
    totals[4] = len(dots) if anchors is None else anchors.sum()
    totals[5], totals[6] = p.sum(), n.sum()
    return totals, grad if need_grad else grad[:0]


# --- The losses -------------------------------------------------------------------------------------------


def program(loss: PairLoss) -> list[dict[int, Slot]]:
    """The passes of a loss, and the slots that each fills."""
    match loss:
        case Contrastive() | Margin() if loss.passes == ((0,),):
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
        case NCA():
            of_both = exponent(loss.softmax_scale)
            return [{0: Slot("negatives", "exponents", of_both), 1: Slot("positives", "exponents", of_both)}]
        case LiftedStructure():
            of_negatives, of_positives = exponent(1, -loss.neg_margin), exponent(-1, loss.pos_margin)
            return [{0: Slot("negatives", "exponents", of_negatives), 1: Slot("positives", "exponents", of_positives)}]
        case MultiSimilarity():
            mined = loss.mining is not None
            push = Slot("negatives", "exponents", exponent(loss.beta, -loss.beta * loss.base, mined))
            pull = Slot("positives", "exponents", exponent(-loss.alpha, loss.alpha * loss.base, mined))
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
    def formula(s: Tensor, positive: Tensor, given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        near, (pos_limit, neg_limit) = nearness(loss, s), loss.limits
        cost = torch.where(positive, pos_limit - near, near - neg_limit)
        return cost, torch.where(positive, -1.0, 1.0).to(s.dtype) * nearness_slope(loss, s), ~(cost <= 0)

    return formula


def times(a: Any) -> Formula:
    return lambda s, positive, given: (a * s, torch.ones_like(s), always(s))


def cross_entropy(a: Any) -> Formula:
    """Of a positive with all negatives, whose log-sum-exp the anchor is given."""
    return lambda s, positive, given: (softplus(given - a * s), (given - a * s).sigmoid(), always(s))


def sigmoid(loss: SigLIP) -> Formula:
    def formula(s: Tensor, positive: Tensor, given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = s / loss.temperature + loss.bias
        x = torch.where(positive, -x, x)
        return softplus(x), torch.where(positive, -x.sigmoid(), x.sigmoid()), always(s)

    return formula


def exponent(a: Any, b: float = 0.0, mined: bool = False) -> Formula:
    """`x = a s + b`; if mined only negatives above, positives below what the anchor is given."""

    def formula(s: Tensor, positive: Tensor, given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        left_out = torch.where(positive, s >= given, s <= given)
        return a * s + b, torch.full_like(s, a), ~left_out if mined else always(s)

    return formula


def paced(loss: Circle) -> Formula:
    def formula(s: Tensor, positive: Tensor, given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pace = loss.gamma * torch.where(positive, 1 + loss.m - s, s + loss.m).relu()
        x = torch.where(positive, -pace * (s - (1 - loss.m)), pace * (s - loss.m))
        return x, torch.where(positive, -pace, pace), always(s)

    return formula


def log_sum(sums: Tensor) -> Tensor:
    return torch.where(sums[..., 2] == 0, -torch.inf, sums[..., 0].log() + sums[..., 3])


def given_for(loss: PairLoss, number: int, sums: Tensor) -> Tensor:
    """`[B]` what pass `number` is given, from sums `[2, B, 4]`."""
    if isinstance(loss, NTXent):
        return log_sum(sums[0])
    assert isinstance(loss, MultiSimilarity) and loss.mining is not None
    if number == 1:
        return -sums[1, :, 3] - loss.mining  # negatives above the hardest positive, nearly
    return (sums[0, :, 3] + loss.beta * loss.base) / loss.beta + loss.mining  # positives below the hardest negative


def finish(loss: PairLoss, sums: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of each anchor: value and count of the groups `[2, B]`, the factors of the slots' gradients `[2, B]`, and how
    many positives and negatives have a weight `[B]`, from sums `[2, B, 4]`."""
    first, second = sums
    value, count, factor = (torch.zeros_like(sums[..., 0]) for _ in range(3))
    negatives, positives = first[:, 2], second[:, 2]
    match loss:
        case Contrastive(reduction="avg_nonzero"):
            value[:], factor[:], count[:] = sums[..., 0], 1, sums[..., 2]
        case Contrastive() | Margin() if loss.passes == (
            (0,),
        ):  # all negatives have one weight, positives its negative
            value[0], factor[0] = first[:, 0], 1
            more = first[:, 1] / nearness_slope(loss, first[:, 1])
            negatives, positives = (first[:, 2] + more) / 2, (first[:, 2] - more) / 2
            count[0] = first[:, 2] if isinstance(loss, Margin) else 1
        case Contrastive():
            value[0], factor[:], count[0] = first[:, 0] + second[:, 0], 1, 1
        case SigLIP():
            value[0], count[0], factor[:] = first[:, 0] + second[:, 0], 1, 1 / loss.temperature
            negatives, positives = first[:, 1], -second[:, 1]
        case SupCon():
            has = positives > 0
            negatives = first[:, 2] - positives
            value[0] = torch.where(has, log_sum(first) - second[:, 0] / positives, 0)
            count[0] = has & (first[:, 2] > 1)
            factor[0] = torch.where(has, 1 / first[:, 0], 0)
            factor[1] = torch.where(has, -1 / (loss.temperature * positives), 0)
        case NTXent():
            value[0], count[0] = second[:, 0], positives
            factor[0], factor[1] = torch.where(negatives == 0, 0, second[:, 1] / first[:, 0]), -1 / loss.temperature
        case DCL():
            both = (positives > 0) & (negatives > 0)
            positives, negatives = positives * both, negatives * both
            value[0] = torch.where(both, positives * log_sum(first) - second[:, 0], 0)
            count[0] = positives
            factor[0] = torch.where(both, positives / first[:, 0], 0)
            factor[1] = torch.where(both, -1 / loss.temperature, 0)
        case NCA():
            has, both = positives > 0, (positives > 0) & (negatives > 0)
            negatives = negatives * has
            x = torch.where(both, log_sum(first) - log_sum(second), -torch.inf)
            value[0], count[0] = softplus(x), has
            factor[0] = torch.where(both, x.sigmoid() / first[:, 0], 0)
            factor[1] = torch.where(both, -x.sigmoid() / second[:, 0], 0)
        case LiftedStructure():
            x = torch.where(sums[..., 2] > 0, log_sum(sums), 0).sum(0)
            pays = ~(x <= 0)
            value[0], count[0] = torch.where(pays, x, 0), 1
            factor[:] = torch.where(pays & (sums[..., 2] > 0), 1 / sums[..., 0], 0)
            positives, negatives = positives * pays, negatives * pays
        case MultiSimilarity():
            count[0] = 1
            value[0] = softplus(log_sum(first)) / loss.beta + softplus(log_sum(second)) / loss.alpha
            for k, by in enumerate((loss.beta, loss.alpha)):
                factor[k] = torch.where(sums[k, :, 2] == 0, 0, 1 / ((-sums[k, :, 3]).exp() + sums[k, :, 0]) / by)
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
