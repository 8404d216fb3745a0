"""What is timed: one step of a full AXBN memory on random unit embeddings with a realistic number of classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """Shape of one row of the table. Letters as everywhere: B batch rows, M bank rows, D dimension."""

    batch: int = 64
    memory: int = 65536
    dim: int = 512
    classes: int = 11318  # SOP's training classes
    neg_margin: float = 0.5

    def embeddings(self, rows: int, seed: int) -> tuple[Tensor, Tensor]:
        """Unit rows `[rows, D]` and labels `[rows]`: 4 rows a class in a batch, as a P×K sampler gives."""
        generator = torch.Generator().manual_seed(seed)
        x = F.normalize(torch.randn(rows, self.dim, generator=generator), dim=1)
        labels = torch.randint(self.classes, ((rows + 3) // 4,), generator=generator).repeat_interleave(4)[:rows]
        return x, labels

    @property
    def gflop(self) -> float:
        """Both products of the loss, B×M×D each, as dense as eager computes them."""
        return 4 * self.batch * self.memory * self.dim / 1e9


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
