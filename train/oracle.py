"""A memory that is never stale, `--method oracle`: before each step all of its rows are embedded again.

It says how much there is to gain by following the network, and so how much of that a method gets. A step takes as long
as embedding the whole memory does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xbn_ext import CrossBatchMemory

from .model import Embedder, without_traces

CHUNK = 256
"""Images embedded at a time.

A network that normalises by the statistics of a batch normalises by theirs, which are near those of all images. By its
own, each past batch would have its few classes around its own mean, and not where they are beside others.
"""


class Oracle:
    """Keeps the very pixels of what is in the memory, [memory_size, 3, H, W] uint8, or features [memory_size, F]."""

    def __init__(self, memory_size: int, device: torch.device) -> None:
        self.memory_size, self.device = memory_size, device
        self.images: Tensor | None = None
        """By slots of the memory; None before the first batch."""

    def before_step(self, model: Embedder, criterion: CrossBatchMemory, images: Tensor, embeddings: Tensor) -> None:
        """To be called before the criterion is, with its batch: images [B, *] and their embeddings [B, D]."""
        self._refresh(model, criterion)
        self._record(criterion, images, embeddings)

    def _refresh(self, model: Embedder, criterion: CrossBatchMemory) -> None:
        """Make the rows of the memory what the network, in training mode, makes of their images now."""
        count = int(criterion.count)
        if self.images is None or not count:
            return
        for slots in torch.arange(count, device=self.device).tensor_split(-(-count // CHUNK)):
            with without_traces(model):
                rows = F.normalize(model(self.images[slots]), dim=1)
            finite = rows.isfinite().all(dim=1)  # the others stay what they were
            criterion.bank[slots[finite]] = rows[finite]

    def _record(self, criterion: CrossBatchMemory, images: Tensor, embeddings: Tensor) -> None:
        """Keep the images of the rows that the criterion is going to store: those of finite embeddings."""
        stored = images[embeddings.isfinite().all(dim=1)]
        if self.images is None:
            self.images = stored.new_zeros(self.memory_size, *images.shape[1:])
        slots = (int(criterion.head) + torch.arange(len(stored), device=self.device)) % self.memory_size
        self.images[slots] = stored

    def state_dict(self) -> dict[str, Any]:
        """The images, for a checkpoint."""
        return {"images": self.images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over those of a checkpoint."""
        self.images = None if state["images"] is None else state["images"].to(self.device)
