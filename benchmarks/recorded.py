"""Rows of a trained network, from a file."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile, is_zipfile

import numpy as np
import torch
from torch import Tensor

DISTURBANCE = 0.02  # of each number of a row of unit length


class Recorded:
    """The rows of an .npz file with `rows [n, D]` and `labels [n]`; of unit length, float32. Batches are of the rows
    themselves. A memory, which holds older ones, is of disturbed rows; where it is larger than the file, of repeated
    ones, each repetition with classes of its own.

    Raises:
        ValueError: the file cannot be read, or has something else in it; the message starts with its path.
    """

    def __init__(self, file: str, device: str = "cpu") -> None:
        rows, labels = _read(file)
        self.rows = rows.to(device)
        names, self.labels = labels.to(device).unique(return_inverse=True)  # from 0 on
        self.classes = len(names)

    def batch(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """Four rows a class where there are, one after the other, in an order of the seed; again from the first on if
        the file has fewer than n."""
        generator = torch.Generator(self.rows.device).manual_seed(seed)
        order = self._permutation(len(self.rows), generator)
        order = order[self.labels[order].argsort(stable=True)]  # by classes
        labels = self.labels[order]
        place = torch.arange(len(order), device=order.device) - torch.searchsorted(labels, labels)
        _, four = (labels * len(order) + place // 4).unique(return_inverse=True)
        turn = self._permutation(int(four.max()) + 1, generator)
        order = order[turn[four].argsort(stable=True)]
        chosen = order[torch.arange(n, device=order.device) % len(order)]
        return self.rows[chosen], self.labels[chosen]

    def memory(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(self.rows.device).manual_seed(seed)
        order = self._permutation(len(self.rows), generator)
        place = torch.arange(n, device=order.device)
        chosen = order[place % len(order)]
        rows = torch.randn(n, self.rows.shape[1], generator=generator, device=order.device).mul_(DISTURBANCE)
        return rows.add_(self.rows[chosen]), self.labels[chosen] + place // len(order) * self.classes

    def _permutation(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randperm(n, generator=generator, device=self.rows.device)


def _read(file: str) -> tuple[Tensor, Tensor]:
    try:
        with Path(file).open("rb") as stream:
            if not is_zipfile(stream):
                raise ValueError("it is not an .npz file")
            stream.seek(0)
            arrays = dict(np.load(stream, allow_pickle=False))
        for name in ("rows", "labels"):
            if name not in arrays:
                raise ValueError(f"it has no array {name}")
        rows, labels = arrays["rows"], arrays["labels"]
        if rows.ndim != 2 or rows.dtype.kind != "f" or 0 in rows.shape:
            raise ValueError(f"rows must be floating-point numbers [n, D], not {rows.dtype} {list(rows.shape)}")
        if labels.shape != rows.shape[:1] or labels.dtype.kind not in "iu":
            raise ValueError(f"labels must be whole numbers [{len(rows)}], not {labels.dtype} {list(labels.shape)}")
        norm = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
        if not np.isfinite(norm).all():
            raise ValueError("rows must be finite")
        if not norm.all():
            raise ValueError("no row may be all zeros")
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    except (ValueError, BadZipFile, EOFError) as error:
        raise ValueError(f"{file}: {error}") from None
    return torch.from_numpy((rows / norm).astype(np.float32)), torch.from_numpy(labels.astype(np.int64))
