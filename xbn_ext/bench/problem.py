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
