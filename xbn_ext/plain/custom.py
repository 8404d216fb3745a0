"""A loss of the user's own, a chunk of the memory at a time. One pass reduces the terms of all pairs to two numbers for
each anchor; autograd has the derivative of the loss by these; a second pass multiplies it by those of the terms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..custom import CustomLoss, Reduction
from .pairs import Chunk, Similarities


class Result(NamedTuple):
    """Of a loss over all chunks."""

    value: Tensor  # []
    grad: Tensor | None  # what the similarities have as the gradient; None: not asked for
    of_parameters: list[Tensor]  # derivatives by those of the loss that learn
    pairs: Tensor  # [2] float64, active positives and negatives of an anchor


class _Side:
    """The positives of all anchors, or the negatives: their terms, reduced to `value [B]` (float64)."""

    def __init__(self, term: Callable[[Tensor], Tensor], reduction: Reduction, like: Tensor) -> None:
        self.term, self.reduction = term, reduction
        self.number, self.active = torch.zeros_like(like), torch.zeros_like(like)
        starts_at = -torch.inf if reduction in ("logsumexp", "max") else 0.0
        self.value = torch.full_like(like, starts_at)
        self.taken = torch.zeros_like(like, dtype=torch.bool)  # anchors whose largest term has been found again

    def terms(self, s: Tensor, which: Tensor) -> Tensor:
        """`[B, n]`, of pairs alone: a term of what is none could be infinite, and its derivative."""
        terms = self.term(torch.where(which, s, 0.0))
        if not isinstance(terms, Tensor) or terms.shape != s.shape or terms.dtype != s.dtype:
            got = f"{terms.dtype} {list(terms.shape)}" if isinstance(terms, Tensor) else type(terms).__name__
            name = getattr(self.term, "__name__", "term")
            raise TypeError(f"loss: {name}(s) must return {s.dtype} {list(s.shape)}, got {got}")
        return terms

    def look(self, s: Tensor, which: Tensor) -> None:
        terms = self.terms(s, which)
        self.number += which.sum(1)
        self.active += (which & (terms != 0)).sum(1)
        if self.reduction == "max":
            self.value = torch.maximum(self.value, terms.masked_fill(~which, -torch.inf).amax(1).double())
        elif self.reduction == "logsumexp":
            self.value = torch.logaddexp(self.value, terms.masked_fill(~which, -torch.inf).logsumexp(1).double())
        else:
            self.value = self.value + terms.masked_fill(~which, 0.0).sum(1, dtype=torch.float64)

    def reduced(self) -> Tensor:
        return self.value / self.number.clamp(min=1) if self.reduction == "mean" else self.value

    def weights(self, terms: Tensor, which: Tensor, of_reduced: Tensor) -> Tensor:
        """dLoss/dterm `[B, n]`, by that of the reduced number, `of_reduced [B]`. Of equal largest terms the first has
        all of it."""
        value, of_reduced = self.value.to(terms.dtype)[:, None], of_reduced[:, None]
        if self.reduction == "max":
            largest = which & ((terms == value) | terms.isnan())
            first = largest & (largest.cumsum(1) == 1) & ~self.taken[:, None]
            self.taken = self.taken | first.any(1)
            return torch.where(first, of_reduced, 0.0)
        if self.reduction == "logsumexp":
            return torch.where(which, of_reduced * (terms - value).exp(), 0.0)
        share = 1 / self.number.clamp(min=1).to(terms.dtype)[:, None] if self.reduction == "mean" else 1.0
        return torch.where(which, of_reduced * share, 0.0)


def loss_of(loss: CustomLoss, similarities: Similarities, dtype: torch.dtype, need_grad: bool) -> Result:
    """`similarities` are of `dtype`, as what `loss` is given is. Without `need_grad` there is one pass."""
    like = similarities.grad.new_zeros(len(similarities.grad), dtype=torch.float64)
    sides = _sides(loss, like)
    with torch.no_grad():
        for chunk in similarities.chunks():
            for side, which in _sides_of(sides, chunk):
                side.look(chunk.s, which)
    parameters = [p for p in loss.parameters() if p.requires_grad] if need_grad else []
    with torch.set_grad_enabled(need_grad):
        reduced = [side.reduced().to(dtype).requires_grad_(need_grad) for side in sides]
        value = _average(loss, sides, reduced, similarities.anchors)
    pairs = torch.stack([side.active.sum() for side in sides]) / _ranking(similarities.anchors, like).clamp(min=1)
    if not need_grad:
        return Result(value, None, [], pairs)
    grads = _derivatives(value, [*reduced, *parameters])
    of_parameters = grads[2:]
    for chunk in similarities.chunks():
        weight = torch.zeros_like(chunk.s)
        for (side, which), of_reduced in zip(_sides_of(sides, chunk), grads, strict=False):
            with torch.enable_grad():
                s = chunk.s.detach().requires_grad_()
                terms = side.terms(s, which)
                weighted = (terms * side.weights(terms.detach(), which, of_reduced)).masked_fill(~which, 0.0).sum()
            by_s, *by_parameters = _derivatives(weighted, [s, *parameters])
            weight += by_s.masked_fill(~which, 0.0)
            of_parameters = [a + b for a, b in zip(of_parameters, by_parameters, strict=True)]
        similarities.add(chunk, weight)
    return Result(value.detach(), similarities.gradient(), of_parameters, pairs)


def try_out(loss: CustomLoss, z: Tensor) -> None:
    """Raises what the loss raises of similarities of the dtype and device of z, or of what it returns for them."""
    with torch.no_grad():
        s = z.new_full((2, 3), 0.5)
        which = torch.ones_like(s, dtype=torch.bool)
        like = s.new_zeros(2, dtype=torch.float64)
        sides = _sides(loss, like)
        for side in sides:
            side.look(s, which)
        _average(loss, sides, [side.reduced().to(s.dtype) for side in sides], None)


def _sides(loss: CustomLoss, like: Tensor) -> tuple[_Side, _Side]:
    of_positives, of_negatives = loss.reductions
    return _Side(loss.positive, of_positives, like), _Side(loss.negative, of_negatives, like)


def _sides_of(sides: tuple[_Side, _Side], chunk: Chunk) -> Iterator[tuple[_Side, Tensor]]:
    yield sides[0], chunk.positive
    yield sides[1], chunk.negative


def _ranking(anchors: Tensor | None, like: Tensor) -> Tensor:
    return torch.full_like(like[:1].sum(), len(like)) if anchors is None else anchors.sum().double()


def _average(loss: CustomLoss, sides: tuple[_Side, _Side], reduced: list[Tensor], anchors: Tensor | None) -> Tensor:
    has_positives, has_negatives = (side.number > 0 for side in sides)
    pays = has_positives & has_negatives if loss.needs_both else has_positives | has_negatives
    costs = loss.anchor(*(torch.where(pays, number, 0.0) for number in reduced))
    if not isinstance(costs, Tensor) or costs.shape != pays.shape:
        got = list(costs.shape) if isinstance(costs, Tensor) else type(costs).__name__
        raise TypeError(f"loss: anchor(positives, negatives) must return {list(pays.shape)}, got {got}")
    if loss.average == "anchors":
        number = pays.sum() if loss.needs_both else _ranking(anchors, sides[0].number)
    else:
        of_anchors = [side.number if loss.average == "pairs" else side.active for side in sides]
        number = torch.where(pays, of_anchors[0] + of_anchors[1], 0.0).sum()
    return torch.where(pays, costs, 0.0).sum() / number.clamp(min=1).to(costs.dtype)


def _derivatives(of: Tensor, by: list[Tensor]) -> list[Tensor]:
    if not of.requires_grad:
        return [torch.zeros_like(t) for t in by]
    return list(torch.autograd.grad(of, by, allow_unused=True, materialize_grads=True))
