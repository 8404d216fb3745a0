"""The loss of a batch against itself: `batch_loss`, and the similarities that it is computed from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .batch import inverse_length, is_short
from .chunks import exact
from .contract import Contract
from .loss import loss_of, parse_loss
from .pairs import Chunk


@exact
def batch_loss(
    dots: Tensor, labels: Tensor, ids: Tensor | None, anchors: Tensor | None, loss: str, parameters: Sequence[float],
    renormalize: bool, eps: float, need_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    c = Contract("batch_loss", dots)
    c.floating("dots", dots)
    c.given("labels", labels)
    B = labels.shape[0] if labels.dim() == 1 else dots.shape[0] if dots.dim() > 0 else 0
    c.shape("dots", dots, "[B, B]", (B, B))
    c.labels("labels", labels, "[B]", B)
    if ids is not None:
        c.labels("ids", ids, "[B]", B)
    c.rows_mask("anchors", anchors, B)
    c.eps(eps)
    pair_loss = parse_loss("batch_loss", loss, parameters)

    return loss_of(BatchSimilarities(dots, labels, ids, anchors, renormalize, eps), pair_loss, need_grad)[:2]


class BatchSimilarities:
    """Of a batch with itself, from its products `dots [B, B]`, all in one chunk; the gradient `grad [B, B]` is that by
    the similarities."""

    def __init__(
        self, dots: Tensor, labels: Tensor, ids: Tensor | None, anchors: Tensor | None, renormalize: bool, eps: float
    ) -> None:
        self.dots, self.anchors, self.renormalize = dots, anchors, renormalize
        squares = dots.diagonal()
        self.finite = (squares * 0 == 0)[:, None]
        self.norm = squares.sqrt()
        self.is_short = is_short(self.norm, eps)
        self.inverse_norm = inverse_length(self.norm, eps) if renormalize else torch.ones_like(squares)
        pair = ~torch.eye(len(dots), dtype=torch.bool, device=dots.device)
        if ids is not None:
            pair &= (ids[:, None] < 0) | (ids[:, None] != ids)
        if anchors is not None:
            pair &= anchors[:, None]
        of_one_label = labels[:, None] == labels
        self.positive, self.negative = pair & of_one_label, pair & ~of_one_label
        self.grad = torch.zeros_like(dots, memory_format=torch.contiguous_format)

    def chunks(self) -> Iterator[Chunk]:
        if len(self.dots) > 0:
            s = torch.where(self.finite, self.dots * self.inverse_norm, torch.nan)
            yield Chunk(s, self.positive, self.negative, 0)

    def positives(self) -> Tensor:
        return self.positive.sum(1)

    def add(self, chunk: Chunk, weight: Tensor) -> None:
        self.grad += weight

    def add_columns(self, column: Tensor, weight: Tensor) -> None:
        is_it = torch.arange(len(self.dots), device=self.dots.device) == column[:, None]
        self.grad += torch.where(is_it, weight[:, None], 0)

    def scale(self, factor: Tensor) -> None:
        self.grad.mul_(factor)

    def gradient(self) -> Tensor:
        """dLoss/ddots, which by its norm depends on the diagonal."""
        by_s = torch.where(self.finite, self.grad, torch.nan)
        by_dots = by_s * self.inverse_norm
        if self.renormalize:
            by_square = -0.5 * self.inverse_norm**3 * (by_s * self.dots).sum(0)
            diagonal = by_dots.diagonal()
            diagonal.copy_(torch.where(self.is_short, diagonal, by_square))
        return by_dots
