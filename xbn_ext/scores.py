"""Scores of a search: what each query gets for the list of what it found, and their mean. Musgrave et al., "A metric
learning reality check", arXiv 2003.08505, section 3.2 has R-precision and MAP@R.

A list is right `[Q, n]`, bool, best first: whether the row found is of the query's class. R, `wanted [Q]`, is how many
rows of its class there are to be found, at least 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def recall(ahead: Tensor, k: int) -> float:
    """Recall@k: the part of the queries with a right row among the first k. `ahead [Q]`, integers, is how many wrong
    rows come before the first right one."""
    return float((ahead < k).double().mean())


def r_precision(right: Tensor, wanted: Tensor) -> Tensor:
    """R-precision of each query, `[Q]` float64: of the first R rows, the part that is right. n is R or more."""
    return _counted(right, wanted).sum(1).double() / wanted


def average_precision(right: Tensor, wanted: Tensor) -> Tensor:
    """Of each query its part in MAP@R, `[Q]` float64: the sum of precision@i over those i <= R whose row is right,
    divided by R. n is R or more."""
    counted = _counted(right, wanted)
    precision = counted.cumsum(1).double() / _places(right)
    return (precision * counted).sum(1) / wanted


def _counted(right: Tensor, wanted: Tensor) -> Tensor:
    """Which of the first R rows are right, `[Q, n]`."""
    return right & (_places(right) <= wanted[:, None])


def _places(right: Tensor) -> Tensor:
    """1, 2, ... n."""
    return torch.arange(1, right.shape[1] + 1, device=right.device)
