"""What is measured: shapes, loss and data of one row of a table. Letters: B batch, M bank rows, D dimension."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xbn_ext.dtypes import MEMORY_DTYPES, compute_dtype
from xbn_ext.filter import Drift
from xbn_ext.losses import PairLoss

from .comparisons import COMPARISONS
from .rows import Source, source

KERNELS = ("moments", "transform", "enqueue", "loss", "step")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in MEMORY_DTYPES}
COLD_BYTES = 512e6  # banks of a sample together: ten times the second-level cache of an H100


@dataclass(frozen=True)
class Problem:
    """A full memory and batches for it: unit embeddings with a realistic number of classes, and a realistic share of
    negatives above the margin, `density`; or those of a trained network, of the file `rows`.

    `dtype` is the bank's; the embeddings are float64 if it is, else float32. `drift` is of a step; `loss` of a step and
    of the loss.
    """

    kernel: str = "step"
    batch: int = 64
    memory: int = 65536
    dim: int = 512
    classes: int = 11318  # SOP's training classes
    loss: str = "contrastive"
    drift: Drift = "axbn"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    density: float = 0.01  # a trained network has 0.6 to 1.8 %
    rows: str | None = None

    @property
    def compute(self) -> torch.dtype:
        return compute_dtype(self.dtype)

    @property
    def pair_loss(self) -> PairLoss:
        return COMPARISONS[self.loss].loss

    @property
    def cold_copies(self) -> int:
        """How many banks to go through in turn, so that a GPU's caches never hold the next one."""
        return 1 if self.device == "cpu" else math.ceil(COLD_BYTES / (self.memory * self.dim * self.dtype.itemsize))

    def embeddings(self, rows: int, seed: int) -> tuple[Tensor, Tensor]:
        """A batch: unit rows `[rows, D]` and labels `[rows]`, 4 rows a class, as a P×K sampler gives."""
        return self._normalized(*self._source.batch(rows, seed))

    def round(self, number: int) -> tuple[Tensor, Tensor]:
        """The batch of a timed round."""
        return self.embeddings(self.batch, seed=100 + number)

    def stored(self) -> tuple[Tensor, Tensor]:
        """`bank [M, D]` and `bank_labels [M]` before the first step, as they are given to a memory."""
        return self._normalized(*self._source.memory(self.memory, seed=1))

    def bank(self) -> tuple[Tensor, Tensor]:
        """The same in the bank's dtype."""
        rows, labels = self.stored()
        return rows.to(self.dtype), labels

    def target(self) -> tuple[Tensor, Tensor]:
        """`mean [D]`, `std [D]` in the filter before the first step: near the bank's moments, not the same, so that a
        bank that is moved there has as many active pairs."""
        rows, _ = self._normalized(*self._source.memory(8192, seed=3))
        std, mean = torch.std_mean(rows.double(), 0, correction=0)
        ramp = torch.linspace(-1, 1, self.dim, dtype=torch.float64, device=self.device)
        return (mean + 0.1 * ramp * std).to(self.compute), (std * (1 + 0.05 * ramp)).to(self.compute)

    @property
    def _source(self) -> Source:
        return source(self.dim, self.classes, self.density, self.rows, self.device)

    def _normalized(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(rows.to(self.compute), dim=1), labels


@dataclass(frozen=True)
class BankProblem:
    """A batch of 4 rows a class against a bank in which one class may hold a `majority` and the others share the rest.

    Embeddings are as alike as those of a network early in training: similarities are about 0.7 within a class and 0.48
    to others, so that every loss with its default parameters has something to pay for.
    """

    batch: int
    memory: int
    dim: int
    classes: int
    majority: float = 0.0

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`z [B, D]`, `labels [B]`, `bank [M, D]`, `bank_labels [M]`."""
        generator = torch.Generator().manual_seed(1)
        labels = torch.arange(self.batch) // 4 % self.classes
        rows = torch.arange(self.memory)
        largest = round(self.majority * self.memory)
        bank_labels = rows % self.classes if largest == 0 else 1 + (rows - largest) % max(self.classes - 1, 1)
        bank_labels[:largest] = 0
        bank_labels = bank_labels[torch.randperm(self.memory, generator=generator)]
        common = torch.randn(self.dim, generator=generator)
        centres = torch.randn(self.classes, self.dim, generator=generator)

        def rows_of(labels: Tensor) -> Tensor:
            noise = torch.randn(len(labels), self.dim, generator=generator)
            return F.normalize(0.48**0.5 * common + 0.22**0.5 * centres[labels] + 0.3**0.5 * noise, dim=1)

        return rows_of(labels), labels, rows_of(bank_labels), bank_labels
