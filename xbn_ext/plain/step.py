"""A training step of the memory, from the other ops: `step_`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .._autograd import centered
from ..checks import shares_memory
from .bank import check_enqueue, check_track, check_transform, enqueue_, standardize_, track_, transform_
from .batch import normalize, normalize_backward
from .chunks import exact
from .contract import Contract, apart, check, dense
from .loss import loss_of, parse_loss
from .loss_of_batch import batch_loss
from .loss_of_memory import BankSimilarities, Ranked, check_memory_loss


@exact
def step_(
    bank: Tensor, bank_labels: Tensor, bank_ids: Tensor, bank_steps: Tensor, sums: Tensor, head: Tensor, count: Tensor,
    scale: Tensor, shift: Tensor, target_mean: Tensor, target_std: Tensor, variance: Tensor, innovation: Tensor,
    step: Tensor,
    pairs: Tensor | None, drift_stats: Tensor | None, x: Tensor, sides: Tensor | None, labels: Tensor,
    mask: Tensor | None, ids: Tensor | None, loss: str, parameters: Sequence[float], follows: bool,
    process_noise: float | None, measurement_noise: float, fixed_gain: float | None, deferred: bool, stores_first: bool,
    normalizes: bool, renormalize: bool, batch_weight: float, memory_weight: float, center_gradient: bool,
    warmup_steps: int, eps: float, need_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    op = "step_"
    c = Contract(op, bank)
    required = {
        "bank": bank, "bank_labels": bank_labels, "bank_ids": bank_ids, "bank_steps": bank_steps, "sums": sums,
        "head": head, "count": count, "scale": scale, "shift": shift, "target_mean": target_mean,
        "target_std": target_std, "variance": variance, "innovation": innovation, "step": step, "x": x,
        "labels": labels,
    }  # fmt: skip
    for name, t in required.items():
        c.given(name, t)
    check_transform(op, bank, sums, scale, shift, count)
    c.matrix("x", x, "[B, D]", (None, bank.shape[1]))
    c.eps(eps)
    B, D = x.shape
    if sides is not None:
        check(not normalizes, f"{op}: sides are of a batch that is normalised")
        c.matrix("sides", sides, "[2 B, D]", (2 * B, D))
        c.dtype("sides", sides, x.dtype, "of the dtype of x")
    filtered = (target_mean, target_std, variance, innovation, scale, shift)
    noises = (process_noise, measurement_noise, fixed_gain, eps)
    written = check_track(c, bank.shape[1], *filtered, sums, count, *noises, drift_stats, "drift_stats")
    c.counter("step", step)
    if pairs is not None:
        c.statistic("pairs", pairs, "[2]", (2,))
    check(not center_gradient or sides is None, f"{op}: center_gradient is of a batch without sides")
    check(math.isfinite(batch_weight) and math.isfinite(memory_weight), f"{op}: weights must be finite")
    pair_loss = parse_loss(op, loss, parameters)
    ring = (bank, bank_labels, sums, head, count)
    c.rows_mask("mask", mask, B)
    written |= check_enqueue(c, *ring, x, labels, mask, scale, shift, bank_ids, ids, bank_steps, step)
    written |= {"step": step, "pairs": pairs}
    x, sides, mask = x.contiguous(), dense(sides), dense(mask)
    labels = _kept_apart(labels.contiguous(), written)
    ids = None if ids is None else _kept_apart(ids.contiguous(), written)
    apart(op, written, {"x": None if normalizes else x, "sides": sides, "mask": mask})
    check_memory_loss(c, x, labels, bank, bank_labels, Ranked(scale=scale, shift=shift, eps=eps))
    c.value("head", head, len(bank) - 1)
    c.value("count", count, len(bank))

    z, norm = normalize(x, eps) if normalizes else (x, None)
    if follows:
        track_(target_mean, target_std, variance, scale, shift, z, mask, sums, count, *noises, drift_stats, innovation)
        if deferred:
            standardize_(bank, sums, scale, shift, count, eps)
        else:
            transform_(bank, sums, scale, shift, count)
    else:
        copies = (target_mean.clone(), target_std.clone(), variance.clone(), scale.clone(), shift.clone())
        track_(*copies, z, mask, sums, count, *noises, drift_stats, innovation.clone())

    def put() -> Tensor:
        return enqueue_(*ring, z, labels, mask, scale, shift, bank_ids, ids, bank_steps, step)

    slots = put() if stores_first else None
    anchors, exclude = None if mask is None else ~mask, slots
    if ids is not None:
        own = -1 if slots is None else -2 - slots
        exclude = torch.where(ids >= 0, ids, own)

    ranking, rows = (z, z) if sides is None else sides.tensor_split(2)
    value, grad, grad_rows = z.new_zeros(()), torch.zeros_like(ranking), torch.zeros_like(rows)
    if batch_weight != 0:
        dots = ranking @ rows.T
        again = renormalize and not normalizes and sides is None
        own_loss, grad_dots = batch_loss(dots, labels, ids, anchors, loss, parameters, again, eps, need_grad)
        value = value + batch_weight * own_loss
        if need_grad:
            grad = grad + batch_weight * (grad_dots @ rows)
            grad_rows = batch_weight * (grad_dots.T @ ranking)
    if memory_weight != 0:
        ranked = torch.where(step < warmup_steps, 0, count)
        of_bank = None if ids is None else bank_ids
        told = Ranked(ranked, scale, shift, of_bank, exclude, anchors, renormalize, eps)
        similarities = BankSimilarities(ranking, labels, bank, bank_labels, told)
        memory_value, grad_memory, counted = loss_of(similarities, pair_loss, need_grad)
        value = value + memory_weight * memory_value
        if need_grad:
            if center_gradient:
                grad_memory = centered(grad_memory, ranking, anchors)
            grad = grad + memory_weight * grad_memory
        if pairs is not None:
            pairs.copy_(counted)
    elif pairs is not None:
        pairs.fill_(torch.nan)
    if not stores_first:
        put()
    step.add_(1)
    if not need_grad:
        return value, z.new_empty(0, D)
    if sides is not None:
        return value, torch.cat((grad, grad_rows))
    grad = grad + grad_rows
    return value, grad if norm is None else normalize_backward(grad, z, norm, eps)


def _kept_apart(t: Tensor, written: Mapping[str, Tensor | None]) -> Tensor:
    """A copy, if it shares memory with anything that is written."""
    return t.clone() if any(shares_memory(t, other) for other in written.values() if other is not None) else t
