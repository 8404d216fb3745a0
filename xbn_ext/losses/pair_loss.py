"""What losses of pairs have in common: parameters, and how kernels are told of them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .. import checks
from .._autograd import needs_grad


@dataclass(frozen=True)
class PairLoss:
    """A loss that `CrossBatchMemory` and `memory_loss` take: one of the classes in this folder.

    Its parameters are numbers. A temperature, `SigLIP`'s bias and `Margin`'s boundary may be tensors of shape [] or [1]
    and be learned; margins, scales and the like may not: a learned margin would shrink until the loss vanished.

    Raises:
        ValueError: a parameter is not finite or out of its range, naming it.
    """

    name: ClassVar[str]
    """What users call the loss."""
    words: ClassVar[tuple[str, ...]] = ()
    """Its parameters that are words; the others are numbers."""
    must_be_positive: ClassVar[tuple[str, ...]] = ()
    """Its parameters that are."""
    may_be_learned: ClassVar[tuple[str, ...]] = ()
    """Its parameters that may be tensors, whose values are not checked here."""
    gives_in_common: ClassVar[bool] = False
    """Whether the second pass is given a mean over all anchors, the same for each: they can't be ranked one by one."""
    offset: ClassVar[str] = ""
    """The one among them that similarities are shifted by, if there is one. Its value is read on the host in each step,
    and must be finite."""

    def __post_init__(self) -> None:
        for name in self.numbers():
            self._check_number(name, getattr(self, name))

    def _check_number(self, name: str, value: Any) -> None:
        if name in self.may_be_learned and isinstance(value, Tensor):
            if value.numel() != 1 or value.dim() > 1 or not value.is_floating_point():
                got = f"{value.dtype} {list(value.shape)}"
                raise ValueError(f"{name} must be a number or a floating-point tensor [] or [1], got {got}")
            return
        if name in self.must_be_positive:
            checks.finite_positive(name, value)
        else:
            checks.moderate(name, value)

    def numbers(self) -> list[str]:
        """The names of the parameters that are numbers."""
        return [field.name for field in dataclasses.fields(self) if field.name not in self.words]

    @property
    def formula(self) -> str:
        """The kind, whatever the distance."""
        return self.name

    @property
    def kind(self) -> str:
        """The name by which the kernels know the loss: it and what its words say."""
        return self.formula

    @property
    def parameters(self) -> list[float]:
        """The numbers the kernels take, in their order."""
        return [number(getattr(self, name)) for name in self.numbers()]

    @property
    def groups(self) -> int:
        """How many averages the loss is a sum of: 2 where negatives and positives are averaged apart."""
        return 1

    @property
    def takes_screen(self) -> bool:
        """Whether a GPU may find its pairs by a screen, as `csrc/cuda/loss/way.h` has it."""
        return False

    def slope(self, positives: Tensor, negatives: Tensor) -> Tensor:
        """dLoss/doffset, by how many positives and negatives of an anchor have a weight, or what these add up to."""
        raise NotImplementedError

    @property
    def passes(self) -> tuple[tuple[int, ...], ...]:
        """The passes over a bank that it takes, and of each the slots that it fills (`csrc/math/losses.h`). Empty where
        their sums cannot be added up over parts of a bank."""
        return ((0, 1),)

    def with_parameters(self, parameters: Sequence[float]) -> PairLoss:
        """The same kind of loss with other `parameters`, unchecked: what ops take of them, they check themselves."""
        return self._with_numbers(parameters)

    def _with_numbers(self, numbers: Sequence[float | None]) -> PairLoss:
        other = copy.copy(self)
        for name, number in zip(self.numbers(), numbers, strict=True):
            object.__setattr__(other, name, number)
        return other


@dataclass(frozen=True)
class LossWithTemperature(PairLoss):
    """A loss of `s / temperature`. A temperature may be a tensor of shape [] or [1], whose value only a
    memory checks, when it is made."""

    must_be_positive: ClassVar[tuple[str, ...]] = ("temperature",)
    may_be_learned: ClassVar[tuple[str, ...]] = ("temperature",)
    temperature: float | Tensor


def number(value: float | Tensor) -> float:
    """Of a tensor, its one number, for which the host waits. Raises RuntimeError if it has a forward-mode derivative,
    which would be lost."""
    if not isinstance(value, Tensor):
        return float(value)
    needs_grad(value)
    return float(value.detach())
