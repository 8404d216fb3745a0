"""The loss against the memory, whole or in parts: a part adds up its chunks as the whole adds up its parts. And the
B x M similarities that it is computed from, which are never stored. They come in chunks, as often as a loss asks for
them. They and the gradient are of the dtype of the embeddings, sums over pairs float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..losses import PairLoss
from ..reference import parts as reference
from ..reference import programs
from . import chunks
from .bank import check_transform, write_map
from .chunks import exact, is_finite
from .contract import Contract, apart, check, dense
from .loss import loss_of, parse_loss
from .pairs import Chunk


@dataclass(frozen=True)
class Ranked:
    """What a batch is ranked against, and how: all of `xbn_ext.options.LossOptions`, with its defaults."""

    count: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    bank_ids: Tensor | None = None
    exclude: Tensor | None = None
    anchors: Tensor | None = None
    renormalize: bool = True
    eps: float = 1e-6


@exact
def memory_loss(
    z: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, count: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, bank_ids: Tensor | None, exclude: Tensor | None, anchors: Tensor | None, loss: str,
    parameters: Sequence[float], renormalize: bool, eps: float, need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """On a CPU it takes the first `count` rows; on another device all, masked, so that the host does not wait for that
    number. A loss of all triplets makes it wait once."""
    op = "memory_loss"
    c, told = Contract(op, z), Ranked(count, scale, shift, bank_ids, exclude, anchors, renormalize, eps)
    check_memory_loss(c, z, labels, bank, bank_labels, told)
    pair_loss = parse_loss(op, loss, parameters)
    if count is not None:
        c.value("count", count, len(bank))
    return loss_of(BankSimilarities(z, labels, bank, bank_labels, told), pair_loss, need_grad)


@exact
def transform_memory_loss_(
    bank: Tensor, sums: Tensor, scale: Tensor, shift: Tensor, count: Tensor, z: Tensor, labels: Tensor,
    bank_labels: Tensor, ranked: Tensor | None, bank_ids: Tensor | None, exclude: Tensor | None,
    anchors: Tensor | None, loss: str, parameters: Sequence[float], renormalize: bool, eps: float, need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    op = "transform_memory_loss_"
    c = check_transform(op, bank, sums, scale, shift, count)
    if ranked is not None:
        c.counter("ranked", ranked)
    told = Ranked(None, scale, shift, bank_ids, exclude, anchors, renormalize, eps)
    check_memory_loss(c, z, labels, bank, bank_labels, told)
    pair_loss = parse_loss(op, loss, parameters)
    z, labels, bank_labels = z.contiguous(), labels.contiguous(), bank_labels.contiguous()
    bank_ids, exclude, anchors = dense(bank_ids), dense(exclude), dense(anchors)
    read = {
        "count": count, "z": z, "labels": labels, "bank_labels": bank_labels, "ranked": ranked, "bank_ids": bank_ids,
        "exclude": exclude, "anchors": anchors,
    }  # fmt: skip
    apart(op, {"bank": bank, "sums": sums, "scale": scale, "shift": shift}, read)
    c.value("count", count, len(bank))
    if ranked is not None:
        c.value("ranked", ranked, len(bank))

    write_map(bank, sums, scale, shift, count)
    rows = count if ranked is None else ranked
    told = replace(told, count=rows, scale=None, shift=None, bank_ids=bank_ids, exclude=exclude, anchors=anchors)
    return loss_of(BankSimilarities(z, labels, bank, bank_labels, told), pair_loss, need_grad)


@exact
def memory_sums(
    z: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, count: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, bank_ids: Tensor | None, exclude: Tensor | None, anchors: Tensor | None,
    given: Tensor | None, loss: str, parameters: Sequence[float], number: int, first: int, renormalize: bool,
    eps: float, need_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `memory_loss`, it takes the first `count` rows on a CPU, elsewhere all."""
    op = "memory_sums"
    c, told = Contract(op, z), Ranked(count, scale, shift, bank_ids, exclude, anchors, renormalize, eps)
    check_memory_loss(c, z, labels, bank, bank_labels, told)
    pair_loss = parse_loss(op, loss, parameters)
    passes = _passes_of(op, pair_loss)
    check(0 <= number < passes, f"{op}: number must be within [0, {passes - 1}], got {number}")
    check(first >= 0, f"{op}: first must not be negative, got {first}")
    check((given is not None) == (number > 0), f"{op}: given is for all passes but the first")
    B, D = z.shape
    if given is not None:
        c.statistic("given", given, "[B]", (B,))
    if count is not None:
        c.value("count", count, len(bank))

    slots = programs.program(pair_loss)[number]
    sums, grads = z.new_zeros(2, B, 4, dtype=torch.float64), z.new_zeros(2, B, D)
    for k, slot in slots.items():
        sums[k] = reference.no_sums(slot, z)
    of_anchor = z.new_zeros(B) if given is None else given.to(z.dtype)
    for chunk in BankSimilarities(z, labels, bank, bank_labels, told).chunks():
        assert chunk.rows is not None
        rows = chunk.rows if chunk.norm is None else chunk.rows / chunk.norm[:, None]
        pair = chunk.positive | chunk.negative
        for k, slot in slots.items():
            more, of_chunk = reference.score(slot, chunk.s, chunk.positive, pair, of_anchor, rows, first + chunk.start)
            before, sums[k] = sums[k].clone(), reference.add(slot, sums[k], more)
            if need_grad:
                grads[k] = reference.add_grads(slot, before, grads[k], more, of_chunk, sums[k])
    if anchors is not None:
        sums[:, ~anchors] = 0
    return sums, grads if need_grad else grads[:, :0].contiguous()


@exact
def settle_sums(
    parts: Tensor, anchors: Tensor | None, loss: str, parameters: Sequence[float], passes: int
) -> tuple[Tensor, Tensor, Tensor]:
    op = "settle_sums"
    c = Contract(op, parts)
    c.statistic("parts", parts, "[n, 2, B, 4]", (None, 2, None, 4))
    check(len(parts) > 0, f"{op}: parts must be of one part at least")
    c.rows_mask("anchors", anchors, parts.shape[2])
    pair_loss = parse_loss(op, loss, parameters)
    most = _passes_of(op, pair_loss)
    check(1 <= passes <= most, f"{op}: passes must be within [1, {most}], got {passes}")
    return reference.settle_sums(parts, pair_loss, passes, anchors)


def _passes_of(op: str, loss: PairLoss) -> int:
    check(bool(loss.passes), f"{op}: {loss.kind} has no sums that could be added up")
    return len(loss.passes)


def check_memory_loss(c: Contract, z: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, told: Ranked) -> None:
    c.matrix("z", z, "[B, D]", (None, None))
    B, D = z.shape
    c.labels("labels", labels, "[B]", B)
    c.bank("bank", bank, D)
    M = bank.shape[0]
    c.labels("bank_labels", bank_labels, "[M]", M)
    if told.count is not None:
        c.counter("count", told.count)
    check((told.scale is None) == (told.shift is None), f"{c.op}: scale and shift go together")
    if told.scale is not None:
        c.statistic("scale", told.scale, "[D]", (D,))
    if told.shift is not None:
        c.statistic("shift", told.shift, "[D]", (D,))
    check(told.exclude is not None or told.bank_ids is None, f"{c.op}: bank_ids are for exclude, which is missing")
    if told.bank_ids is not None:
        c.labels("bank_ids", told.bank_ids, "[M]", M)
    if told.exclude is not None:
        c.labels("exclude", told.exclude, "[B]", B)
    c.rows_mask("anchors", told.anchors, B)
    c.eps(told.eps)


class BankSimilarities:
    """Of anchors `z [B, D]` and bank rows, with the gradient `grad [B, D]` by z."""

    def __init__(self, z: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, told: Ranked) -> None:
        scale, shift, exclude = told.scale, told.shift, told.exclude
        self.finite = is_finite(z)[:, None]
        self.z = torch.where(self.finite, z, torch.nan)
        self.labels, self.bank, self.bank_labels = labels[:, None], bank, bank_labels
        self.bank_ids = told.bank_ids
        self.anchors = told.anchors
        self.renormalize, self.eps = told.renormalize, told.eps
        self.n, self.count = chunks.filled_rows(told.count, len(bank))
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
            yield self.excluded(start, stop)
        if self.count is not None:
            yield self.numbers(start, stop) >= self.count

    def excluded(self, start: int, stop: int, anchors: slice = slice(None)) -> Tensor:
        """`[B, n]` bool, or of some anchors: the rows with which they must not be paired."""
        assert self.exclude is not None
        ids = self.numbers(start, stop) if self.bank_ids is None else self.bank_ids[start:stop]
        return (self.exclude[anchors] == ids) & self.has_id[anchors]

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
