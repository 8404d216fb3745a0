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

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..losses import PairLoss
from ..options import LossOptions
from .loss import pairs_in_batch, similarities
from .losses import evaluate
from .programs import Slot, finish, given_for, given_in_common, mean_in_common, program


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
    sums, weight = weigh(slot, s, positive, pair, given, first)
    if slot.adds != "extreme" or s.shape[1] == 0:
        return sums, weight @ rows
    row = sums[:, 0].long() - first
    return sums, torch.where((row >= 0)[:, None], rows[row.clamp(min=0)], 0)


def weigh(slot: Slot, s: Tensor, positive: Tensor, pair: Tensor, given: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Sums `[B, 4]` of one slot, and the weights `[B, n]` of its pairs, scaled as the grads are."""
    take = {"negatives": pair & ~positive, "positives": pair & positive, "all": pair}[slot.pairs]
    value, weight, counts = slot.formula(s, positive, given[:, None])
    take = take & counts
    sums = no_sums(slot, s)
    sums[:, 2] = take.sum(1)
    if s.shape[1] == 0:
        return sums, torch.zeros_like(s)
    if slot.adds == "extreme":
        best, row = value.masked_fill(~take, -torch.inf).max(1)
        some = ~(best <= -torch.inf)
        sums[:, 0], sums[:, 3] = torch.where(some, row + first, -1), best.double()
        return sums, torch.zeros_like(s).scatter_(1, row[:, None], some[:, None].to(s.dtype))
    if slot.adds == "exponents":
        largest = value.masked_fill(~take, -torch.inf).max(1).values
        sums[:, 3] = largest.double()
        value = (value - torch.where(largest == -torch.inf, 0, largest)[:, None]).exp()
        weight = weight * value
    else:
        sums[:, 1] = torch.where(take, weight, 0).sum(1, dtype=torch.float64)
    sums[:, 0] = torch.where(take, value, 0).sum(1, dtype=torch.float64)
    return sums, torch.where(take, weight, 0)


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
    negatives that have a weight. Where all anchors are given the same, totals 0 and 2 are what that is made of."""
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
        if loss.gives_in_common:
            totals[0], totals[2] = common = given_in_common(loss, ranks, sums)
            return torch.where(ranks, mean_in_common(*common), given), scale, totals
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
