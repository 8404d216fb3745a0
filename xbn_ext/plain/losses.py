"""The pair losses of `reference/losses.py`, a chunk of the bank at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import exponents, margins
from .pairs import Pairs

BY_FORMULA: dict[str, Callable[[Any, Tensor, Tensor | None], Pairs[Any]]] = {
    **margins.BY_FORMULA,
    **exponents.BY_FORMULA,
}
"""By `loss.formula`."""
