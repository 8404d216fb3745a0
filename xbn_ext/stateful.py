"""`StatefulModule`: a module whose tensors are its state, and not its buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from . import checks
from .dtypes import holds


def keeping_dtypes(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Moves a tensor as fn does, but does not cast it."""

    def move(t: Tensor) -> Tensor:
        moved = _lasting(fn(t))
        return moved if moved.dtype == t.dtype else t.to(moved.device)

    return move


class Loaded(NamedTuple):
    """What a module's part of a dictionary comes to."""

    prefix: str
    """Of the module's names in it."""
    parts: dict[str, Tensor]
    """What may become its state; empty, also if there is nothing of it."""
    faults: list[str]
    assign: bool
    errors: list[str]
    """Of the whole `load_state_dict`, to which those of the module are added."""


class StatefulModule(nn.Module):
    """A module with tensors that are in `state_dict()`, move with `.to()` and are copied with the module, but that
    `named_buffers()` does not list.

    What wraps a model takes its buffers for something like weights: DistributedDataParallel overwrites those of all
    ranks with rank 0's, weight averaging averages them, FSDP casts them. Labels, counters and a ring of embeddings
    would not survive that.

    A state tensor is an attribute of the module. It is written in place, so its address changes only when the module is
    moved or loaded with `assign=True`; it keeps its dtype whatever the module is cast to.
    """

    _added: Mapping[str, float] = {}
    """Of state tensors that an earlier version's `state_dict()` does not have, what all their elements are then."""

    def __init__(self) -> None:
        super().__init__()
        self._persistent: dict[str, bool] = {}  # of each state tensor, by name: whether state_dict() has it

    def register_state(self, name: str, tensor: Tensor, persistent: bool = True) -> None:
        """Adds a state tensor as the attribute `name`. One that is not persistent is a measurement: floating point, not
        in `state_dict()`, and NaN where there is nothing that it was measured on.

        Raises KeyError, as for a buffer, if the module has an attribute of that name; TypeError for no tensor, or a
        Parameter.
        """
        if not isinstance(tensor, Tensor) or isinstance(tensor, nn.Parameter):  # which a module would train
            raise TypeError(f"register_state: {name} must be a tensor, got {type(tensor).__name__}")
        if hasattr(self, name):
            raise KeyError(f"attribute {name!r} already exists")
        setattr(self, name, _lasting(tensor))
        self._persistent[name] = persistent

    def __setattr__(self, name: str, value: Any) -> None:
        """State may be replaced by a tensor of its shape and dtype, as `torch.func.functional_call` does, and by
        nothing else: a step would find it with the memory half moved. An attribute `step` of a subclass would replace
        it, too."""
        if name in self.__dict__.get("_persistent", ()):
            its = f"{name} is state of {type(self).__name__} and must be"
            if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):  # which a module would train
                raise TypeError(f"{its} a tensor, got {type(value).__name__}")
            own = self.__dict__.get(name, value)
            if value.shape != own.shape:
                raise ValueError(f"{its} {list(own.shape)}, got {list(value.shape)}")
            if value.dtype != own.dtype:
                raise TypeError(f"{its} {own.dtype}, got {value.dtype}")
            if not checks.is_dense(value):
                raise TypeError(f"{its} dense, got {checks.kind(value)}")
            if not value.is_contiguous():
                raise ValueError(f"{its} contiguous")
            if value.is_neg():  # a view whose numbers count as their negatives, which no op writes
                raise ValueError(f"{its} the tensor of its own numbers: resolve_neg() it")
            for other, tensor in self.named_state():
                if other != name and _shares_memory(value, tensor):
                    raise ValueError(f"{its} apart from {other}, with which it shares memory")
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, and of what pickle has read."""
        super().__setstate__(state)
        for name, tensor in self.named_state():
            self.__dict__[name] = _lasting(tensor)

    def named_state(self, persistent: bool | None = None) -> Iterator[tuple[str, Tensor]]:
        """The state tensors; only those that are persistent, or only those that are not, if that is given."""
        for name, is_persistent in self._persistent.items():
            if persistent is None or persistent == is_persistent:
                yield name, getattr(self, name)

    def _check_state(self) -> None:
        """Raises for state that a step could not write: it would find that when it has written other tensors."""
        compiled = torch.compiler.is_compiling()  # its graphs have no inference tensors
        writes_lasting = self.training and not compiled and not torch.is_inference_mode_enabled()
        device: torch.device | None = None
        for name, tensor in self.named_state():
            if device is None:
                first, device = name, tensor.device
            if tensor.device != device:
                raise RuntimeError(f"{name} is on {tensor.device}, {first} on {device}: move one of them")
            if tensor.requires_grad:
                raise RuntimeError(f"{name} requires a gradient, and a memory has none: detach it")
            if writes_lasting and tensor.is_inference():
                raise RuntimeError(f"{name} was made in inference mode and cannot be written outside it: clone it")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StatefulModule:
        """Moves parameters, buffers and state, but keeps their dtypes: `.half()` must not round statistics."""
        move = keeping_dtypes(fn)
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
        names = [name for name, _ in self.named_state(persistent=True)]
        state = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        parts, faults = self._parts_and_faults(state, assign) if state else ({}, [])
        if not state:
            missing.extend(prefix + name for name in names)
        self._decide(Loaded(prefix, parts, [prefix + fault for fault in faults], assign, errors))

    def _decide(self, loaded: Loaded) -> None:
        """Takes what has no fault."""
        loaded.errors.extend(f"{fault}; nothing of the state was loaded" for fault in loaded.faults)
        if loaded.parts and not loaded.faults:
            self._take(loaded.parts, loaded.assign)

    def _parts_and_faults(self, state: Mapping[str, Any], assign: bool) -> tuple[dict[str, Tensor], list[str]]:
        """What this module has of it, and why that cannot become its state."""
        faults = list(self._faults_of(state, assign))
        if faults:
            return {}, faults
        parts = {name: self._own(name, t) for name, t in state.items()}
        own = dict(self.named_state(persistent=True))
        if not any(map(_is_empty, (*parts.values(), *own.values()))):
            faults = list(self._impossible({name: t.to(own[name].dtype) for name, t in parts.items()}))
        return parts, faults

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
                own.fill_(self._added.get(name, torch.nan))

    def _faults_of(self, state: Mapping[str, Any], assign: bool) -> Iterator[str]:
        """What is wrong with tensors that are to become the state."""
        own = dict(self.named_state(persistent=True))
        absent = [name for name in own if name not in state and name not in self._added]
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


def _lasting(t: Tensor) -> Tensor:
    """State may be written outside inference mode, too, if it was made or moved in it."""
    if not t.is_inference():
        return t
    with torch.inference_mode(False):
        return t.clone()


def _shares_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors do, where that can be said: of what is compiled, transformed or empty, if they are one."""
    unknown = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
    return a is b or (not (unknown or _is_empty(a) or _is_empty(b)) and checks.shares_memory(a, b))


def _is_empty(t: Tensor) -> bool:
    """A shape without values: on the meta device, or a fake tensor of another one."""
    return t.is_meta or isinstance(t, FakeTensor)
