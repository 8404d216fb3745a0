"""The losses in plain PyTorch in bounded memory: what `memory_loss` and `batch_loss` are without the compiled library.

The B x M similarities are never stored: they come in chunks, as often as the loss asks for them. They and the gradient
are of the dtype of the embeddings, sums over pairs float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .chunked_losses import (
    Chunk,
    CirclePairs,
    ContrastivePairs,
    HardestTriplets,
    MultiSimilarityPairs,
    NTXentPairs,
    Pairs,
    SupConPairs,
)
from .chunked_triplets import AllTriplets
from .losses import Circle, Contrastive, MultiSimilarity, NTXent, PairLoss, SupCon, Triplet

# Elements of a chunk of similarities or rows: on a CPU for its caches, elsewhere so that a call is worth its launch.
CHUNK_ON_CPU, CHUNK_ELSEWHERE = 1 << 20, 1 << 23
FEWEST_ROWS = 64


def pairs_of(loss: PairLoss, z: Tensor, anchors: Tensor | None) -> Pairs:
    match loss:
        case Contrastive():
            return ContrastivePairs(loss, z, anchors)
        case SupCon():
            return SupConPairs(loss, z, anchors)
        case NTXent():
            return NTXentPairs(loss, z, anchors)
        case MultiSimilarity():
            return MultiSimilarityPairs(loss, z, anchors)
        case Circle():
            return CirclePairs(loss, z, anchors)
        case Triplet(mining="all"):
            return AllTriplets(loss, z, anchors)
        case Triplet():
            return HardestTriplets(loss, z, anchors)
    raise TypeError(f"unknown loss {type(loss).__name__}")


def rows_of_a_chunk(device: torch.device, columns: int) -> int:
    """How many rows of so many numbers are taken at a time."""
    elements = CHUNK_ON_CPU if device.type == "cpu" else CHUNK_ELSEWHERE
    return max(elements // max(columns, 1), FEWEST_ROWS)


def reads(device: torch.device) -> bool:
    """Whether looking at a number that is there costs no wait."""
    return device.type == "cpu"


def filled_rows(count: Tensor | None, M: int) -> tuple[int, Tensor | None]:
    """How many of M rows to look at, and the number `[]` from which on these do not exist (None: they all do). A count
    that is not on the CPU is not looked at, so that nothing waits for it."""
    if count is None:
        return M, None
    return (int(count), None) if reads(count.device) else (M, count)


def is_finite(z: Tensor) -> Tensor:
    """`[B]` bool, of the rows of `z [B, D]`."""
    return z.isfinite().all(dim=1)


class BankSimilarities:
    """Of anchors `z [B, D]` and bank rows, with the gradient `grad [B, D]` by z."""

    def __init__(
        self,
        z: Tensor,
        labels: Tensor,
        bank: Tensor,
        bank_labels: Tensor,
        *,
        count: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        bank_ids: Tensor | None = None,
        exclude: Tensor | None = None,
        anchors: Tensor | None = None,
        renormalize: bool = True,
        eps: float = 1e-6,
    ) -> None:
        self.finite = is_finite(z)[:, None]
        self.z = torch.where(self.finite, z, torch.nan)
        self.labels, self.bank, self.bank_labels = labels[:, None], bank, bank_labels
        self.bank_ids = bank_ids
        self.anchors = None if anchors is None else anchors[:, None]
        self.renormalize, self.eps = renormalize, eps
        self.n, self.count = filled_rows(count, len(bank))
        self.scale_of_rows = None if scale is None else scale.to(z.dtype)
        self.shift_of_rows = None if shift is None else shift.to(z.dtype)
        self.exclude = None if exclude is None else exclude[:, None]
        if exclude is not None:
            self.has_id = ((exclude != -1) & (exclude != torch.iinfo(torch.int64).min))[:, None]
        self.grad = torch.zeros_like(z, memory_format=torch.contiguous_format)
        self.step = rows_of_a_chunk(z.device, max(z.shape))

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
            yield ~self.anchors
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


def memory_loss(
    z: Tensor,
    labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    loss: PairLoss,
    *,
    need_grad: bool = True,
    anchors: Tensor | None = None,
    **options: Tensor | bool | float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, dLoss/dz `[B, D]` (`[0, D]` unless `need_grad`) and pairs `[2]` per anchor, in plain PyTorch.

    The arguments are those of `xbn_ext.memory_loss`, and not checked. On a CPU it takes the first `count` rows; on
    another device all, masked, so that the host does not wait for that number. `Triplet(mining="all")` makes it wait
    once.
    """
    similarities = BankSimilarities(z, labels, bank, bank_labels, anchors=anchors, **options)  # type: ignore[arg-type]
    pairs = pairs_of(loss, z, anchors)
    pairs.run(similarities, need_grad)
    grad = similarities.gradient() if need_grad else z.new_empty((0, z.shape[1]))
    return pairs.value.to(z.dtype), grad, pairs.counts / pairs.number_of_anchors()


class BatchSimilarities:
    """Of a batch with itself, from its products `dots [B, B]`, all in one chunk; the gradient `grad [B, B]` is that by
    the similarities."""

    def __init__(
        self,
        dots: Tensor,
        labels: Tensor,
        ids: Tensor | None,
        anchors: Tensor | None,
        renormalize: bool,
        eps: float,
    ) -> None:
        self.dots, self.renormalize, self.eps = dots, renormalize, eps
        squares = dots.diagonal()
        self.finite = (squares * 0 == 0)[:, None]
        self.norm = squares.sqrt()
        self.is_short = self.norm < eps
        self.inverse_norm = 1 / torch.where(self.is_short, eps, self.norm) if renormalize else torch.ones_like(squares)
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


def batch_loss(
    dots: Tensor,
    labels: Tensor,
    loss: PairLoss,
    *,
    ids: Tensor | None = None,
    anchors: Tensor | None = None,
    renormalize: bool = True,
    eps: float = 1e-6,
    need_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """Loss of a batch against itself from its products `dots [B, B]`, and dLoss/ddots `[B, B]` (`[0, B]` unless
    `need_grad`), in plain PyTorch. The other arguments are those of `xbn_ext.ops.batch_loss`, and not checked."""
    similarities = BatchSimilarities(dots, labels, ids, anchors, renormalize, eps)
    pairs = pairs_of(loss, dots, anchors)
    pairs.run(similarities, need_grad)
    grad = similarities.gradient() if need_grad else dots.new_empty((0, dots.shape[1]))
    return pairs.value.to(dots.dtype), grad
