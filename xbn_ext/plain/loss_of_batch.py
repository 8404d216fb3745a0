"""The loss of a batch against itself: `batch_loss`, what some of its rows add to it, `batch_sums`, and the similarities
that these are computed from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .batch import inverse_length, is_short
from .chunks import exact
from .contract import Contract, check
from .loss import loss_of, parse_loss, totals_of
from .pairs import Chunk


@exact
def batch_loss(
    dots: Tensor, labels: Tensor, ids: Tensor | None, anchors: Tensor | None, loss: str, parameters: Sequence[float],
    renormalize: bool, eps: float, need_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    c = Contract("batch_loss", dots)
    check_batch(c, dots, labels, ids, anchors, None)
    c.eps(eps)
    pair_loss = parse_loss("batch_loss", loss, parameters)

    similarities = similarities_of(dots, labels, ids, anchors, renormalize, eps)
    return loss_of(similarities, pair_loss, need_grad)[:2]


@exact
def batch_sums(
    dots: Tensor, labels: Tensor, ids: Tensor | None, anchors: Tensor | None, loss: str, parameters: Sequence[float],
    first: int, need_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_batch(Contract("batch_sums", dots), dots, labels, ids, anchors, first)
    pair_loss = parse_loss("batch_sums", loss, parameters)
    check(not pair_loss.gives_in_common, f"batch_sums: {loss} weighs pairs by a mean over all anchors")
    return totals_of(OwnSimilarities(dots, labels, ids, anchors, first), pair_loss, need_grad)


def check_batch(
    c: Contract, dots: Tensor, labels: Tensor, ids: Tensor | None, anchors: Tensor | None, first: int | None
) -> None:
    """`first`: of some rows of the batch; None: all of them are anchors."""
    c.floating("dots", dots)
    c.given("labels", labels)
    B = labels.shape[0] if labels.dim() == 1 else dots.shape[-1] if dots.dim() > 0 else 0
    c.shape("dots", dots, *(("[B, B]", (B, B)) if first is None else ("[A, B]", (None, B))))
    c.labels("labels", labels, "[B]", B)
    if ids is not None:
        c.labels("ids", ids, "[B]", B)
    A = len(dots)
    c.rows_mask("anchors", anchors, A, "[B]" if first is None else "[A]")
    in_range = first is None or 0 <= first <= B - A
    check(in_range, f"{c.op}: first must be within [0, B - A] = [0, {B - A}], got {first}")


def other_samples(labels: Tensor, ids: Tensor | None) -> Tensor:
    """`[B, B]`, which rows of a batch are neither an anchor's own nor another of its id (>= 0)."""
    other = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return other if ids is None else other & ((ids[:, None] < 0) | (ids[:, None] != ids))


class OwnSimilarities:
    """Of some rows of a batch, from row `first` on, with all of it, from the products `dots [A, B]`, all in one chunk;
    the gradient `grad [A, B]` is that by the similarities."""

    def __init__(
        self, dots: Tensor, labels: Tensor, ids: Tensor | None, anchors: Tensor | None, first: int = 0
    ) -> None:
        self.dots, self.anchors = dots, anchors
        self.squares = dots.diagonal(first)
        self.finite = (self.squares * 0 == 0)[:, None]
        own = slice(first, first + len(dots))
        pair = other_samples(labels, ids)[own]
        if anchors is not None:
            pair = pair & anchors[:, None]
        of_one_label = labels[own, None] == labels
        self.positive, self.negative = pair & of_one_label, pair & ~of_one_label
        self.grad = torch.zeros_like(dots, memory_format=torch.contiguous_format)

    def chunks(self) -> Iterator[Chunk]:
        if len(self.dots) > 0:
            s = torch.where(self.finite, self.similarity(), torch.nan)
            yield Chunk(s, self.positive, self.negative, 0)

    def similarity(self) -> Tensor:
        return self.dots

    def positives(self) -> Tensor:
        return self.positive.sum(1)

    def add(self, chunk: Chunk, weight: Tensor) -> None:
        self.grad += weight

    def add_columns(self, column: Tensor, weight: Tensor) -> None:
        is_it = torch.arange(self.dots.shape[1], device=self.dots.device) == column[:, None]
        self.grad += torch.where(is_it, weight[:, None], 0)

    def scale(self, factor: Tensor) -> None:
        self.grad.mul_(factor)

    def gradient(self) -> Tensor:
        return torch.where(self.finite, self.grad, torch.nan)


class NormalizedSimilarities(OwnSimilarities):
    """Of all rows, which are divided by their norms: roots of the products with themselves."""

    def __init__(self, dots: Tensor, labels: Tensor, ids: Tensor | None, anchors: Tensor | None, eps: float) -> None:
        super().__init__(dots, labels, ids, anchors)
        norm = self.squares.sqrt()
        self.is_short = is_short(norm, eps)
        self.inverse_norm = inverse_length(norm, eps)

    def similarity(self) -> Tensor:
        return self.dots * self.inverse_norm

    def gradient(self) -> Tensor:
        """dLoss/ddots, which by its norm depends on the diagonal."""
        by_dots = super().gradient() * self.inverse_norm
        by_square = (by_dots * self.dots).sum(0) * self.inverse_norm * (-0.5 * self.inverse_norm)
        diagonal = by_dots.diagonal()
        diagonal.copy_(torch.where(self.is_short, diagonal, by_square))
        return by_dots


def similarities_of(
    dots: Tensor, labels: Tensor, ids: Tensor | None, anchors: Tensor | None, renormalize: bool, eps: float
) -> OwnSimilarities:
    """Of a batch, from the products of its rows."""
    if renormalize:
        return NormalizedSimilarities(dots, labels, ids, anchors, eps)
    return OwnSimilarities(dots, labels, ids, anchors)


class Rows(NamedTuple):
    """A batch that is ranked against itself, and how: `z [B, D]` and the arguments of `batch_loss`."""

    z: Tensor
    dots: Tensor  # [B, B]
    labels: Tensor
    ids: Tensor | None
    anchors: Tensor | None
    renormalize: bool
    eps: float

    def similarities(self) -> OwnSimilarities:
        return similarities_of(self.dots, self.labels, self.ids, self.anchors, self.renormalize, self.eps)

    def by_rows(self, by_dots: Tensor | None) -> Tensor | None:
        """The gradient by z, from that by the products."""
        return None if by_dots is None else (by_dots + by_dots.T) @ self.z
