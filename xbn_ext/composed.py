"""A training step of a memory put together from ops, where `step_`, one op for all of it, will not do: for losses that
it does not know, and for several processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from . import ops
from ._autograd import without_autocast
from .distributed import Batch
from .filter import Filter
from .losses import AnyLoss
from .options import LossOptions
from .state import flat
from .stored import Stored

Losses = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""The loss of a step, from the normalised batch `[N, D]`, the slots `[N]` in which it has been stored, if it has, and
`[2]` to be written: the pairs."""


def step_(
    memory: Any,
    batch: Batch,
    losses: Losses,
    *,
    filter: Filter | None,
    update: Literal["inplace", "deferred"],
    enqueue: Literal["after", "before"],
    normalize_embeddings: bool,
    eps: float,
) -> Tensor:
    """As `ops.step_` with these losses.

    Args:
        batch: its embeddings float32 or float64.
    """
    with without_autocast(batch.embeddings.device.type):
        z = ops.normalize(batch.embeddings, eps) if normalize_embeddings else batch.embeddings
        stored = Stored(memory)
        _track(memory, z.detach(), batch.mask, filter, eps)
        if filter is not None:
            stored.follow(update, eps)
        slots = None
        if enqueue == "before":
            slots = stored.enqueue(z.detach(), batch)
        memory.pairs.fill_(torch.nan)
        value = losses(z, slots, memory.pairs)
        if enqueue == "after":
            stored.enqueue(z.detach(), batch)
        stored.settle()
        flat(memory.step).add_(1)
    return value


def loss_of(memory: Any, batch: Batch, losses: Losses, *, normalize_embeddings: bool, eps: float) -> Tensor:
    """As `ops.loss_of` with these losses."""
    with without_autocast(batch.embeddings.device.type):
        z = ops.normalize(batch.embeddings, eps) if normalize_embeddings else batch.embeddings
        return losses(z, None, None)


def _track(memory: Any, z: Tensor, mask: Tensor | None, filter: Filter | None, eps: float) -> None:
    """Where the memory is to go; without a filter the drift is only measured."""
    target = (memory.target_mean, memory.target_std, memory.variance, memory.scale, memory.shift)
    if filter is None:
        target = tuple(t.clone() for t in target)
    noises = filter or Filter(float("inf"), 1.0, None)
    ops.track_(*target, z, mask, memory.sums, memory.count, *noises, eps, memory.drift_stats, memory.innovation)


def losses_by_ops(memory: Any, batch: Batch, loss: AnyLoss, **options: Any) -> Losses:
    """By an op for the memory and one for the batch; `options` are those of `ops.losses_of`."""

    def losses(z: Tensor, slots: Tensor | None, pairs: Tensor | None) -> Tensor:
        def against(z: Tensor, given: LossOptions) -> Tensor:
            value, counted = ops.memory_loss_and_pairs(z, batch.labels, memory.bank, memory.bank_labels, loss, **given)
            if pairs is not None:
                pairs.copy_(counted)
            return value

        return ops.losses_of(
            memory, z, batch.labels, loss, against, mask=batch.mask, ids=batch.ids, slots=slots, **options
        )

    return losses
