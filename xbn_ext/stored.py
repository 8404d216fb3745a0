"""`Stored`: how a step writes the rows of a memory. This process has all of them, or a block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops
from .distributed import Batch
from .state import flat


class Stored:
    """The stored rows of a memory, from a step's first change of them to `settle`, by which the sums of all blocks are
    known again. In between, nothing may read `sums`."""

    def __init__(self, memory: Any) -> None:
        self._memory, self._shards = memory, memory._shards
        self._recounted = self._moved = memory.sums
        if self._shards.size > 1:
            self._recounted = torch.full_like(memory.sums, torch.nan)  # of the block, if its rows are rewritten
            self._moved = torch.zeros_like(memory.sums)  # by what enters it and what leaves

    def follow(self, update: str, eps: float) -> None:
        """Applies the pending map, or sees to it that it may go on pending."""
        m = self._memory
        count, ring = m.count, {}
        if self._shards.size > 1:
            count, ring = m._stored(count), {"ring_sums": m.sums, "ring_count": m.count}
        if update == "inplace":
            ops.transform_(m.bank, self._recounted, m.scale, m.shift, count)
        else:
            ops.standardize_(m.bank, self._recounted, m.scale, m.shift, count, eps, **ring)

    def enqueue(self, z: Tensor, batch: Batch) -> Tensor:
        """`[N]` the slots that the rows of a batch of all ranks went to. Its mask says which may."""
        m = self._memory
        return ops.enqueue_(
            m.bank, m.bank_labels, self._moved, m.head, m.count, z, batch.labels, batch.mask, m.scale, m.shift,
            bank_ids=m.bank_ids, ids=batch.ids, bank_steps=m.bank_steps, step=m.step, first=m._first,
            ring_size=m.memory_size,
        )  # fmt: skip

    def settle(self) -> None:
        """Exchanges what the blocks have counted."""
        m = self._memory
        if self._shards.size == 1:
            return
        steps = m.bank_steps.sum().double().expand(1, m.sums.shape[1])
        recounted, moved, steps = self._shards.total(torch.cat([self._recounted, self._moved, steps])).split([2, 2, 1])
        m.sums.copy_(torch.where(recounted.isnan(), m.sums, recounted) + moved)
        flat(m.stored_steps).copy_(steps[0, :1])
