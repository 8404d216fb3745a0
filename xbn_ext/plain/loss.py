"""The ops of the loss: `memory_loss`, `transform_memory_loss_`, `batch_loss`. They differ in where similarities come
from; `losses.py` has what the losses make of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..losses import KINDS, PairLoss
from .bank import check_transform, write_map
from .chunks import exact
from .contract import Contract, apart, check, dense
from .losses import BY_KIND
from .similarities import BankSimilarities, BatchSimilarities


@exact
def memory_loss(
    z: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, count: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, bank_ids: Tensor | None, exclude: Tensor | None, anchors: Tensor | None, loss: str,
    parameters: Sequence[float], renormalize: bool, eps: float, need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """On a CPU it takes the first `count` rows; on another device all, masked, so that the host does not wait for that
    number. A loss of all triplets makes it wait once."""
    op = "memory_loss"
    c = check_memory_loss(op, z, labels, bank, bank_labels, count, scale, shift, bank_ids, exclude, anchors, eps)
    pair_loss = parse_loss(op, loss, parameters)
    if count is not None:
        c.value("count", count, len(bank))

    similarities = BankSimilarities(
        z, labels, bank, bank_labels, count, scale, shift, bank_ids, exclude, anchors, renormalize, eps
    )
    return loss_of(similarities, pair_loss, need_grad)


@exact
def transform_memory_loss_(
    bank: Tensor, sums: Tensor, scale: Tensor, shift: Tensor, count: Tensor, z: Tensor, labels: Tensor,
    bank_labels: Tensor, ranked: Tensor | None, bank_ids: Tensor | None, exclude: Tensor | None,
    anchors: Tensor | None, loss: str, parameters: Sequence[float], renormalize: bool, eps: float, need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    op = "transform_memory_loss_"
    c = check_transform(op, bank, sums, scale, shift, count)
    check_memory_loss(op, z, labels, bank, bank_labels, None, scale, shift, bank_ids, exclude, anchors, eps)
    if ranked is not None:
        c.counter("ranked", ranked)
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
    similarities = BankSimilarities(
        z, labels, bank, bank_labels, rows, None, None, bank_ids, exclude, anchors, renormalize, eps
    )
    return loss_of(similarities, pair_loss, need_grad)


@exact
def batch_loss(
    dots: Tensor, labels: Tensor, ids: Tensor | None, anchors: Tensor | None, loss: str, parameters: Sequence[float],
    renormalize: bool, eps: float, need_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    c = Contract("batch_loss", dots)
    c.floating("dots", dots)
    B = labels.shape[0] if labels.dim() == 1 else dots.shape[0] if dots.dim() > 0 else 0
    c.shape("dots", dots, "[B, B]", (B, B))
    c.labels("labels", labels, "[B]", B)
    if ids is not None:
        c.labels("ids", ids, "[B]", B)
    c.rows_mask("anchors", anchors, B)
    c.eps(eps)
    pair_loss = parse_loss("batch_loss", loss, parameters)

    return loss_of(BatchSimilarities(dots, labels, ids, anchors, renormalize, eps), pair_loss, need_grad)[:2]


def loss_of(
    similarities: BankSimilarities | BatchSimilarities, loss: PairLoss, need_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its gradient `[B, n]` (`[0, n]` unless `need_grad`) and pairs `[2]` per anchor."""
    pairs = BY_KIND[loss.kind](loss, similarities.grad, similarities.anchors)
    pairs.run(similarities, need_grad)
    grad = similarities.gradient() if need_grad else similarities.grad.new_empty((0, similarities.grad.shape[1]))
    return pairs.value.to(grad.dtype), grad, pairs.counts / pairs.number_of_anchors()


def check_memory_loss(
    op: str, z: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, count: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, bank_ids: Tensor | None, exclude: Tensor | None, anchors: Tensor | None, eps: float,
) -> Contract:  # fmt: skip
    c = Contract(op, z)
    c.matrix("z", z, "[B, D]", (None, None))
    B, D = z.shape
    c.labels("labels", labels, "[B]", B)
    c.bank("bank", bank, D)
    M = bank.shape[0]
    c.labels("bank_labels", bank_labels, "[M]", M)
    if count is not None:
        c.counter("count", count)
    check((scale is None) == (shift is None), f"{op}: scale and shift go together")
    if scale is not None:
        c.statistic("scale", scale, "[D]", (D,))
    if shift is not None:
        c.statistic("shift", shift, "[D]", (D,))
    check(exclude is not None or bank_ids is None, f"{op}: bank_ids are for exclude, which is missing")
    if bank_ids is not None:
        c.labels("bank_ids", bank_ids, "[M]", M)
    if exclude is not None:
        c.labels("exclude", exclude, "[B]", B)
    c.rows_mask("anchors", anchors, B)
    c.eps(eps)
    return c


def parse_loss(op: str, kind: str, parameters: Sequence[float]) -> PairLoss:
    """The loss by its `kind` and its `parameters`."""
    check(kind in KINDS, f"{op}: unknown loss '{kind}'")
    loss = KINDS[kind]
    takes = len(loss.parameters)
    check(len(parameters) == takes, f"{op}: {kind} takes {takes} parameters, got {len(parameters)}")
    check(all(map(math.isfinite, parameters)), f"{op}: the parameters of {kind} must be finite")
    for name, value in zip(loss.numbers(), parameters, strict=True):
        in_range = name not in loss.must_be_positive or 1e-30 <= value <= 1e30  # float32 holds it and its reciprocal
        check(in_range, f"{op}: the {name} of {kind} must be within [1e-30, 1e30], got {value:g}")
    return loss.with_parameters(parameters)
