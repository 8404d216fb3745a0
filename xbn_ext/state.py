"""`StatefulModule`: a module whose tensors are its state, and not its buffers; `MemoryState`: those of a memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from . import checks
from .dtypes import compute_dtype, holds
from .shards import Shards


class StatefulModule(nn.Module):
    """A module with tensors that are in `state_dict()`, move with `.to()` and are copied with the module, but that
    `named_buffers()` does not list.

    What wraps a model takes its buffers for something like weights: DistributedDataParallel overwrites those of all
    ranks with rank 0's, weight averaging averages them, FSDP casts them. Labels, counters and a ring of embeddings
    would not survive that.

    A state tensor is an attribute of the module. It is written in place, so its address changes only when the module is
    moved or loaded with `assign=True`; it keeps its dtype whatever the module is cast to.
    """

    def __init__(self) -> None:
        super().__init__()
        self._persistent: dict[str, bool] = {}  # of each state tensor, by name: whether state_dict() has it

    def register_state(self, name: str, tensor: Tensor, persistent: bool = True) -> None:
        """Adds a state tensor as the attribute `name`. One that is not persistent is a measurement: floating point, not
        in `state_dict()`, and NaN where there is nothing that it was measured on.

        Raises KeyError, as for a buffer, if the module has an attribute of that name.
        """
        if hasattr(self, name):
            raise KeyError(f"attribute {name!r} already exists")
        setattr(self, name, tensor)
        self._persistent[name] = persistent

    def __setattr__(self, name: str, value: Any) -> None:
        """State may be replaced by a tensor of its shape, as `torch.func.functional_call` does, and by nothing else: a
        step would find it with the memory half moved. An attribute `step` of a subclass would replace it, too."""
        if name in self.__dict__.get("_persistent", ()):
            its = f"{name} is state of {type(self).__name__} and must be"
            if not isinstance(value, Tensor):
                raise TypeError(f"{its} a tensor, got {checks.kind(value)}")
            own = self.__dict__.get(name, value)
            if value.shape != own.shape:
                raise ValueError(f"{its} {list(own.shape)}, got {list(value.shape)}")
        super().__setattr__(name, value)

    def named_state(self, persistent: bool | None = None) -> Iterator[tuple[str, Tensor]]:
        """The state tensors; only those that are persistent, or only those that are not, if that is given."""
        for name, is_persistent in self._persistent.items():
            if persistent is None or persistent == is_persistent:
                yield name, getattr(self, name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StatefulModule:
        """Moves parameters, buffers and state, but keeps their dtypes: `.half()` must not round statistics."""

        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        if recurse:
            for child in self.children():
                child._apply(fn)
        super()._apply(move, recurse=False)
        for name, tensor in self.named_state():
            setattr(self, name, move(tensor))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.named_state(persistent=True):
            destination[prefix + name] = self._whole(name, tensor if keep_vars else tensor.detach())

    def _whole(self, name: str, tensor: Tensor) -> Tensor:
        """What a state tensor is in `state_dict()`: of a subclass that has a part of it, the whole."""
        return tensor

    def _is_known(self, name: str, value: Any) -> bool:
        """Whether that may be loaded, as far as its kind goes."""
        return checks.is_dense(value)

    def _own(self, name: str, tensor: Tensor) -> Tensor:
        """The part of it that this module has."""
        return tensor

    def _shape(self, name: str) -> torch.Size:
        """Its shape."""
        return getattr(self, name).shape  # type: ignore[no-any-return]

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        """Takes all of the state or, if the dictionary has nothing of it, none. If it has a part of it, or a tensor is
        of another shape, would be rounded, or is impossible, that is an error, and the state stays as it is.

        `assign=True` replaces the tensors by copies: what is written in place must not be shared with the dictionary.
        """
        assign = metadata.get("assign_to_params_buffers", False)
        foreign: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, foreign, errors)  # hooks go first
        unexpected.extend(key for key in foreign if not self._persistent.get(key.removeprefix(prefix)))
        state = {name: state_dict[prefix + name] for name, _ in self.named_state(True) if prefix + name in state_dict}
        if not state:
            missing.extend(prefix + name for name, _ in self.named_state(persistent=True))
            return
        faults = list(self._faults_of(state, assign))
        if not faults:
            state = {name: self._own(name, t) for name, t in state.items()}
            own = dict(self.named_state(persistent=True))
            if not any(map(_is_empty, (*state.values(), *own.values()))):
                faults = list(self._impossible({name: t.to(own[name].dtype) for name, t in state.items()}))
        errors.extend(f"{prefix}{fault}; nothing of the state was loaded" for fault in faults)
        if not faults:
            self._take(state, assign)

    @torch.no_grad()
    def _take(self, state: Mapping[str, Tensor], assign: bool) -> None:
        for name, own in self.named_state():
            if assign:
                with torch.inference_mode(False):  # else it could not be written outside that mode
                    own = torch.empty_like(own, device=next(iter(state.values())).device)
                setattr(self, name, own)
            if name in state:
                own.copy_(state[name])
            else:
                own.fill_(torch.nan)

    def _faults_of(self, state: Mapping[str, Any], assign: bool) -> Iterator[str]:
        """What is wrong with tensors that are to become the state."""
        own = dict(self.named_state(persistent=True))
        absent = [name for name in own if name not in state]
        if absent:
            yield f"{', '.join(absent)}: missing from the state"
            return
        sound = True
        for name, new in state.items():
            if not self._is_known(name, new):
                fault = f"must be a tensor, got {checks.kind(new)}"
            elif new.shape != self._shape(name):
                place = f"{self._get_name()}({self.extra_repr()})"
                fault = f"must be {list(self._shape(name))} for {place}, got {list(new.shape)}"
            elif not holds(own[name].dtype, new.dtype):
                fault = f"is {new.dtype} and would be rounded to {own[name].dtype}"
            elif _is_empty(new) and not (assign or _is_empty(own[name])):
                fault = "holds no values: it is on the meta device, or fake"
            else:
                continue
            sound = False
            yield f"{name} {fault}"
        if not sound:
            return
        devices = sorted({str(new.device) for new in state.values()})
        if assign and len(devices) > 1:
            yield f"state must be on one device to be assigned, got {', '.join(devices)}"
        elif not assign and any(t.is_meta for _, t in self.named_state()):
            yield "state is on the meta device: load with assign=True, or call to_empty() first"

    def _impossible(self, state: Mapping[str, Tensor]) -> Iterator[str]:
        """What a subclass says of values that no state of its own has, of the dtypes that they are kept in. Not called
        for meta and fake tensors."""
        yield from ()


# Of a new memory. A subclass may have more.
FRESH = {
    "bank": 0, "bank_labels": 0, "bank_ids": 0, "bank_steps": 0, "sums": 0, "head": 0, "count": 0, "scale": 1,
    "shift": 0, "target_mean": 0, "target_std": 0, "variance": math.inf, "step": 0, "pairs": math.nan,
    "drift_stats": math.nan, "stored_steps": math.nan,
}  # fmt: skip
# Of these a rank has a block, where several hold the memory between them: m rows instead of M.
IN_BLOCKS = ("bank", "bank_labels", "bank_ids", "bank_steps")


class MemoryState(StatefulModule):
    """The state of a `CrossBatchMemory`, and how it is read: M rows of D dimensions and what is known of them, as
    `FRESH` at first."""

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
    step: Tensor  # [] int64, training steps taken
    pairs: Tensor  # [2] of the last step, for stats(); not in state_dict()
    drift_stats: Tensor  # [3] likewise
    stored_steps: Tensor  # [] likewise, the sum of all bank_steps; only of a memory in blocks

    memory_size: int  # M
    _shards = Shards()
    _first = 0  # of the own block's slots

    def _register_memory(self, M: int, D: int, memory_dtype: torch.dtype, shards: Shards) -> None:
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
        return self.bank_labels[: int(self._stored(self.count))].clone()

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
    def reset_queue(self) -> None:
        """Empties the memory and forgets the drift and the warm-up: the state of a new module."""
        for name in self._fresh():
            flat(getattr(self, name)).fill_(FRESH[name])

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
        for name in ("sums", "scale", "shift", "target_mean", "target_std"):
            if not state[name].isfinite().all():
                yield f"{name} must be finite"
        if not state["bank"][: max(count - self._first, 0)].isfinite().all():
            yield "bank must be finite"
        if (state["scale"] == 0).any():
            yield "scale must not be 0"
        if (state["target_std"] < 0).any():  # a sum of squares may be, by what rounding leaves of rows that have left
            yield "target_std must not be negative"


def _is_empty(t: Tensor) -> bool:
    """A shape without values: on the meta device, or a fake tensor of another one."""
    return t.is_meta or isinstance(t, FakeTensor)


def flat(t: Tensor) -> Tensor:
    """A view to write through: compiled (torch 2.13, CPU), what is written to a float64 scalar as such is lost."""
    return t.view(-1)


def number_in(tensor: Tensor, default: float) -> float:
    """Its one number, or the default where it has none."""
    try:
        return float(tensor.detach())
    except RuntimeError:  # it is on the meta device, or a fake one
        return default
