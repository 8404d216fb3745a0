"""The step of a memory that several ranks have in common. Each ranks its own rows against the memory, against the batch
(`shared_batch_loss.py`), or both, and the sums over all anchors are exchanged; everything else it does for the whole
batch, as one process would."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from . import ops, shared_batch_loss
from ._autograd import needs_grad, with_gradient, without_autocast
from .distributed import Batch, Ranks
from .filter import Filter
from .losses import Contrastive, PairLoss, fold_temperature
from .options import LossOptions

# On a GPU `memory_sums` has only the composite way. 64 rows against 60,000 of 512 dimensions took an H200 0.73 ms by it
# (16-bit rows), 256 by the tensor cores' sweep 0.98, 1,024 by the screen 0.77: benchmarks/results has these times.
RANKS_ON_A_GPU = 4
RANKS_ON_A_GPU_WITH_SCREEN = 16
# On a CPU it takes another exchange, of a millisecond or two, and more calls of ops (`python -m benchmarks.ranks`).
LEAST_SAVED = 1 << 31  # multiply-adds of a rank


def is_worth_it(ranks: Ranks, batch: Batch, bank: Tensor, loss: PairLoss, batch_weight: float) -> bool:
    """Whether it is faster that each ranks its own rows, against the memory or the batch, than that all rank all, by
    `ops.step_`. The same on all."""
    divides_batch = batch_weight != 0 and shared_batch_loss.is_worth_it(ranks, batch)
    return divides_batch or _divides_memory(ranks, batch, bank, loss)


def _divides_memory(ranks: Ranks, batch: Batch, bank: Tensor, loss: PairLoss) -> bool:
    """Whether it is faster that each ranks its own rows against the memory. The same on all."""
    if not loss.passes:
        return False
    if bank.device.type == "cpu":
        return len(batch.labels) * (ranks.size - 1) // ranks.size * bank.numel() >= LEAST_SAVED
    return ranks.size >= (RANKS_ON_A_GPU_WITH_SCREEN if isinstance(loss, Contrastive) else RANKS_ON_A_GPU)


def step_(
    ranks: Ranks,
    memory: Any,
    batch: Batch,
    loss: PairLoss,
    *,
    filter: Filter | None,
    update: Literal["inplace", "deferred"],
    enqueue: Literal["after", "before"],
    normalize_embeddings: bool,
    eps: float,
    **options: Any,
) -> Tensor:
    """As `ops.step_` of the whole batch, whose gradient is right in this rank's own rows.

    Args:
        batch: of all ranks, its embeddings float32 or float64.
        options: those of `loss_of`.
    """
    with without_autocast(batch.embeddings.device.type):
        z = ops.normalize(batch.embeddings, eps) if normalize_embeddings else batch.embeddings
        _move(memory, z.detach(), batch.mask, filter, update, eps)
        slots = None
        if enqueue == "before":
            slots = _store(memory, z.detach(), batch)
        memory.pairs.fill_(torch.nan)
        value = _losses(ranks, memory, z, batch, loss, slots, memory.pairs, eps=eps, **options)
        if enqueue == "after":
            _store(memory, z.detach(), batch)
        memory.step.view(-1).add_(1)
    return value


def loss_of(
    ranks: Ranks, memory: Any, batch: Batch, loss: PairLoss, *, normalize_embeddings: bool, eps: float, **options: Any
) -> Tensor:
    """As `ops.loss_of`."""
    with without_autocast(batch.embeddings.device.type):
        z = ops.normalize(batch.embeddings, eps) if normalize_embeddings else batch.embeddings
        return _losses(ranks, memory, z, batch, loss, None, None, eps=eps, **options)


def _move(memory: Any, z: Tensor, mask: Tensor | None, filter: Filter | None, update: str, eps: float) -> None:
    """The memory follows the drift; without a filter the drift is only measured."""
    target = (memory.target_mean, memory.target_std, memory.variance, memory.scale, memory.shift)
    if filter is None:
        target = tuple(t.clone() for t in target)
    noises = filter or Filter(float("inf"), 1.0, None)
    ops.track_(*target, z, mask, memory.sums, memory.count, *noises, eps, memory.drift_stats)
    bank = (memory.bank, memory.sums, memory.scale, memory.shift, memory.count)
    if filter is not None and update == "inplace":
        ops.transform_(*bank)
    elif filter is not None:
        ops.standardize_(*bank, eps)


def _store(memory: Any, z: Tensor, batch: Batch) -> Tensor:
    return ops.enqueue_(
        memory.bank, memory.bank_labels, memory.sums, memory.head, memory.count, z, batch.labels, batch.mask,
        memory.scale, memory.shift, bank_ids=memory.bank_ids, ids=batch.ids, bank_steps=memory.bank_steps,
        step=memory.step,
    )  # fmt: skip


def _losses(
    ranks: Ranks, memory: Any, z: Tensor, batch: Batch, loss: PairLoss, slots: Tensor | None, pairs: Tensor | None,
    **options: Any,
) -> Tensor:  # fmt: skip
    """As `ops.losses_of`; pairs `[2]` is written if there is a loss against the memory."""

    bank = (memory.bank, memory.bank_labels)

    def of_own(z: Tensor, given: LossOptions) -> tuple[Tensor, Tensor]:
        for name in ("anchors", "exclude"):
            of_all = given.get(name)
            if isinstance(of_all, Tensor):
                given[name] = of_all[batch.own]
        return memory_loss(ranks, z[batch.own], batch.labels[batch.own], *bank, loss, memory.temperature, given)

    def against(z: Tensor, given: LossOptions) -> Tensor:
        if _divides_memory(ranks, batch, memory.bank, loss):
            value, counted = of_own(z, given)
        else:
            value, counted = ops.memory_loss_and_pairs(z, batch.labels, *bank, loss, **given)
        if pairs is not None:
            pairs.copy_(counted)
        return value

    against_itself = ops.batch_loss
    if shared_batch_loss.is_worth_it(ranks, batch):
        against_itself = partial(shared_batch_loss.batch_loss, ranks, batch, memory.temperature)
    return ops.losses_of(
        memory, z, batch.labels, loss, against, against_itself, mask=batch.mask, ids=batch.ids, slots=slots, **options
    )


def memory_loss(
    ranks: Ranks, z: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, loss: PairLoss, learned: Tensor | None,
    options: LossOptions,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss of the anchors of all ranks against a bank, and the pairs `[2]`, from those of this rank. Its gradient
    is that of these, but of a learned temperature the whole.

    What is exchanged depends on nothing in which ranks may differ, as whether one of them needs a gradient.
    """
    temperature = getattr(loss, "temperature", None)
    loss, ranking = fold_temperature(loss, z)
    anchors = options.get("anchors")
    need_grad = needs_grad(ranking) or learned is not None
    sums = z.new_zeros(1, 2, len(z), 4, dtype=torch.float64)
    grads = torch.zeros_like(z, memory_format=torch.contiguous_format).repeat(2, 1, 1)
    given = None
    for number, slots in enumerate(loss.passes):
        of_pass, grads_of_pass = ops.memory_sums(
            ranking, labels, bank, bank_labels, loss, number=number, given=given, need_grad=need_grad, **options
        )
        for slot in slots:
            sums[0, slot] = of_pass[slot]
            if need_grad:
                grads[slot] = grads_of_pass[slot]
        given, scale, totals = ops.settle_sums(sums, loss, number + 1, anchors)

    totals = ranks.total(totals)
    value, count, in_all = totals[:2], totals[2:4], totals[4:]
    average = 1 / count.clamp(min=1)
    pairs = in_all[1:] / in_all[0].clamp(min=1)
    result = (average * value).sum().to(z.dtype)
    if not need_grad:
        return result, pairs
    in_two_groups = isinstance(loss, Contrastive) and loss.reduction != "mean"
    factor = (scale[0] * (average if in_two_groups else average[:1])[:, None]).to(z.dtype)[..., None]
    grad = torch.where(factor == 0, 0, factor * grads).sum(0)
    grad = torch.where(ranking.isfinite().all(1, keepdim=True), grad, torch.nan)
    if not isinstance(temperature, Tensor):
        return with_gradient(result, z, grad), pairs
    # What ranks is z / temperature.
    value = with_gradient(result, z, grad / temperature.detach().to(z.dtype))
    if learned is None:
        return value, pairs
    by_temperature = -ranks.total((grad.double() * ranking.double()).sum()) / temperature.detach().double()
    return value + with_gradient(torch.zeros_like(result), temperature, by_temperature.to(temperature.dtype)), pairs
