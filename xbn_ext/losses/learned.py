"""What may be learned: a temperature, and what similarities are shifted by."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .. import checks
from .._autograd import along_rows, needs_grad, with_gradient
from .kinds import KINDS, LOSSES
from .pair_loss import LossWithTemperature, PairLoss, number

LEARNABLE = tuple(dict.fromkeys(name for loss in LOSSES.values() for name in loss.may_be_learned))
"""The parameters that may be learned, of all losses."""


def at(loss: PairLoss, **values: float | Tensor) -> PairLoss:
    """A loss with other values of some parameters."""
    others = {field.name: getattr(loss, field.name) for field in dataclasses.fields(loss) if field.init}
    return type(loss)(**others | values)


def default_of(loss: PairLoss, name: str) -> float:
    """The default of a parameter."""
    return float(getattr(KINDS[loss.kind], name))


def number_in(tensor: Tensor, default: float) -> float:
    """Its one number, or the default where it has none."""
    try:
        return float(tensor.detach())
    except RuntimeError:  # it is on the meta device, or a fake one
        return default


def learned_offset(loss: PairLoss) -> Tensor | None:
    """The tensor that similarities are shifted by, if it requires a gradient."""
    offset = getattr(loss, loss.offset) if loss.offset else None
    return offset if isinstance(offset, Tensor) and offset.requires_grad else None


def learned_of(loss: PairLoss) -> list[Tensor]:
    """What the value of a loss depends on besides embeddings, and is learned."""
    values = (getattr(loss, name) for name in loss.may_be_learned)
    return [t for t in values if isinstance(t, Tensor) and t.requires_grad]


def has_sides(loss: PairLoss) -> bool:
    """Whether a temperature divides the rows that rank, and not those that are ranked."""
    return isinstance(getattr(loss, "temperature", None), Tensor)


def check_offset(loss: PairLoss) -> None:
    """Raises ValueError if a tensor that similarities are shifted by is not finite, too large, or has no value."""
    offset = getattr(loss, loss.offset) if loss.offset else None
    if not isinstance(offset, Tensor):
        return
    if offset.is_meta:
        raise ValueError(f"{loss.offset} is on the meta device, which holds no values")
    checks.moderate(loss.offset, number(offset))


def fold_temperature(loss: PairLoss, z: Tensor) -> tuple[PairLoss, Tensor]:
    """The same loss with a number for its temperature: a tensor divides the embeddings `z [B, D]` instead, since
    `s / t = (z / t) · r`. So the host does not wait for its value. Its gradient comes `with_temperature`."""
    if isinstance(loss, LossWithTemperature) and isinstance(loss.temperature, Tensor):
        return at(loss, temperature=1.0), z / loss.temperature.detach().to(z.dtype)
    return loss, z


def learns_temperature(loss: PairLoss) -> bool:
    """Whether its temperature gets a gradient."""
    return has_sides(loss) and needs_grad(loss.temperature)  # type: ignore[attr-defined]


def with_temperature(value: Tensor, loss: PairLoss, grad: Tensor, ranking: Tensor, *others: Tensor) -> Tensor:
    """`value`, which depends also on the temperature that z has been divided by, if that is learned: of
    `ranking = z / temperature`, both `[B, D]`, by which its gradient is `grad`. It depends on the others, too."""
    if not learns_temperature(loss):
        return value
    temperature: Tensor = loss.temperature  # type: ignore[attr-defined]
    return with_slope(value, temperature, by_temperature(temperature, grad, ranking, value), ranking, *others)


def by_temperature(temperature: Tensor, grad: Tensor, ranking: Tensor, value: Tensor) -> Tensor:
    """dvalue/dtemperature, float64, where `ranking = z / temperature` and `grad` is the gradient by it; both `[B, D]`,
    or similarities `[B, n]`."""
    return -along_rows(grad, ranking.detach(), value.detach()) / temperature.detach().double()


def with_slope(value: Tensor, learned: Tensor, slope: Tensor, *others: Tensor) -> Tensor:
    """`value`, which depends also on one learned number, by a slope that depends on the others."""
    slope = slope.to(learned.dtype).reshape(learned.shape)
    return value + with_gradient(torch.zeros_like(value), learned, slope, *others)


def with_offset(value: Tensor, loss: PairLoss, pairs: Tensor, *others: Tensor) -> Tensor:
    """`value`, which depends also on what the loss shifts similarities by, if that is learned; `pairs [2]` are its.
    That derivative depends on the others."""
    offset = learned_offset(loss)
    if offset is None or not torch.is_grad_enabled():
        return value
    return with_slope(value, offset, loss.slope(*pairs.detach().unbind()), *others, *learned_of(loss))
