"""The step of a memory that several ranks have in common. Each ranks its own rows against the memory, or those of all
that hold the memory between them against its block; and its own rows against the batch, if that is faster
(`shared_batch_loss.py`). The sums over all anchors are exchanged; everything else it does for the whole batch, as one
process would."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import ops, shared_batch_loss
from ._autograd import across, needs_grad, with_gradient
from .composed import Losses
from .distributed import Batch, Ranks
from .losses import PairLoss, Triplet
from .losses.learned import by_temperature, fold_temperature, learned_of, with_offset, with_slope
from .ops.loss_of_memory import averages
from .options import LossOptions
from .reference.programs import mean_in_common
from .shared_triplets import triplet_sums

# On a GPU `memory_sums` has only the composite way. 64 rows against 60,000 of 512 dimensions took an H200 0.73 ms by it
# (16-bit rows), 256 by the tensor cores' sweep 0.98, 1,024 by the screen 0.77: benchmarks/results has these times.
RANKS_ON_A_GPU = 4
RANKS_ON_A_GPU_WITH_SCREEN = 16
# On a CPU it takes another exchange, of a millisecond or two, and more calls of ops (`python -m benchmarks.ranks`).
LEAST_SAVED = 1 << 31  # multiply-adds of a rank


def is_worth_it(ranks: Ranks, batch: Batch, bank: Tensor, loss: PairLoss, batch_weight: float) -> bool:
    """Whether it is faster that each ranks its own rows, against the memory or the batch, than that all rank all, by
    `ops.step_`; or there is no other way. The same on all."""
    divides_batch = batch_weight != 0 and shared_batch_loss.is_worth_it(ranks, batch, loss)
    return divides_batch or _divides_memory(ranks, batch, bank, loss)


def _divides_memory(ranks: Ranks, batch: Batch, bank: Tensor, loss: PairLoss) -> bool:
    """Whether it is faster that each ranks its own rows against the memory; or none has all of it. The same on all."""
    if ranks.shards.size > 1:
        return True
    if not loss.passes:
        return False
    if bank.device.type == "cpu":
        return len(batch.labels) * (ranks.size - 1) // ranks.size * bank.numel() >= LEAST_SAVED
    return ranks.size >= (RANKS_ON_A_GPU_WITH_SCREEN if loss.takes_screen else RANKS_ON_A_GPU)


def losses_of(ranks: Ranks, memory: Any, batch: Batch, loss: PairLoss, **options: Any) -> Losses:
    """The losses of a step of all ranks, whose gradient is right in this rank's own rows.

    Args:
        batch: of all ranks, its embeddings float32 or float64.
        options: those of `ops.losses_of`.
    """
    return partial(_losses, ranks, memory, batch, loss, options)


def _losses(
    ranks: Ranks, memory: Any, batch: Batch, loss: PairLoss, options: dict[str, Any], z: Tensor, slots: Tensor | None,
    pairs: Tensor | None,
) -> Tensor:  # fmt: skip
    divides = _divides_memory(ranks, batch, memory.bank, loss)
    # Of rows whose gradient only their rank knows, the mean takes an exchange.
    centers = options["center_gradient"] and divides
    options = options | {"center_gradient": options["center_gradient"] and not divides}

    def of_own(z: Tensor, given: LossOptions) -> tuple[Tensor, Tensor]:
        line = ranks.line(batch)
        for name in ("anchors", "exclude"):
            of_all = given.get(name)
            if isinstance(of_all, Tensor):
                given[name] = of_all[line]
        exclude, count = given.get("exclude"), given.get("count")
        if exclude is not None and given.get("bank_ids") is None:  # rows are numbered from 0 in each block
            given["exclude"] = exclude - memory._first
        if count is not None:
            given["count"] = memory._stored(count)
        return memory_loss(ranks, z, batch, memory, loss, centers, given)

    def against(z: Tensor, given: LossOptions) -> Tensor:
        if divides:
            value, counted = of_own(z, given)
        else:
            bank = (memory.bank, memory.bank_labels)
            value, counted = ops.memory_loss_and_pairs(z, batch.labels, *bank, loss, **given)
        if pairs is not None:
            pairs.copy_(counted)
        return value

    if shared_batch_loss.is_worth_it(ranks, batch, loss):
        options["against_itself"] = partial(shared_batch_loss.batch_loss, ranks, batch, memory.temperature)
    return ops.losses_of(memory, z, batch.labels, loss, against, mask=batch.mask, ids=batch.ids, slots=slots, **options)


def memory_loss(
    ranks: Ranks, z: Tensor, batch: Batch, memory: Any, loss: PairLoss, center_gradient: bool, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """The loss of the anchors of all ranks against a memory, and the pairs `[2]`. The anchors of this rank's line meet
    its block of the memory; what each of them then costs is settled by its owner. The gradient is that of the own rows,
    but of a learned temperature the whole.

    What is exchanged depends on nothing in which ranks may differ, as whether one of them needs a gradient.

    Args:
        z, batch: of all ranks.
        options: those of `memory_loss`, of the line's anchors and for the block.
    """
    shards, learned = ranks.shards, memory.temperature
    line, own = ranks.line(batch), ranks.own(batch)
    sizes, labels = batch.sizes[shards.members], batch.labels[line]
    given, (loss, ranking) = loss, fold_temperature(loss, z[line])
    own = slice(own.start - line.start, own.stop - line.start)  # of the line's anchors
    exchanges = shards.size > 1 or learned is not None or center_gradient
    need_grad = batch.learns if exchanges else needs_grad(ranking)
    if isinstance(loss, Triplet) and not loss.passes:
        totals, grads = triplet_sums(ranking.detach(), labels, memory, loss, shards, need_grad, options)
        factor = grads.new_ones(1, len(ranking))
        grads = grads[None]
    else:
        totals, grads, factor = _pass_by_pass(ranks, ranking, labels, memory, loss, own, sizes, need_grad, options)

    result, average, pairs = averages(ranks.total(totals), z.dtype)
    if not need_grad:
        return with_offset(result, given, pairs), pairs
    factor = (factor * average[: loss.groups, None]).to(z.dtype)[..., None]
    grad = shards.to_owners(torch.where(factor == 0, 0, factor * grads).sum(0), sizes).sum(0)
    rows = ranking[own]
    grad = by_rows = torch.where(rows.isfinite().all(1, keepdim=True), grad, torch.nan)
    if center_gradient:
        by_rows = _centered(ranks, grad, rows.detach(), None if batch.mask is None else ~batch.mask[ranks.own(batch)])
    value = with_offset(with_gradient(result, rows, by_rows, *learned_of(given)), given, pairs, rows)
    if learned is None:
        return value, pairs
    slope = ranks.total(by_temperature(learned, grad, rows, result))
    return with_slope(value, given.temperature, slope, rows, *learned_of(given)), pairs  # type: ignore[attr-defined]


def _centered(ranks: Ranks, grad: Tensor, z: Tensor, anchors: Tensor | None) -> Tensor:
    """As `_autograd.centered`, of the own rows, with the mean over the anchors of all ranks."""
    parts, has = across(grad, z, anchors)
    sums = torch.cat((parts.double().sum(0), has.sum()[None]))
    total, count = ranks.total(sums).split((z.shape[1], 1))
    return torch.where(has[:, None], grad - (total / count.clamp(min=1)).to(grad.dtype), grad)


def _pass_by_pass(
    ranks: Ranks, ranking: Tensor, labels: Tensor, memory: Any, loss: PairLoss, own: slice, sizes: Sequence[int],
    need_grad: bool, options: LossOptions,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Totals `[7]` of the own anchors; and, of all that meet the block, its gradients `[2, A, D]` and what these are to
    be multiplied by, besides the averages, `[2, A]`."""
    shards, anchors = ranks.shards, options.get("anchors")
    of_own = None if anchors is None else anchors[own]
    sums = ranking.new_zeros(shards.size, sizes[shards.place], 2, 4, dtype=torch.float64)
    grads = torch.zeros_like(ranking, memory_format=torch.contiguous_format).repeat(2, 1, 1)
    given = None
    for number, filled in enumerate(loss.passes):
        slots = slice(filled[0], filled[-1] + 1)  # a list would be copied to the device, and the host wait for it
        of_pass, grads_of_pass = ops.memory_sums(
            ranking, labels, memory.bank, memory.bank_labels, loss, number=number, given=given, first=memory._first,
            need_grad=need_grad, **options,
        )  # fmt: skip
        if need_grad:
            grads[slots] = grads_of_pass[slots]
        sums[:, :, slots] = shards.to_owners(of_pass[slots].transpose(0, 1).contiguous(), sizes)
        parts = sums.transpose(1, 2).contiguous()
        for_next, scale, totals = ops.settle_sums(parts, loss, number + 1, of_own)
        if number + 1 < len(loss.passes):
            if loss.gives_in_common:
                for_next = _in_common(ranks, totals).repeat(len(for_next))
            given = shards.to_shards(for_next.expand(shards.size, -1), sizes)
    return totals, grads, shards.to_shards(scale.transpose(1, 2).contiguous(), sizes).t()


def _in_common(ranks: Ranks, totals: Tensor) -> Tensor:
    """What the anchors of all ranks are given, from what the own ones add to it."""
    log_sums, numbers = ranks.of_each(totals[:3:2].contiguous()).unbind(1)
    return mean_in_common(log_sums.logsumexp(0), numbers.sum())
