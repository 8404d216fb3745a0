"""The loss of a batch against itself (`csrc/glue/loss_of_batch.h`), and what some of its rows add to it: these have met
all rows, so the totals of such parts are only to be added."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from .._autograd import needs_grad, with_gradient, without_autocast
from ..losses import AnyLoss, OwnLoss, PairLoss, check_loss, check_unit_rows
from ..losses.learned import (
    fold_temperature,
    has_sides,
    learned_of,
    learned_offset,
    learns_temperature,
    with_offset,
    with_temperature,
)
from ..plain.contract import Contract
from ..plain.loss import parse_loss
from ..plain.loss_of_batch import check_batch
from ..reference.loss import nan_unless_finite
from . import custom
from ._namespace import call, fake
from .batch import normalize
from .loss_of_memory import averages

__all__ = ["batch_loss", "batch_sums"]


def batch_loss(
    z: Tensor,
    labels: Tensor,
    loss: AnyLoss,
    *,
    ids: Tensor | None = None,
    anchors: Tensor | None = None,
    renormalize: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """Loss of a batch against itself: each anchor with all other rows. Differentiable in `z` on both sides.

    Holds the B×B similarities and their gradient while it runs.

    Args:
        z: `[B, D]` embeddings. A loss of distances takes them to be of unit length.
        labels: `[B]` int64.
        loss: which loss, with its parameters (`xbn_ext.losses`).
        ids: `[B]` int64 sample ids: rows with the same id (>= 0) are not paired.
        anchors: `[B]` bool, the rows that rank; None: all. Every row is ranked.
        renormalize: the similarity is `z_i · z_j / max(|z_j|, eps)`; False: `z_i · z_j`.
        eps: lower bound of a row's norm.

    Returns:
        A scalar of z's dtype. A row with a NaN or an Inf makes it NaN (unless no anchor that pays has a pair with it),
        and the gradient in any case.

    Raises:
        RuntimeError: an argument is not as above; or a second derivative or a forward-mode one is asked for.
        ValueError: renormalize is False and the loss of distances.
    """
    checks.tensors("batch_loss", z=z, labels=labels)
    if not isinstance(loss, OwnLoss):
        check_loss("batch_loss", loss)
    check_unit_rows(loss, renormalize=renormalize)
    return of_batch(z, labels, loss, ids=ids, anchors=anchors, renormalize=renormalize, eps=eps)


def of_batch(
    z: Tensor, labels: Tensor, loss: AnyLoss, *, ids: Tensor | None, anchors: Tensor | None, renormalize: bool,
    eps: float,
) -> Tensor:  # fmt: skip
    """As `batch_loss`; without `renormalize` rows that a loss of distances takes may be of unit length already."""
    if z.dim() != 2 or z.dtype not in (torch.float32, torch.float64):  # the op would speak of its products
        raise RuntimeError(f"batch_loss: z must be [B, D], float32 or float64, got {z.dtype} {list(z.shape)}")
    if labels.shape != z.shape[:1]:
        raise RuntimeError(f"batch_loss: labels must be [B] ({len(z)}), got {list(labels.shape)}")
    Contract("batch_loss", z).eps(eps)  # not every way below looks at it, or as this op
    with without_autocast(z.device.type):
        if not renormalize:
            z = nan_unless_finite(z)
        if isinstance(loss, OwnLoss):
            checks.flag("renormalize", renormalize)
            return custom.batch_loss(z, labels, loss, ids, anchors, renormalize, eps)
        if learned_offset(loss) is not None and torch.is_grad_enabled():
            return _in_sums(z, labels, loss, ids, anchors, renormalize, eps)
        options = {"labels": labels, "ids": ids, "anchors": anchors, "eps": eps}
        if not has_sides(loss):
            rows, need_grad = z.detach(), needs_grad(z)
            value, grad_dots = _from_products(rows @ rows.T, loss, renormalize, need_grad, options)
            return with_gradient(value, z, (grad_dots + grad_dots.T) @ rows) if need_grad else value
        # Both gradients are made here: a backward pass inside an autocast block would take these products in 16 bits.
        given, (loss, sides) = loss, sides_of(loss, z, renormalize, eps)
        need_grad, (ranking, rows) = needs_grad(sides) or learns_temperature(given), sides.detach().tensor_split(2)
        value, grad_dots = _from_products(ranking @ rows.T, loss, False, need_grad, options)
        if not need_grad:
            return value
        by_ranking = grad_dots @ rows
        value = with_gradient(value, sides, torch.cat((by_ranking, grad_dots.T @ ranking)), *learned_of(given))
        return with_temperature(value, given, by_ranking, ranking, sides)


def _from_products(
    dots: Tensor, loss: PairLoss, renormalize: bool, need_grad: bool, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The loss, and its derivative G by the products `dots [B, B]` of anchors and rows: by a batch z that is both it is
    `(G + Gᵀ) z`."""
    arguments = {"dots": dots, "loss": loss.kind, "parameters": loss.parameters, "renormalize": renormalize}
    return call("batch_loss", {**arguments, **options, "need_grad": need_grad})  # type: ignore[no-any-return]


def _in_sums(
    z: Tensor, labels: Tensor, loss: PairLoss, ids: Tensor | None, anchors: Tensor | None, renormalize: bool, eps: float
) -> Tensor:
    """The loss of a batch whose offset is learned, by the op that says how many pairs there were."""
    folded, sides = sides_of(loss, z, renormalize, eps)
    ranking, rows = sides.detach().tensor_split(2)
    need_grad, dots = needs_grad(sides) or learns_temperature(loss), ranking @ rows.T
    # batch_sums would speak of itself.
    check_batch(Contract("batch_loss", dots), dots, labels, ids, anchors, None)
    parse_loss("batch_loss", folded.kind, folded.parameters)
    totals, by_dots = batch_sums(dots, labels, folded, ids=ids, anchors=anchors, need_grad=need_grad)
    value, average, pairs = averages(totals, z.dtype)
    if need_grad:
        by_dots = by_dots * average[0].to(z.dtype)
        by_ranking = by_dots @ rows
        value = with_gradient(value, sides, torch.cat((by_ranking, by_dots.T @ ranking)), *learned_of(loss))
        value = with_temperature(value, loss, by_ranking, ranking, sides, *learned_of(loss))
    return with_offset(value, loss, pairs, sides)


def sides_of(loss: PairLoss, z: Tensor, renormalize: bool, eps: float) -> tuple[PairLoss, Tensor]:
    """A loss with a number for its temperature, and `[2 B, D]`: the rows of `z [B, D]`, which rank, divided by the
    temperature if that is a tensor, and those that are ranked. The norms of these cannot be found in the products, so
    they are normalised, if they are to be."""
    folded, scaled = fold_temperature(loss, z)
    return folded, torch.cat((scaled, normalize(z, eps) if renormalize else z))


@fake("batch_loss")
def _(dots: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    need_grad = args[-1]
    return dots.new_empty(()), dots.new_empty(dots.shape if need_grad else (0, dots.shape[1]))


def batch_sums(
    dots: Tensor,
    labels: Tensor,
    loss: PairLoss,
    *,
    first: int = 0,
    ids: Tensor | None = None,
    anchors: Tensor | None = None,
    need_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """What some rows of a batch add to `batch_loss` of the whole.

    Args:
        dots: `[A, B]` float32 or float64, the similarity of each of these rows with every row of the batch.
        labels: `[B]` int64, of the batch.
        loss: any but DCLW, which weighs pairs by a mean over all anchors; its temperature is a number.
        first: number of the first of these rows in the batch. None is paired with itself.
        ids: `[B]` int64 sample ids: rows with the same id (>= 0) are not paired.
        anchors: `[A]` bool, those of the rows that rank; None: all.
        need_grad: False leaves out the second result.

    Returns:
        totals `[7]` float64, those of `settle_sums`, which add up over the parts of a batch; and `[A, B]` the
        derivative of its `value` by dots. That of the loss is this times the average of the pair's group, `1 /
        max(count, 1)` of the whole batch: Contrastive with "avg_nonzero" has its negatives in the first group and its
        positives in the second, the other losses have all in the first. Of a row whose product with itself is not
        finite all similarities are NaN. Neither result has a derivative.

    Raises:
        RuntimeError: an argument is not as above, naming it.
        TypeError: no such loss.
    """
    checks.tensors("batch_sums", dots=dots)
    check_loss("batch_sums", loss)
    arguments: dict[str, Any] = {
        "dots": dots.detach(),
        "labels": labels,
        "ids": ids,
        "anchors": anchors,
        "first": first,
    }
    arguments.update(loss=loss.kind, parameters=loss.parameters, need_grad=need_grad)
    return call("batch_sums", arguments)  # type: ignore[no-any-return]


@fake("batch_sums")
def _(dots: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    A, B = dots.shape
    return dots.new_empty(7, dtype=torch.float64), dots.new_empty(A if args[-1] else 0, B)
