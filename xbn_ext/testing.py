"""How far a result may be from the truth: a small multiple of what PyTorch itself loses in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def error(result: Tensor, truth: Tensor) -> float:
    """Largest absolute difference from `truth`, relative to the largest absolute value of `truth`."""
    if truth.numel() == 0:
        return 0.0
    scale = max(float(truth.double().abs().max()), torch.finfo(torch.float64).tiny)
    return float((result.double() - truth.double()).abs().max()) / scale


def assert_within_budget(
    result: Tensor, truth: Tensor, same_dtype: Tensor | None = None, *, factor: float = 4.0, floor: float = 16.0
) -> None:
    """Asserts `|result - truth| <= factor * |same_dtype - truth| + floor * eps`, all relative to `|truth|`.

    Args:
        result: what a kernel computed.
        truth: the float64 reference.
        same_dtype: the reference run in the dtype of `result`; None leaves only the floor.
        factor, floor: the budget; eps is the rounding unit of result's dtype.

    Raises:
        AssertionError: with the measured error and the budget.
    """
    assert result.shape == truth.shape, f"shape {list(result.shape)}, expected {list(truth.shape)}"
    budget = floor * torch.finfo(result.dtype).eps
    if same_dtype is not None:
        budget += factor * error(same_dtype, truth)
    measured = error(result, truth)
    assert measured <= budget, f"relative error {measured:.2e} exceeds the budget {budget:.2e}"
