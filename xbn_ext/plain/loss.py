"""What the ops of the loss share. They differ in where similarities come from; `losses.py` has what the losses make of
them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..losses import KINDS, PairLoss
from .contract import check
from .losses import BY_FORMULA
from .pairs import Pairs, Similarities


def parse_loss(op: str, kind: str, parameters: Sequence[float]) -> PairLoss:
    """The loss by its `kind` and its `parameters`."""
    check(kind in KINDS, f"{op}: unknown loss '{kind}'")
    loss = KINDS[kind]
    takes = len(loss.parameters)
    check(len(parameters) == takes, f"{op}: {kind} takes {takes} parameters, got {len(parameters)}")
    check(all(map(math.isfinite, parameters)), f"{op}: the parameters of {kind} must be finite")
    for name, value in zip(loss.numbers(), parameters, strict=True):
        in_range = name not in loss.must_be_positive or 1e-30 <= value <= 1e30  # float32 holds it and its reciprocal
        if not in_range:  # torch's compiler cannot print a number that it does not know
            raise RuntimeError(f"{op}: the {name} of {kind} must be within [1e-30, 1e30], got {value:g}")
    return loss.with_parameters(parameters)


def loss_of(similarities: Similarities, loss: PairLoss, need_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its gradient `[B, n]` (`[0, n]` unless `need_grad`) and pairs `[2]` per anchor."""
    pairs = BY_FORMULA[loss.formula](loss, similarities.grad, similarities.anchors)
    return result_of(pairs, similarities, need_grad)


def result_of(pairs: Pairs[Any], similarities: Similarities, need_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The same of pairs that have met none yet."""
    grad = _gradient(pairs, similarities, need_grad)
    value = (pairs.value / pairs.number.clamp(min=1)).sum()
    return value.to(grad.dtype), grad, pairs.counts / pairs.number_of_anchors().clamp(min=1)


def totals_of(similarities: Similarities, loss: PairLoss, need_grad: bool) -> tuple[Tensor, Tensor]:
    """What the loss is made of, `[7]` as `settle_sums` has it, and the gradient up to the averages."""
    pairs = BY_FORMULA[loss.formula](loss, similarities.grad, similarities.anchors)
    pairs.averages = False
    grad = _gradient(pairs, similarities, need_grad)
    return torch.cat([pairs.value, pairs.number, pairs.number_of_anchors()[None], pairs.counts]), grad


def _gradient(pairs: Pairs[Any], similarities: Similarities, need_grad: bool) -> Tensor:
    """Runs the loss."""
    pairs.run(similarities, need_grad)
    return similarities.gradient() if need_grad else similarities.grad.new_empty((0, similarities.grad.shape[1]))
