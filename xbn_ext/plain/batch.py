"""The ops on a batch of embeddings: `normalize`, its gradient, `moments`."""

from __future__ import annotations

import torch
from torch import Tensor

from .chunks import exact, is_finite
from .contract import Contract


@exact
def normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    c = Contract("normalize", x)
    c.matrix("x", x, "[B, D]", (None, None))
    c.eps(eps)

    wide = x.double()
    norm = torch.linalg.vector_norm(wide, dim=1)
    return (inverse_length(norm, eps)[:, None] * wide).to(x.dtype).contiguous(), norm


def is_short(norm: Tensor, eps: float) -> Tensor:
    """A NaN is not, so that whatever is made of it is NaN, too."""
    return norm < eps


def inverse_length(norm: Tensor, eps: float) -> Tensor:
    return 1 / torch.where(is_short(norm, eps), eps, norm)


@exact
def normalize_backward(grad_z: Tensor, z: Tensor, norm: Tensor, eps: float) -> Tensor:
    c = Contract("normalize_backward", z)
    c.matrix("z", z, "[B, D]", (None, None))
    c.shape("grad_z", grad_z, "[B, D]", z.shape)
    c.dtype("grad_z", grad_z, z.dtype, "of the dtype of z")
    c.statistic("norm", norm, "[B]", (z.shape[0],))
    c.eps(eps)

    grad, wide = grad_z.double(), z.double()
    along = torch.where(is_short(norm, eps), 0, (grad * wide).sum(1))
    grad_x = inverse_length(norm, eps)[:, None] * (grad - along[:, None] * wide)
    return grad_x.to(z.dtype).contiguous()


@exact
def moments(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    c = Contract("moments", x)
    c.matrix("x", x, "[B, D]", (None, None))
    c.rows_mask("mask", mask, x.shape[0])

    rows = is_finite(x)
    if mask is not None:
        rows = rows & mask
    n = rows.sum()
    if len(x) == 0:
        zeros = x.new_zeros(x.shape[1], dtype=torch.float64)
        return zeros, zeros.clone(), n
    wide = x.double()
    first = wide.index_select(0, rows.to(torch.uint8).argmax().view(1))  # a mean far from zero costs no digits
    off = torch.where(rows[:, None], wide - first, 0)
    number = n.clamp(min=1)
    mean = off.sum(0) / number
    square = torch.where(rows[:, None], off - mean, 0).square().sum(0) / number
    return torch.where(n > 0, first[0] + mean, 0), square.sqrt(), n
