"""`WithLoss`: a module that has a loss. Some of the loss's numbers may be the module's parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .. import checks
from .._autograd import check_step
from .custom import AnyLoss, OwnLoss
from .kinds import check_loss
from .learned import LEARNABLE, at, check_offset, default_of, number_in
from .margins import LossOfDistances
from .pair_loss import PairLoss


class WithLoss(nn.Module):
    """A module with a loss. What the loss learns is the module's: a loss with parameters of its own is a module in it,
    and of a `PairLoss` a parameter keeps its name."""

    _loss: PairLoss | None = None  # numbers stand in it for what is learned; None: it is an `OwnLoss`
    _first_values: dict[str, float]  # of what is learned

    def _hold(self, loss: AnyLoss) -> None:
        """Raises TypeError if it is no loss, ValueError if what it has to learn is not a parameter."""
        self._first_values = {}
        if isinstance(loss, OwnLoss):
            self._modules["loss"] = loss  # as which its parameters are found; the attribute is the property below
            for name in LEARNABLE:
                self.register_parameter(name, None)
            return
        check_loss(type(self).__name__, loss)
        for name in LEARNABLE:
            value = getattr(loss, name, None)
            learned = value if isinstance(value, nn.Parameter) else None
            if isinstance(value, Tensor) and value.requires_grad and learned is None:
                raise ValueError(f"loss: its {name} must be an nn.Parameter to be learned")
            self.register_parameter(name, learned)
            if learned is not None:
                self._first_values[name] = number_in(learned, default_of(loss, name))
        _in_numbers(loss)  # a tensor's value is looked at once, here
        self._loss = at(loss, **{name: default_of(loss, name) for name in self._first_values})

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "loss":  # a module would get past the property
            raise AttributeError(f"loss is chosen once and cannot be set: make another {type(self).__name__}")
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Also what sets one. Whether a number of the loss is learned is chosen with the loss: without the parameter
        its loss would be at another one."""
        own = self._parameters
        if name in LEARNABLE and name in own and (param is None) != (own[name] is None):
            was, would_be = ("learned", "None") if param is None else ("not learned", "a parameter")
            raise AttributeError(f"{name} is {was} and cannot become {would_be}: make another {type(self).__name__}")
        super().register_parameter(name, param)

    @property
    def _own_loss(self) -> OwnLoss | None:
        loss = self._modules.get("loss")
        return loss if isinstance(loss, OwnLoss) else None

    @property
    def loss(self) -> AnyLoss:
        """The pair loss. What is learned in it is this module's parameter, also where that has been replaced: by
        `load_state_dict(assign=True)`, `to_empty`, `torch.func.functional_call`."""
        if self._loss is None:
            assert self._own_loss is not None
            return self._own_loss
        return at(self._loss, **self._learned()) if self._first_values else self._loss

    def _learned(self) -> dict[str, Tensor]:
        """The parameters of a `PairLoss`, which are this module's."""
        return {name: getattr(self, name) for name in self._first_values}

    def _tensors_of_loss(self) -> list[Tensor]:
        """What is learned, and a temperature that is not, but a tensor."""
        if self._own_loss is not None:
            return [*self._own_loss.parameters()]
        fixed = getattr(self._loss, "temperature", None)
        return [*self._learned().values(), *([fixed] if isinstance(fixed, Tensor) else [])]

    def _in_numbers(self) -> AnyLoss:
        return self.loss if isinstance(self.loss, OwnLoss) else _in_numbers(self.loss)

    def _check_step(self, step: Tensor, *embeddings: Tensor, others: Sequence[Tensor | None]) -> bool:
        """Whether something learns from a call with these. Raises what `check_step` raises, if it does or a memory at
        this step would be written."""
        of_loss = self._tensors_of_loss()
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in (*embeddings, *of_loss))
        if self.training or learns:
            check_step(step, *embeddings, *others, of_loss=of_loss, learns=learns)
        return learns

    def _check_loss(self, device: torch.device) -> None:
        """Raises unless what the loss has that are tensors can be used with embeddings on a device."""
        if self._own_loss is not None:
            checks.on_device(device, **dict(self._own_loss.named_parameters()))
        elif self._loss is not None:
            fixed = getattr(self._loss, "temperature", None)
            if isinstance(fixed, Tensor) and not (fixed.is_cpu and fixed.dim() == 0):  # that one divides anywhere
                checks.on_device(device, temperature=fixed)
            loss = self._loss
            if self._first_values:
                loss = at(loss, **self._learned())  # raises where another shape has taken its place
                checks.on_device(device, **self._learned())
            check_offset(loss)

    def _begin_to_learn(self) -> None:
        """Gives what is learned its first value."""
        for name, first in self._first_values.items():
            value = getattr(self, name)
            if is_parametrized(self, name):  # what is read is computed; an assignment reaches what is stored
                setattr(self, name, torch.full_like(value, first))
            else:
                value.fill_(first)

    def _name_of_loss(self) -> str:
        return repr(self.loss) if self._own_loss is None else type(self._own_loss).__name__

    def _is_learned(self) -> dict[str, Any]:
        """Of what may be learned, whether it is."""
        return {f"{name} is learned": name in self._first_values for name in LEARNABLE}


def _in_numbers(loss: PairLoss) -> PairLoss:
    """The loss with numbers for its tensors. Raises ValueError for one that is out of its range."""
    tensors = {name: t for name in loss.may_be_learned if isinstance(t := getattr(loss, name), Tensor)}
    return at(loss, **{name: number_in(t, default_of(loss, name)) for name, t in tensors.items()})


def check_unit_rows(loss: Any, **options: bool) -> None:
    """Raises ValueError for an option that leaves rows as long as they are, if the loss is of distances between rows of
    unit length, or has one inside."""
    if isinstance(loss, WithLoss):
        loss = loss.loss
    if isinstance(loss, LossOfDistances) and loss.distance != "cosine":
        for name, makes_unit in options.items():
            if not makes_unit:
                raise ValueError(
                    f'{name} must be True with distance="{loss.distance}", which is that of rows of unit length'
                )
