"""`StatefulModule`: a module whose tensors are its state, and not its buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import checks


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
        in `state_dict()`, and NaN where there is nothing that it was measured on."""
        self._persistent[name] = persistent
        setattr(self, name, tensor)

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
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        """Takes all of the state or, if a tensor is missing, of another shape, or would be rounded, nothing of it.

        `assign=True` replaces the tensors by copies: what is written in place must not be shared with the dictionary.
        """
        assign = metadata.get("assign_to_params_buffers", False)
        absent, wrong = self._faults_of(state_dict, prefix, assign)
        if absent or wrong:
            missing.extend(absent)
            errors.extend(f"{fault}; nothing was loaded" for fault in wrong)
            return
        foreign: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, foreign, errors)
        unexpected.extend(key for key in foreign if key.removeprefix(prefix) not in self._persistent)
        with torch.no_grad():
            for name, own in self.named_state(persistent=True):
                if assign:
                    device = state_dict[prefix + name].device
                    setattr(self, name, torch.empty_like(own, device=device))
                getattr(self, name).copy_(state_dict[prefix + name])
            for name, own in self.named_state(persistent=False):
                if assign and own.device != device:
                    setattr(self, name, torch.full_like(own, torch.nan, device=device))

    def _faults_of(self, state_dict: Mapping[str, Any], prefix: str, assign: bool) -> tuple[list[str], list[str]]:
        """The keys that are missing, and what is wrong with the others."""
        own: dict[str, Tensor] = dict(self.named_parameters(recurse=False))
        own |= {k: b for k, b in self.named_buffers(recurse=False) if k not in self._non_persistent_buffers_set}
        own.update(self.named_state(persistent=True))
        absent = [prefix + name for name in own if prefix + name not in state_dict]
        found = {name: state_dict[prefix + name] for name in own if prefix + name in state_dict}
        wrong = [
            f"{prefix}{name} must be a tensor, got {checks.kind(new)}"
            for name, new in found.items()
            if not isinstance(new, Tensor)
        ]
        if wrong:
            return absent, wrong
        wrong = [
            f"{prefix}{name} must be {list(own[name].shape)} for {self._get_name()}({self.extra_repr()}), "
            f"got {list(new.shape)}"
            for name, new in found.items()
            if new.shape != own[name].shape
        ]
        state = {name: new for name, new in found.items() if name in self._persistent}
        wrong += [
            f"{prefix}{name} is {new.dtype} and would be rounded to {own[name].dtype}"
            for name, new in state.items()
            if torch.promote_types(new.dtype, own[name].dtype) != own[name].dtype
        ]
        devices = {str(new.device) for new in state.values()}
        if assign and len(devices) > 1:
            wrong.append(f"{prefix}state must be on one device to be assigned, got {', '.join(sorted(devices))}")
        if not assign and state and any(t.is_meta for _, t in self.named_state()):
            wrong.append(f"{prefix}state is on the meta device: load with assign=True, or call to_empty() first")
        return absent, wrong
