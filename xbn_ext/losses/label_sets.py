"""`LabelSets`: samples that have several classes, for `SelectPairs`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import checks


class LabelSets:
    """A relation for `SelectPairs`: two samples are positives if they share a class. The label of a sample is then its
    row in a table of classes, such as its number in the data set.

    Examples:
        >>> relation = LabelSets([[0, 7], [7], [], [2, 3, 0]])  # of four pictures; the third has no class
        >>> criterion = CrossBatchMemory(SelectPairs(SupCon(0.1), relation), embedding_size=128, memory_size=8192)
        >>> criterion(network(pictures), numbers_of_pictures)

    Args:
        table: the classes of each sample, integers from 0 on: lists, or a tensor `[N, k]` filled up with negative
            numbers. A class that is listed twice counts once. It is copied: to the CPU, and to where labels are.
        jaccard: gives a positive pair the weight |shared classes| / |classes of either|, a negative one 1. The loss is
            then a `CustomLoss`.

    A sample without classes, and a label that is no row of the table, is a negative of all. The time that a pair takes
    grows with k, the size of the largest set.

    Raises:
        TypeError, ValueError: `table` is not as above.
    """

    # No buffer of a module: it would be broadcast, averaged, and left without values by `to_empty`.
    table: Tensor  # [N, k] int64, each class once, then -1

    def __init__(self, table: Tensor | Iterable[Iterable[int]], *, jaccard: bool = False) -> None:
        self.jaccard = checks.flag("jaccard", jaccard)
        self.table = self._there = _each_once(table if isinstance(table, Tensor) else _filled_up(table))

    def __call__(self, labels: Tensor, of_rows: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """`[b, n]` bool, whether anchors of `labels [b, 1]` and rows of `of_rows [1, n]` share a class; with `jaccard`
        this, its reverse, and the weights."""
        a, b = self._classes(labels[:, 0]), self._classes(of_rows[0])
        known = a[a >= 0].unique()  # few: of the anchors
        # A column for each of these classes, and the last for all others.
        has = torch.zeros((len(a), len(known) + 1), dtype=torch.float32, device=a.device)
        has[:, :-1] = (a[:, :, None] == known).any(1)
        column = torch.searchsorted(known, b)
        column = torch.where(torch.isin(b, known), column, len(known))
        shared = torch.zeros((len(a), len(b)), dtype=torch.float32, device=a.device)
        for of_b in column.T:
            shared += has.index_select(1, of_b)
        positive = shared > 0
        if not self.jaccard:
            return positive
        either = (a >= 0).sum(1)[:, None] + (b >= 0).sum(1) - shared
        return positive, ~positive, torch.where(positive, shared / either.clamp(min=1), 1.0)

    def _classes(self, labels: Tensor) -> Tensor:
        """`[n, k]` of labels `[n]`."""
        if self._there.device != labels.device:
            self._there = self.table.to(labels.device)
        N = len(self._there)
        if N == 0:
            return self._there.new_full((len(labels), self._there.shape[1]), -1)
        has = (labels >= 0) & (labels < N)
        return torch.where(has[:, None], self._there[torch.where(has, labels, 0)], -1)

    def __repr__(self) -> str:
        jaccard = ", jaccard" * self.jaccard
        return f"LabelSets({len(self.table)} samples of up to {self.table.shape[1]} classes{jaccard})"


def _filled_up(table: Any) -> Tensor:
    try:
        rows = [[*classes] for classes in table]
    except TypeError:
        raise TypeError(f"table must be lists of classes or a tensor, got {checks.kind(table)}") from None
    k = max(map(len, rows), default=0)
    for row in rows:
        for c in row:
            checks.whole("a class of the table", c, 0)
    filled = [row + [-1] * (k - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.int64, device="cpu").reshape(len(rows), k)


def _each_once(table: Tensor) -> Tensor:
    if not checks.is_dense(table) or table.is_floating_point() or table.is_complex() or table.dtype == torch.bool:
        raise TypeError(f"table must be of integers, got {checks.kind(table)}")
    if table.dim() != 2:
        raise ValueError(f"table must be [N, k], got {list(table.shape)}")
    if table.is_meta:
        raise ValueError("table is on the meta device, which holds no values")
    checks.in_int64("table", table)
    ordered = table.detach().to("cpu", torch.int64).clamp(min=-1).sort(1, descending=True).values
    if ordered.shape[1] > 0:
        again = torch.zeros_like(ordered, dtype=torch.bool)
        again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        ordered = ordered.masked_fill(again, -1).sort(1, descending=True).values
        ordered = ordered[:, : int((ordered >= 0).sum(1).max()) if len(ordered) > 0 else 0]
    return ordered.contiguous()
