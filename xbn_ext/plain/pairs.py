"""The pairs of a loss, a chunk of the bank at a time.

A loss looks at all chunks, at most twice, to collect a few numbers per anchor, and then weighs the pairs of each chunk:
their dLoss/ds. What is kept meanwhile is [B]. No shape depends on the data, and the host waits for nothing; of all
triplets (`triplets.py`) neither holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ..losses import PairLoss


class Chunk(NamedTuple):
    """Some rows of the bank against the batch."""

    s: Tensor  # [B, n] similarities; NaN of an anchor that is not finite
    positive: Tensor  # [B, n] bool, the pairs of one label
    negative: Tensor  # [B, n] bool, the other pairs: what is neither is no pair
    start: int  # number of the first row
    rows: Tensor | None = None  # [n, D]
    norm: Tensor | None = None  # [n], what the products with the rows have been divided by
    weight: Tensor | None = None  # [B, n], what the terms of a `CustomLoss` are multiplied by


class Similarities(Protocol):
    """What the pairs of a loss come from, and where their weights go."""

    anchors: Tensor | None  # [B] bool, None: all
    grad: Tensor  # [B, n], what the weights so far add up to

    def chunks(self) -> Iterator[Chunk]:
        """All rows of the bank, in order."""

    def positives(self) -> Tensor:
        """`[B]` how many positives each anchor has."""

    def add(self, chunk: Chunk, weight: Tensor) -> None:
        """Adds to the gradient what comes of `weight [B, n]`, which may be overwritten: dLoss/ds of the chunk."""

    def add_columns(self, column: Tensor, weight: Tensor) -> None:
        """The same of one row for each anchor: `column [B]` int64, -1 for none, and `weight [B]`."""

    def scale(self, factor: Tensor) -> None:
        """Multiplies the gradient by a scalar."""

    def gradient(self) -> Tensor:
        """What the op returns as the gradient, from `grad`."""


Look = Callable[[Chunk], None]


L = TypeVar("L", bound=PairLoss)


class Pairs(Generic[L]):
    """A loss over the anchors `[B]` (None: all) of z; only the length, dtype and device of z are used.

    Sums are float64 on the device of z. After `run`, `value [2]` is what the two groups of pairs cost, `number [2]`
    what that is divided by, if it is not 0, and the loss the sum of the quotients; `counts [2]` is how many positives
    and negatives have a weight. Where `averages` is set to False, weights are the derivative of what the pairs cost.
    """

    def __init__(self, loss: L, z: Tensor, anchors: Tensor | None) -> None:
        self.loss, self.averages = loss, True
        self.B, self.dtype = len(z), z.dtype
        self.anchors = anchors
        self.value = z.new_zeros(2, dtype=torch.float64)
        self.number, self.counts = torch.zeros_like(self.value), torch.zeros_like(self.value)
        self.looks: list[Look] = []

    def run(self, similarities: Similarities, need_grad: bool) -> None:
        for look in self.looks:
            for chunk in similarities.chunks():
                look(chunk)
        self.finish()
        for chunk in similarities.chunks():
            weight = self.weigh(chunk)
            if need_grad:
                similarities.add(chunk, weight)

    def finish(self) -> None:
        """After the last look."""

    def weigh(self, chunk: Chunk) -> Tensor:
        """The weights of a chunk, whose similarities may be overwritten; counts its pairs."""
        raise NotImplementedError

    def zeros(self) -> Tensor:
        return self.value.new_zeros(self.B)

    def number_of_anchors(self) -> Tensor:
        return torch.full_like(self.value[0], self.B) if self.anchors is None else self.anchors.sum().double()

    def shares(self) -> Tensor:
        """`[2]` what the weights of the groups are multiplied by, once their numbers are known."""
        return 1 / self.number.clamp(min=1) if self.averages else torch.ones_like(self.number)

    def count(self, positive: Tensor, negative: Tensor) -> None:
        self.counts += torch.stack([positive.sum(), negative.sum()])

    def narrow(self, t: Tensor) -> Tensor:
        """`[B, 1]` in the dtype of the similarities."""
        return t.to(self.dtype)[:, None]


class LogSum:
    """`[B]` log of a sum of e^x over chunks; -inf where the sum is empty."""

    def __init__(self, zeros: Tensor) -> None:
        self.value = torch.full_like(zeros, -torch.inf)

    def add(self, x: Tensor, keep: Tensor) -> None:
        """Overwrites x."""
        self.value = torch.logaddexp(self.value, x.masked_fill_(~keep, -torch.inf).logsumexp(1).double())


class Hardest:
    """`[B]` the similarities of each anchor's hardest pairs and the rows they are with, -1 for none. Of equals the
    first row. A NaN is harder than any number; an infinite similarity that is the least hard is no row's."""

    def __init__(self, z: Tensor) -> None:
        self.positive = z.new_full((len(z),), torch.inf)  # not by a column: `[0, 0]` has none
        self.negative = -self.positive
        self.positive_row = torch.full_like(self.positive, -1, dtype=torch.int64)
        self.negative_row = self.positive_row.clone()

    def look(self, chunk: Chunk) -> None:
        s, row = chunk.s.masked_fill(~chunk.negative, -torch.inf).max(1)
        harder = ~(s <= self.negative) & ~self.negative.isnan()
        self.negative = torch.where(harder, s, self.negative)
        self.negative_row = torch.where(harder, row + chunk.start, self.negative_row)
        s, row = chunk.s.masked_fill(~chunk.positive, torch.inf).min(1)
        harder = ~(s >= self.positive) & ~self.positive.isnan()
        self.positive = torch.where(harder, s, self.positive)
        self.positive_row = torch.where(harder, row + chunk.start, self.positive_row)
