"""A memory of the embeddings of the present network."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import ops
from .distributed import Batch
from .dtypes import compute_dtype, is_narrow
from .reference import bank_moments
from .state import MemoryState, flat
from .stored import Stored
from .unlabelled import FILLED, apart

SOME_ROWS = 4096  # that are computed in float64 at a time


def fill(
    memory: MemoryState, batches: Iterator[Batch], follows: bool, normalizes: bool, eps: float,
    no_class: int | None = None,
) -> None:  # fmt: skip
    """Replaces what is stored with the batches. If they raise, the memory stays as it was: a copy is filled first. That
    of a 16-bit memory which follows a drift is float32: rows are standardised by the moments of all, since by those of
    the first batch a later row might overflow, and stay out.

    Args:
        follows: whether there is a filter: the moments of what was stored become its target, taken as exact.
        normalizes: whether embeddings are L2-normalised first, with `eps`.
        no_class: the label of rows of no class.
    """
    filled = object.__new__(MemoryState)  # whatever the memory's own class is, or has been wrapped in
    filled.__dict__.update(memory.__dict__)
    for name in memory._fresh():
        setattr(filled, name, torch.empty_like(getattr(memory, name)))
    standardizes = follows and is_narrow(filled.bank.dtype)
    if standardizes:
        filled.__dict__["bank"] = torch.empty_like(filled.bank, dtype=torch.float32)  # an attribute keeps its dtype
    filled.reset_queue()
    filled.step.copy_(memory.step)
    rows = 0
    for batch in batches:
        embeddings = batch.embeddings
        batch = batch._replace(labels=apart(batch.labels, no_class, FILLED + rows))
        rows += len(embeddings)
        z = embeddings.to(compute_dtype(embeddings.dtype))
        if normalizes:
            z = ops.normalize(z, eps)
        stored = Stored(filled)
        stored.enqueue(z, batch)
        stored.settle()
    if standardizes:
        _standardize(filled, memory.bank.dtype, eps)
    if follows and int(filled.count) >= 2:
        mean, std = bank_moments(filled.sums, filled.count)
        filled.target_mean.copy_(filled.scale * mean + filled.shift)
        filled.target_std.copy_(filled.scale * std)
        flat(filled.variance).zero_()
    for name in memory._fresh():
        if name != "step":  # training may have gone on while the batches were made
            flat(getattr(memory, name)).copy_(flat(getattr(filled, name)))


def _standardize(filled: MemoryState, dtype: torch.dtype, eps: float) -> None:
    """Rounds the rows, which stand for themselves, to a narrow dtype, in coordinates of mean 0 and std 1."""
    rows = filled.bank[: int(filled._stored(filled.count))]
    mean, std = bank_moments(filled.sums, filled.count)
    scale = torch.where(std < eps, 1.0, std)
    bank = torch.zeros_like(filled.bank, dtype=dtype)
    for some, rounded in zip(rows.split(SOME_ROWS), bank.split(SOME_ROWS), strict=False):
        rounded[: len(some)].copy_((some.double() - mean) / scale)
    filled.__dict__["bank"] = bank
    stored = Stored(filled)
    stored.follow("inplace", eps)  # by 1 and 0: counts the sums
    stored.settle()
    filled.scale.copy_(scale)
    filled.shift.copy_(mean)
