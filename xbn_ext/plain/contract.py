"""What an op asks of its arguments, where it is not compiled: `csrc/glue/contract.h` in Python, with the same messages.

Every op begins with its checks, so that nothing is written on bad input. Only shapes, dtypes, devices and layouts are
looked at, and on a CPU the values of counters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..checks import MEMORY_DTYPE_NAMES, is_dense, kind, shares_memory
from ..dtypes import MEMORY_DTYPES
from . import chunks


def check(ok: bool, message: str) -> None:
    if not ok:
        raise RuntimeError(message)


class Contract:
    """Checks the tensors of one call of one op, all on the device of the first."""

    def __init__(self, op: str, first: Tensor) -> None:
        self.op, self.first = op, first

    def shape(self, name: str, t: Tensor, words: str, sizes: Sequence[int | None]) -> None:
        """`sizes` as numbers, None for any; `words` name them."""
        self.given(name, t)
        same = t.dim() == len(sizes) and all(want in (None, got) for want, got in zip(sizes, t.shape, strict=True))
        described = f" ({', '.join('any' if size is None else str(size) for size in sizes)})" if sizes else ""
        check(same, f"{self.op}: {name} must be {words}{described}, got {list(t.shape)}")
        check(t.device == self.first.device, f"{self.op}: {name} is on another device than the other arguments")

    def given(self, name: str, t: Any) -> None:
        """Where a tensor is required, torch passes None on. It knows that there is no kernel for a sparse one."""
        check(t is not None, f"{self.op}: {name} must be a tensor, got None")
        check(is_dense(t), f"{self.op}: {name} must be dense, got {kind(t)}")

    def dtype(self, name: str, t: Tensor, expected: torch.dtype, word: str) -> None:
        check(t.dtype == expected, f"{self.op}: {name} must be {word}, got {t.dtype}")

    def floating(self, name: str, t: Tensor) -> None:
        self.given(name, t)
        ok = t.dtype in (torch.float32, torch.float64)
        check(ok, f"{self.op}: {name} must be float32 or float64, got {t.dtype}")

    def contiguous(self, name: str, t: Tensor) -> None:
        check(t.is_contiguous(), f"{self.op}: {name} must be contiguous")

    def columns(self, name: str, t: Tensor, words: str, sizes: Sequence[int | None]) -> None:
        self.shape(name, t, words, sizes)
        check(t.shape[1] > 0, f"{self.op}: {name} must have at least one column")

    def matrix(self, name: str, t: Tensor, words: str, sizes: Sequence[int | None]) -> None:
        """Embeddings."""
        self.floating(name, t)
        self.columns(name, t, words, sizes)

    def bank(self, name: str, t: Tensor, D: int | None = None) -> None:
        self.given(name, t)
        ok = t.dtype in MEMORY_DTYPES
        check(ok, f"{self.op}: {name} must be {MEMORY_DTYPE_NAMES}, got {t.dtype}")
        self.columns(name, t, "[M, D]", (None, D))
        self.contiguous(name, t)

    def labels(self, name: str, t: Tensor, words: str, n: int) -> None:
        self.shape(name, t, words, (n,))
        self.dtype(name, t, torch.int64, "int64")

    def rows_mask(self, name: str, t: Tensor | None, n: int, words: str = "[B]") -> None:
        if t is not None:
            self.shape(name, t, words, (n,))
            self.dtype(name, t, torch.bool, "bool")

    def statistic(self, name: str, t: Tensor, words: str, sizes: Sequence[int | None]) -> None:
        self.shape(name, t, words, sizes)
        self.dtype(name, t, torch.float64, "float64")
        self.contiguous(name, t)

    def counter(self, name: str, t: Tensor) -> None:
        self.shape(name, t, "a scalar", ())
        self.dtype(name, t, torch.int64, "int64")

    def value(self, name: str, t: Tensor, last: int) -> None:
        """Of a counter, within [0, last]: looked at where that costs no wait."""
        if chunks.reads(t.device):
            got = int(t)
            check(0 <= got <= last, f"{self.op}: {name} must be within [0, {last}], got {got}")

    def eps(self, eps: float) -> None:
        check(isinstance(eps, Real), f"{self.op}: eps must be a number, got {type(eps).__name__}")
        if not 1e-30 <= eps <= 1e30:  # as in `parse_loss`, no text unless it is raised
            raise RuntimeError(f"{self.op}: eps must be positive, within [1e-30, 1e30], got {eps:g}")


def apart(op: str, written: Mapping[str, Tensor | None], read: Mapping[str, Tensor | None]) -> None:
    """What an op writes shares no memory with what it reads, nor with anything else that it writes. All are dense."""

    others = [(name, t) for name, t in read.items() if t is not None]
    for name, t in written.items():
        if t is None:
            continue
        for other, its in others:
            first, second = (name, other) if other in written and other not in read else (other, name)
            check(not shares_memory(t, its), f"{op}: {first} must not share memory with {second}")
        others.append((name, t))


def dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
