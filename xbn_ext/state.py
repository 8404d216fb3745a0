"""`MemoryState`: the tensors that a memory is made of, how they are read, and what they say of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from . import distributed
from ._devices import has_float64
from .collectives import is_own
from .dtypes import compute_dtype
from .filter import Filter
from .shards import Shards
from .stateful import StatefulModule
from .unlabelled import as_given

# Of a new memory. A subclass may have more.
FRESH = {
    "bank": 0, "bank_labels": 0, "bank_ids": 0, "bank_steps": 0, "sums": 0, "head": 0, "count": 0, "scale": 1,
    "shift": 0, "target_mean": 0, "target_std": 0, "variance": math.inf, "innovation": 0, "step": 0,
    "pairs": math.nan, "drift_stats": math.nan, "stored_steps": math.nan,
}  # fmt: skip
# Of these a rank has a block, where several hold the memory between them: m rows instead of M.
IN_BLOCKS = ("bank", "bank_labels", "bank_ids", "bank_steps")


class MemoryState(StatefulModule):
    """The state of a `CrossBatchMemory`, and how it is read: M rows of D dimensions and what is known of them, as
    `FRESH` at first.

    A device without float64 cannot hold it: a module that is moved there stays on the CPU, with its parameters, and is
    called with tensors of that device.
    """

    bank: Tensor  # [M, D] ring; a row u stands for scale * u + shift
    bank_labels: Tensor  # [M] int64
    bank_ids: Tensor  # [M] int64 of the samples; negative: its own
    bank_steps: Tensor  # [M] int64, the step in which a row was stored
    sums: Tensor  # [2, D] sum and sum of squares of the stored rows
    head: Tensor  # [] int64, next slot to write
    count: Tensor  # [] int64, filled slots
    scale: Tensor  # [D]
    shift: Tensor  # [D]
    target_mean: Tensor  # [D] filtered moments of the embeddings
    target_std: Tensor  # [D]
    variance: Tensor  # [] of the filter, infinite before the first measurement
    innovation: Tensor  # [D] of the mean in the last step in which the filter adapted; before the first, 0
    step: Tensor  # [] int64, training steps taken
    pairs: Tensor  # [2] of the last step, for stats(); not in state_dict()
    drift_stats: Tensor  # [3] likewise
    stored_steps: Tensor  # [] likewise, the sum of all bank_steps; only of a memory in blocks

    memory_size: int  # M
    _added = MappingProxyType({"innovation": 0.0})
    filter: Filter | None  # none: the memory does not follow a drift
    _shards = Shards()
    no_class: int | None = None
    _first = 0  # of the own block's slots
    _stands_for: torch.device | None = None  # the device without float64 that it has been moved to

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MemoryState:
        where = fn(torch.empty(0, device=self.bank.device)).device
        if has_float64(where):
            self._stands_for = None
            super()._apply(fn, recurse)
        else:
            self._stands_for = where
            super()._apply(on_cpu, recurse)
        return self

    def _given_back(self, value: Tensor) -> Tensor:
        """A result where the caller wants it."""
        return value if self._stands_for is None else value.to(self._stands_for)

    def _register_memory(self, M: int, D: int, memory_dtype: torch.dtype, shards: Shards) -> None:
        where = torch.empty(0).device  # in a `with torch.device(…)` block it is that one
        if not has_float64(where):
            self._stands_for = where
            with torch.device("cpu"):
                self._register_memory(M, D, memory_dtype, shards)
            return
        f64, i64 = torch.float64, torch.int64
        self.memory_size = M
        self._shards = shards
        self._first, m = shards.block(M)
        self.register_state("bank", torch.zeros(m, D, dtype=memory_dtype))
        self.register_state("bank_labels", torch.zeros(m, dtype=i64))
        self.register_state("bank_ids", torch.zeros(m, dtype=i64))
        self.register_state("bank_steps", torch.zeros(m, dtype=i64))
        self.register_state("sums", torch.zeros(2, D, dtype=f64))
        self.register_state("head", torch.zeros((), dtype=i64))
        self.register_state("count", torch.zeros((), dtype=i64))
        self.register_state("scale", torch.ones(D, dtype=f64))
        self.register_state("shift", torch.zeros(D, dtype=f64))
        self.register_state("target_mean", torch.zeros(D, dtype=f64))
        self.register_state("target_std", torch.zeros(D, dtype=f64))
        self.register_state("variance", torch.full((), torch.inf, dtype=f64))
        self.register_state("innovation", torch.zeros(D, dtype=f64))
        self.register_state("step", torch.zeros((), dtype=i64))
        self.register_state("pairs", torch.full((2,), torch.nan, dtype=f64), persistent=False)
        self.register_state("drift_stats", torch.full((3,), torch.nan, dtype=f64), persistent=False)
        if shards.size > 1:
            self.register_state("stored_steps", torch.full((), torch.nan, dtype=f64), persistent=False)

    def _fresh(self) -> list[str]:
        """Its tensors of `FRESH`."""
        return [name for name, _ in self.named_state() if name in FRESH]

    def _whole(self, name: str, tensor: Tensor) -> Tensor:
        return self._shards.whole(tensor, self.memory_size) if name in IN_BLOCKS else tensor

    def _is_known(self, name: str, value: Any) -> bool:
        return super()._is_known(name, value) or (name in IN_BLOCKS and hasattr(value, "full_tensor"))

    def _faults_of(self, state: Mapping[str, Any], assign: bool) -> Iterator[str]:
        of_others = [name for name in IN_BLOCKS if hasattr(t := state.get(name), "full_tensor") and not is_own(t)]
        if of_others:
            its = f"{', '.join(of_others)}: the part that another process has, or had"
            yield f"{its}; save it by torch.distributed.checkpoint, or gather it first"
        else:
            yield from super()._faults_of(state, assign)

    def _own(self, name: str, tensor: Tensor) -> Tensor:
        return self._shards.own(tensor) if name in IN_BLOCKS else tensor

    def _shape(self, name: str) -> torch.Size:
        shape = super()._shape(name)
        return torch.Size([self.memory_size, *shape[1:]]) if name in IN_BLOCKS else shape

    def _stored(self, count: Tensor) -> Tensor:
        """How many of the ring's first `count` rows are in the own block: its first ones."""
        return torch.clamp(count - self._first, 0, len(self.bank))

    @property
    def embedding_memory(self) -> Tensor:
        """`[count, D]` the stored rows as they stand now, in slot order: a copy in the memory's dtype, or in float32
        if that has 16 bits. Here and below, where several processes hold the memory between them, those of this one."""
        rows = self.bank[: int(self._stored(self.count))]
        return (rows.double() * self.scale + self.shift).to(compute_dtype(self.bank.dtype))

    @property
    def label_memory(self) -> Tensor:
        """`[count]` labels of `embedding_memory` (a copy)."""
        return as_given(self.bank_labels[: int(self._stored(self.count))].clone(), self.no_class)

    @property
    def id_memory(self) -> Tensor:
        """`[count]` sample ids of `embedding_memory`, -1 for none (a copy)."""
        return self.bank_ids[: int(self._stored(self.count))].clamp(min=-1)

    @property
    def age_memory(self) -> Tensor:
        """`[count]` how many steps ago the rows of `embedding_memory` were stored; 1 is the last step."""
        return self.step - self.bank_steps[: int(self._stored(self.count))]

    @property
    def target_moments(self) -> tuple[Tensor, Tensor]:
        """`(mean [D], std [D])` that the memory is kept at (copies); zeros before the first batch."""
        return self.target_mean.clone(), self.target_std.clone()

    @torch.no_grad()
    def stats(self) -> dict[str, Tensor]:
        """How the memory is doing, as scalars on its device: nothing waits for them until they are read.

        * `fill`: share of the memory that is filled.
        * `age`: steps since the stored rows were stored, on average; 1 is the last step.
        * `positives`, `negatives`: average number of memory rows per anchor that had a weight in the last training
          step: rows outside the margin, mined, or in a triplet that cost something.
        * `gap_before`, `gap_after`: how far the memory's moments were from those of the last batch before and after
          they were moved, `sqrt(|mean - mean|² + |std - std|²)`. Part of it is the noise of a batch.
        * `gain`: the share of the last batch's measurement that the filter took over; 0 if nothing was measured.

        Undefined entries are NaN: all but `fill` before the first step, `age` of an empty memory, pairs without a
        memory loss, gain with `drift="none"`.
        """
        stored_steps = self.stored_steps if self._shards.size > 1 else self.bank_steps.sum()  # 0 where nothing is
        positives, negatives = self.pairs.unbind()
        gap_before, gap_after, gain = self.drift_stats.unbind()
        if self.filter is None:  # the last two are of a map that was not applied
            gap_after, gain = gap_before, torch.full_like(gain, torch.nan)
        return {
            "fill": self.count.double() / self.memory_size,  # not of the default dtype, which may have 16 bits
            "age": (self.step * self.count - stored_steps).double() / self.count,
            "positives": positives.clone(),
            "negatives": negatives.clone(),
            "gap_before": gap_before.clone(),
            "gap_after": gap_after.clone(),
            "gain": gain.clone(),
        }

    @torch.no_grad()
    def reset_queue(self) -> None:
        """Empties the memory and forgets the drift and the warm-up: the state of a new module."""
        for name in self._fresh():
            flat(getattr(self, name)).fill_(FRESH[name])

    def _check_state(self) -> None:
        """Also for a `head` or `count` that has been written out of range, where reading them waits for nothing. Fake
        tensors hold no number."""
        super()._check_state()
        if type(self.count) is not Tensor or not distributed.reads_at_once(self.count):
            return
        for name, most in (("head", self.memory_size - 1), ("count", self.memory_size)):
            value = int(getattr(self, name))
            if not 0 <= value <= most:
                raise RuntimeError(f"{name} must be within [0, {most}], got {value}")

    def _impossible(self, state: Mapping[str, Tensor]) -> Iterator[str]:
        M = self.memory_size
        count, head, step = (int(state[name]) for name in ("count", "head", "step"))
        if not 0 <= count <= M:
            yield f"count must be within [0, {M}], got {count}"
        if not 0 <= head < M:
            yield f"head must be within [0, {M - 1}], got {head}"
        if 0 <= count < M and 0 <= head < M and head != count:
            yield f"head must be count where the memory is not full, got {head} and {count}"
        if step < 0:
            yield f"step must not be negative, got {step}"
        if not state["variance"] >= 0:
            yield f"variance must not be negative or NaN, got {float(state['variance'])}"
        for name in ("sums", "scale", "shift", "target_mean", "target_std", "innovation"):
            if not state.get(name, state["scale"]).isfinite().all():
                yield f"{name} must be finite"
        if not state["bank"][: max(count - self._first, 0)].isfinite().all():
            yield "bank must be finite"
        if (state["scale"] == 0).any():
            yield "scale must not be 0"
        if (state["target_std"] < 0).any():  # a sum of squares may be, by what rounding leaves of rows that have left
            yield "target_std must not be negative"


def on_cpu(t: Tensor) -> Tensor:
    """Where what belongs to a memory stays if that cannot be where it is moved to."""
    return torch.empty_like(t, device="cpu") if t.is_meta else t.cpu()


def flat(t: Tensor) -> Tensor:
    """A view to write through: compiled (torch 2.13, CPU), what is written to a float64 scalar as such is lost."""
    return t.view(-1)
