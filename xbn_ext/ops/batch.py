"""A batch by itself: `normalize`, `moments` (`csrc/glue/batch.h`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from .._autograd import differentiable_once, needs_grad
from . import _namespace
from ._namespace import fake

__all__ = ["moments", "normalize"]


def normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """The rows of `x [B, D]` divided by `max(|row|, eps)`, as `torch.nn.functional.normalize` does, by one kernel; its
    gradient by another.

    Norms are float64, so those of finite float32 rows never overflow.

    Raises:
        RuntimeError: x is not `[B, D]`, float32 or float64; or a second derivative or a forward-mode one is asked for.
    """
    checks.tensors("normalize", x=x)
    z, norm = _namespace.called.normalize(x.detach(), eps)
    return _Normalized.apply(z, x, norm, eps) if needs_grad(x) else z  # type: ignore[no-any-return]


@fake("normalize")
def _(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float64)


class _Normalized(torch.autograd.Function):
    """`z`, which depends on x."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        z = z.view_as(z)
        ctx.save_for_backward(z, norm)
        ctx.eps = eps
        return z

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor) -> tuple[Tensor | None, ...]:
        z, norm = ctx.saved_tensors
        with torch.no_grad():  # detach() would do, if it could be batched: is_grads_batched=True
            grad_x = _namespace.called.normalize_backward(grad_z, z, norm, ctx.eps)
        return None, differentiable_once(grad_x, grad_z, z), None, None


@fake("normalize_backward")
def _(grad_z: Tensor, z: Tensor, norm: Tensor, eps: float) -> Tensor:
    return z.new_empty(z.shape)


def moments(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased std per dimension of the finite rows of `x [B, D]` in `mask [B]` (bool; None: all).

    Returns `mean [D]`, `std [D]` (float64) and `rows []` (int64), how many rows counted; with none, zeros.
    """
    return _namespace.called.moments(x, mask)  # type: ignore[no-any-return]


@fake("moments")
def _(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    D = x.shape[1]
    return (
        x.new_empty(D, dtype=torch.float64),
        x.new_empty(D, dtype=torch.float64),
        x.new_empty((), dtype=torch.int64),
    )
