"""What an op may do on a device: how much at a time, which numbers it may look at, in which precision."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from .._autograd import without_autocast
from .._devices import has_float64

# Elements of a chunk of similarities or rows: on a CPU for its caches, elsewhere so that a call is worth its launch.
CHUNK_ON_CPU, CHUNK_ELSEWHERE = 1 << 20, 1 << 23
FEWEST_ROWS = 64

P = ParamSpec("P")
R = TypeVar("R")


def exact(op: Callable[P, R]) -> Callable[P, R]:
    """Autocast, which does not touch what a kernel computes, would round the products of a plain op; autograd would
    refuse to write a state that requires a gradient, in the middle of the op. A device without float64 has no ops."""

    @functools.wraps(op)
    def without(*args: P.args, **options: P.kwargs) -> R:
        device = next((t.device for t in (*args, *options.values()) if isinstance(t, Tensor)), torch.device("cpu"))
        if not has_float64(device):
            raise RuntimeError(
                f"{op.__name__}: {device} has no float64, which statistics are of: move the tensors to the CPU. A "
                "CrossBatchMemory does that by itself"
            )
        with torch.no_grad(), without_autocast(device.type):
            return op(*args, **options)

    return without


def rows_of_a_chunk(device: torch.device, columns: int) -> int:
    """How many rows of so many numbers are taken at a time."""
    elements = CHUNK_ON_CPU if device.type == "cpu" else CHUNK_ELSEWHERE
    return max(elements // max(columns, 1), FEWEST_ROWS)


def reads(device: torch.device) -> bool:
    """Whether looking at a number that is there costs no wait."""
    return device.type == "cpu"


def filled_rows(count: Tensor | None, M: int) -> tuple[int, Tensor | None]:
    """How many of M rows to look at, and the number `[]` from which on these do not exist (None: they all do). A count
    that is not on the CPU is not looked at, so that nothing waits for it."""
    if count is None:
        return M, None
    return (int(count), None) if reads(count.device) else (M, count)


def is_finite(z: Tensor) -> Tensor:
    """`[B]` bool, of the rows of `z [B, D]`."""
    return z.isfinite().all(dim=1)
