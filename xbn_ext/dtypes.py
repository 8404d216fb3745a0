"""The dtypes that a memory's rows may be stored in, and what follows from one. What the kernels have to know of them is
in `csrc/math/half.h`."""

from __future__ import annotations

import torch

MEMORY_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def is_narrow(dtype: torch.dtype) -> bool:
    """Of so few bits that rows which follow a drift are standardised as they are stored, and not rewritten at every
    step: each time would round them."""
    return dtype.itemsize < torch.float32.itemsize


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What arithmetic on stored values is done in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether a tensor of one dtype can be kept in another without rounding."""
    if wide.is_floating_point != narrow.is_floating_point:
        return False
    if wide.is_floating_point:
        w, n = torch.finfo(wide), torch.finfo(narrow)
        return w.max >= n.max and w.eps <= n.eps and w.smallest_normal * w.eps <= n.smallest_normal * n.eps
    try:
        return torch.promote_types(wide, narrow) == wide
    except RuntimeError:  # nothing holds both
        return False
