"""A memory of the embeddings of the present network."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import ops
from .distributed import Batch
from .dtypes import is_narrow
from .state import FRESH, MemoryState, flat


def fill(memory: MemoryState, batches: Iterator[Batch], follows: bool, normalizes: bool, eps: float) -> None:
    """Replaces what is stored with the batches. If they raise, the memory stays as it was: a copy is filled first.

    Args:
        follows: whether there is a filter: the moments of what was stored become its target, taken as exact.
        normalizes: whether embeddings are L2-normalised first, with `eps`.
    """
    filled = object.__new__(MemoryState)  # whatever the memory's own class is, or has been wrapped in
    filled.__dict__.update(memory.__dict__)
    for name in FRESH:
        setattr(filled, name, torch.empty_like(getattr(memory, name)))
    filled.reset_queue()
    filled.step.copy_(memory.step)
    for embeddings, labels, _, ids, *_ in batches:
        z = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
        if normalizes:
            z = ops.normalize(z, eps)
        if follows and is_narrow(filled.bank.dtype) and filled.count == 0:
            mean, std, _ = ops.moments(z)
            filled.shift.copy_(mean)
            filled.scale.copy_(torch.where(std < eps, 1.0, std))
        ops.enqueue_(
            filled.bank, filled.bank_labels, filled.sums, filled.head, filled.count, z, labels, None, filled.scale,
            filled.shift, bank_ids=filled.bank_ids, ids=ids, bank_steps=filled.bank_steps, step=filled.step,
        )  # fmt: skip
    if follows and int(filled.count) >= 2:
        mean, std, _ = ops.moments(filled.embedding_memory)
        filled.target_mean.copy_(mean)
        filled.target_std.copy_(std)
        flat(filled.variance).zero_()
    for name in FRESH:
        if name != "step":  # training may have gone on while the batches were made
            flat(getattr(memory, name)).copy_(flat(getattr(filled, name)))
