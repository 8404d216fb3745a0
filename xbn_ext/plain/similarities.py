"""What a loss is computed from: the B x M similarities, which are never stored. They come in chunks, as often as it
asks for them. They and the gradient are of the dtype of the embeddings, sums over pairs float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import chunks
from .batch import inverse_length, is_short
from .chunks import is_finite
from .pairs import Chunk


class BankSimilarities:
    """Of anchors `z [B, D]` and bank rows, with the gradient `grad [B, D]` by z."""

    def __init__(
        self, z: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, count: Tensor | None, scale: Tensor | None,
        shift: Tensor | None, bank_ids: Tensor | None, exclude: Tensor | None, anchors: Tensor | None,
        renormalize: bool, eps: float,
    ) -> None:  # fmt: skip
        self.finite = is_finite(z)[:, None]
        self.z = torch.where(self.finite, z, torch.nan)
        self.labels, self.bank, self.bank_labels = labels[:, None], bank, bank_labels
        self.bank_ids = bank_ids
        self.anchors = anchors
        self.renormalize, self.eps = renormalize, eps
        self.n, self.count = chunks.filled_rows(count, len(bank))
        self.scale_of_rows = None if scale is None else scale.to(z.dtype)
        self.shift_of_rows = None if shift is None else shift.to(z.dtype)
        self.exclude = None if exclude is None else exclude[:, None]
        if exclude is not None:
            self.has_id = ((exclude != -1) & (exclude != torch.iinfo(torch.int64).min))[:, None]
        self.grad = torch.zeros_like(z, memory_format=torch.contiguous_format)
        self.step = chunks.rows_of_a_chunk(z.device, max(z.shape))

    def spans(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.n, self.step):
            yield start, min(start + self.step, self.n)

    def numbers(self, start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, device=self.z.device)

    def pairs(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """`[B, n]` bool: the positives, the negatives."""
        positive = self.labels == self.bank_labels[start:stop]
        negative = ~positive
        for no_pair in self.no_pairs(start, stop):
            positive &= ~no_pair
            negative &= ~no_pair
        return positive, negative

    def no_pairs(self, start: int, stop: int) -> Iterator[Tensor]:
        if self.anchors is not None:
            yield ~self.anchors[:, None]
        if self.exclude is not None:
            ids = self.numbers(start, stop) if self.bank_ids is None else self.bank_ids[start:stop]
            yield (self.exclude == ids) & self.has_id
        if self.count is not None:
            yield self.numbers(start, stop) >= self.count

    def rows(self, u: Tensor) -> tuple[Tensor, Tensor | None]:
        """What stored rows `[n, D]` stand for, and their norms `[n]`."""
        rows = u.to(self.z.dtype)
        if self.scale_of_rows is not None and self.shift_of_rows is not None:
            rows = rows * self.scale_of_rows + self.shift_of_rows
        norm = torch.linalg.vector_norm(rows, dim=1).clamp_(min=self.eps) if self.renormalize else None
        return rows, norm

    def chunks(self) -> Iterator[Chunk]:
        for start, stop in self.spans():
            u = self.bank[start:stop]
            if self.count is not None:  # what is stored beyond it is no number of this memory
                u = torch.where((self.numbers(start, stop) < self.count)[:, None], u, 0)
            rows, norm = self.rows(u)
            s = self.z @ rows.T
            if norm is not None:
                s.div_(norm)
            yield Chunk(s, *self.pairs(start, stop), start, rows, norm)

    def positives(self) -> Tensor:
        number = torch.zeros_like(self.labels[:, 0])
        for start, stop in self.spans():
            number += self.pairs(start, stop)[0].sum(1)
        return number

    def add(self, chunk: Chunk, weight: Tensor) -> None:
        assert chunk.rows is not None
        if chunk.norm is not None:
            weight = weight.div_(chunk.norm)
        self.grad.addmm_(weight, chunk.rows)

    def add_columns(self, column: Tensor, weight: Tensor) -> None:
        if self.n == 0:
            return
        rows, norm = self.rows(self.bank[column.clamp(min=0)])
        if norm is not None:
            weight = weight / norm
        self.grad += torch.where((column >= 0)[:, None], weight[:, None] * rows, 0)

    def scale(self, factor: Tensor) -> None:
        self.grad.mul_(factor)

    def gradient(self) -> Tensor:
        """dLoss/dz; an anchor that is not finite has none, whatever it pays."""
        return torch.where(self.finite, self.grad, torch.nan)


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
