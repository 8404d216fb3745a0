"""The losses: of a batch against a bank, with or without the bank's move first, and of a batch
against itself (`csrc/glue/loss.h`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from .. import checks
from .._autograd import needs_grad, with_gradient, without_autocast, writes
from ..losses import AnyLoss, OwnLoss, PairLoss, check_loss, check_unit_rows
from ..losses.learned import fold_temperature, learned_of, learned_offset
from ..options import LOSS_DEFAULTS, PAIR_DEFAULTS, LossOptions, PairOptions, complete
from ..plain.contract import Contract
from ..plain.loss import parse_loss
from ..plain.loss_of_batch import check_batch
from . import custom
from ._namespace import call, fake
from .batch import normalize
from .parts import batch_sums

__all__ = ["batch_loss", "memory_loss", "memory_loss_and_pairs", "transform_memory_loss_"]


def memory_loss(
    z: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, loss: AnyLoss, **options: Unpack[LossOptions]
) -> Tensor:
    """Loss of a batch against a bank of embeddings, differentiable in `z`, in one sweep over the bank.

    The similarity is `z_i · r_j / max(|r_j|, eps)`; neither the B×M similarities nor a second bank is ever stored. (On
    a GPU the composite way stores a chunk of them, about 24 MB, the screen a bit for each pair: `xbn_ext.loss_way`.)

    Args:
        z: `[B, D]` embeddings, usually of unit length. A loss of distances takes them to be.
        labels: `[B]` int64.
        bank: `[M, D]` contiguous; carries no gradient.
        bank_labels: `[M]` int64.
        loss: which loss, with its parameters (`xbn_ext.losses`).
        options: those of `xbn_ext.options.LossOptions`.

    Returns:
        A scalar of z's dtype. An anchor with a NaN or an Inf makes it NaN (unless it has no pairs that it would pay
        for), and its own gradient in any case.

    Raises:
        RuntimeError: an argument is not as above; or a second derivative or a forward-mode one is asked for.
        TypeError: there is no such option, or no such loss.
        ValueError: renormalize is False and the loss of distances.
    """
    return _memory_loss("memory_loss", z, labels, bank, bank_labels, loss, options)[0]


def memory_loss_and_pairs(
    z: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, loss: AnyLoss, **options: Unpack[LossOptions]
) -> tuple[Tensor, Tensor]:
    """`memory_loss`, and `pairs [2]` (float64): how many positives and negatives of an anchor have a weight, on average
    over the anchors. A pair has no weight if it is within its margin, not mined, or in no triplet that costs something.
    """
    return _memory_loss("memory_loss_and_pairs", z, labels, bank, bank_labels, loss, options)


def _memory_loss(
    function: str, z: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, loss: AnyLoss, options: LossOptions
) -> tuple[Tensor, Tensor]:
    arguments = complete(function, options, LOSS_DEFAULTS)
    checks.tensors("memory_loss", z=z, labels=labels, bank=bank, bank_labels=bank_labels)
    for name in ("scale", "shift"):
        if isinstance(arguments[name], Tensor):  # what is neither this nor None, torch refuses by name
            arguments[name] = arguments[name].double()
    if isinstance(loss, OwnLoss):
        checks.flag("renormalize", arguments["renormalize"])
        return custom.memory_loss(z, labels, bank, bank_labels, loss, arguments)
    arguments.update(labels=labels, bank=bank.detach(), bank_labels=bank_labels)
    return _ranked("memory_loss", z, loss, arguments)


def _ranked(
    op: str, z: Tensor, loss: PairLoss, arguments: dict[str, Any], written: tuple[Tensor, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Loss and pairs by an op that takes `arguments`, in the order of its schema, and what is put into them here."""
    check_loss(op, loss)
    check_unit_rows(loss, renormalize=arguments["renormalize"])
    given, (loss, z) = loss, fold_temperature(loss, z)
    need_grad = needs_grad(z)
    arguments.update(z=z.detach(), loss=loss.kind, parameters=loss.parameters, need_grad=need_grad)
    writes(*written)
    value, grad_z, pairs = call(op, arguments)
    if need_grad:
        value = with_gradient(value, z, grad_z, *learned_of(given))
    return with_offset(value, given, pairs, z), pairs


def with_offset(value: Tensor, loss: PairLoss, pairs: Tensor, *others: Tensor) -> Tensor:
    """`value`, which depends also on what the loss shifts similarities by, if that is learned; `pairs [2]` are its.
    That derivative depends on the others."""
    offset = learned_offset(loss)
    if offset is None or not torch.is_grad_enabled():
        return value
    slope = loss.slope(*pairs.detach().unbind()).to(offset.dtype).reshape(offset.shape)
    return value + with_gradient(torch.zeros_like(value), offset, slope, *others, *learned_of(loss))


@fake("memory_loss")
def _memory_loss_fake(z: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_grad = args[-1]
    grad_z = z.new_empty(z.shape if need_grad else (0, z.shape[1]))
    return z.new_empty(()), grad_z, z.new_empty(2, dtype=torch.float64)


def transform_memory_loss_(
    bank: Tensor,
    sums: Tensor,
    scale: Tensor,
    shift: Tensor,
    count: Tensor,
    z: Tensor,
    labels: Tensor,
    bank_labels: Tensor,
    loss: PairLoss,
    *,
    ranked: Tensor | None = None,
    **options: Unpack[PairOptions],
) -> tuple[Tensor, Tensor]:
    """`transform_`, then `memory_loss_and_pairs` of the moved bank. On a CPU one sweep does both where batch and bank
    have the same dtype, the batch has at most 256 rows and `ranked` is None or equals `count`; mined losses and all
    triplets always take two.

    Args:
        ranked: int64 scalar, how many of the `count` rows are ranked against; None: all.
        options: those of `xbn_ext.options.PairOptions`.

    The other arguments are those of the two ops. `z` must not share memory with `bank`.
    """
    arguments = complete("transform_memory_loss_", options, PAIR_DEFAULTS)
    checks.tensors("transform_memory_loss_", z=z)
    arguments.update(bank=bank, sums=sums, scale=scale, shift=shift, count=count, ranked=ranked)
    arguments.update(labels=labels, bank_labels=bank_labels)
    return _ranked("transform_memory_loss_", z, loss, arguments, written=(bank, sums, scale, shift))


@fake("transform_memory_loss_")
def _(
    bank: Tensor, sums: Tensor, scale: Tensor, shift: Tensor, count: Tensor, z: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _memory_loss_fake(z, *args)  # type: ignore[no-any-return]


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
    if z.dim() != 2 or z.dtype not in (torch.float32, torch.float64):  # the op would speak of its products
        raise RuntimeError(f"batch_loss: z must be [B, D], float32 or float64, got {z.dtype} {list(z.shape)}")
    if labels.shape != z.shape[:1]:
        raise RuntimeError(f"batch_loss: labels must be [B] ({len(z)}), got {list(labels.shape)}")
    Contract("batch_loss", z).eps(eps)  # not every way below looks at it, or as this op
    with without_autocast(z.device.type):
        if not renormalize:
            z = not_finite_as_nan(z)
        if isinstance(loss, OwnLoss):
            checks.flag("renormalize", renormalize)
            return custom.batch_loss(z, labels, loss, ids, anchors, renormalize, eps)
        if learned_offset(loss) is not None and torch.is_grad_enabled():
            return _in_sums(z, labels, loss, ids, anchors, renormalize, eps)
        loss, sides = sides_of(loss, z, renormalize, eps)
        options = {"labels": labels, "ids": ids, "anchors": anchors, "eps": eps}
        if sides is None:
            rows, need_grad = z.detach(), needs_grad(z)
            value, grad_dots = _from_products(rows @ rows.T, loss, renormalize, need_grad, options)
            return with_gradient(value, z, (grad_dots + grad_dots.T) @ rows) if need_grad else value
        # Both gradients are made here: a backward pass inside an autocast block would take these products in 16 bits.
        need_grad, (ranking, rows) = needs_grad(sides), sides.detach().tensor_split(2)
        value, grad_dots = _from_products(ranking @ rows.T, loss, False, need_grad, options)
        if not need_grad:
            return value
        return with_gradient(value, sides, torch.cat((grad_dots @ rows, grad_dots.T @ ranking)))


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
    folded, scaled = fold_temperature(loss, z)
    sides = torch.cat((scaled, normalize(z, eps) if renormalize else z))
    ranking, rows = sides.detach().tensor_split(2)
    need_grad, dots = needs_grad(sides), ranking @ rows.T
    # batch_sums would speak of itself.
    check_batch(Contract("batch_loss", dots), dots, labels, ids, anchors, None)
    parse_loss("batch_loss", folded.kind, folded.parameters)
    totals, by_dots = batch_sums(dots, labels, folded, ids=ids, anchors=anchors, need_grad=need_grad)
    average = 1 / totals[2].clamp(min=1)
    value = (average * totals[0]).to(z.dtype)
    if need_grad:
        by_dots = by_dots * average.to(z.dtype)
        value = with_gradient(value, sides, torch.cat((by_dots @ rows, by_dots.T @ ranking)), *learned_of(loss))
    return with_offset(value, loss, totals[5:] / totals[4].clamp(min=1), sides)


def not_finite_as_nan(z: Tensor) -> Tensor:
    """A copy of `z [B, D]` with NaN for each row that has a NaN or an Inf: where no norm makes that of it, a product of
    Inf could cost nothing."""
    return z * torch.where(z.isfinite().all(dim=1, keepdim=True), 1.0, torch.nan).to(z.dtype)


def sides_of(loss: PairLoss, z: Tensor, renormalize: bool, eps: float) -> tuple[PairLoss, Tensor | None]:
    """A loss with a temperature that is a tensor, as one with a number, and `[2 B, D]`: the rows of `z [B, D]` divided
    by the temperature, which rank, and those that are ranked. The norms of these cannot be found in the products, so
    they are normalised, if they are to be. None where the batch is both sides."""
    folded, scaled = fold_temperature(loss, z)
    return folded, None if scaled is z else torch.cat((scaled, normalize(z, eps) if renormalize else z))


@fake("batch_loss")
def _(dots: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    need_grad = args[-1]
    return dots.new_empty(()), dots.new_empty(dots.shape if need_grad else (0, dots.shape[1]))
