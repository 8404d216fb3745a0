"""Rows of no class. Each gets a label that no other row has, from a part of int64 that no class is expected in."""

from __future__ import annotations

import torch
from torch import Tensor

FIRST = torch.iinfo(torch.int64).min + 1
OF_A_STEP = 1 << 24  # rows, at most; so there is room for 2^37 steps
FILLED = 1 << 61  # where the labels of `fill_from` begin
END = -(1 << 62)  # the first that a class may have


def apart(labels: Tensor, no_class: int | None, first: Tensor | int) -> Tensor:
    """Labels `[B]` with a number of its own for each row of the label `no_class`, counted from `first` on."""
    if no_class is None:
        return labels
    numbers = FIRST + first + torch.arange(len(labels), device=labels.device)
    return torch.where(labels == no_class, numbers, labels)


def as_given(labels: Tensor, no_class: int | None) -> Tensor:
    """Labels as they were before `apart`."""
    return labels if no_class is None else torch.where(labels < END, no_class, labels)
