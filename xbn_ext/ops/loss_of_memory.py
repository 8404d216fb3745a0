"""The loss of a batch against a bank (`csrc/glue/loss_of_memory.h`), with or without the bank's move first; or against
a bank in parts: each adds up what it has for each anchor, pass by pass, and the sums of all parts settle the loss, and
what the gradient of each is multiplied by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from .. import checks
from .._autograd import needs_grad, with_gradient, writes
from ..losses import AnyLoss, OwnLoss, PairLoss, check_loss, check_unit_rows
from ..losses.learned import fold_temperature, learned_of, learns_temperature, with_offset, with_temperature
from ..options import LOSS_DEFAULTS, PAIR_DEFAULTS, LossOptions, PairOptions, complete
from . import custom
from ._namespace import call, fake

__all__ = ["memory_loss", "memory_loss_and_pairs", "memory_sums", "settle_sums", "transform_memory_loss_"]


def memory_loss(
    z: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, loss: AnyLoss, **options: Unpack[LossOptions]
) -> Tensor:
    """Loss of a batch against a bank of embeddings, differentiable in `z`, in one sweep over the bank.

    The similarity is `z_i · r_j / max(|r_j|, eps)`; neither the B×M similarities nor a second bank is ever stored. (On
    a GPU the ways "halves" and "composite" store a chunk of them, 24 to 32 MB, and "screen" a bit for each pair:
    `xbn_ext.loss_way`.)

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
    _widen(arguments)
    if isinstance(loss, OwnLoss):
        checks.flag("renormalize", arguments["renormalize"])
        check_unit_rows(loss, renormalize=arguments["renormalize"])
        return custom.memory_loss(z, labels, bank, bank_labels, loss, arguments)
    arguments.update(labels=labels, bank=bank.detach(), bank_labels=bank_labels)
    return _ranked("memory_loss", z, loss, arguments)


def _widen(arguments: dict[str, Any]) -> None:
    """Makes the map float64. What is neither a tensor nor None, torch refuses by name."""
    for name in ("scale", "shift"):
        if isinstance(arguments[name], Tensor):
            arguments[name] = arguments[name].double()


def _ranked(
    op: str, z: Tensor, loss: PairLoss, arguments: dict[str, Any], written: tuple[Tensor, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Loss and pairs by an op that takes `arguments`, in the order of its schema, and what is put into them here."""
    check_loss(op, loss)
    check_unit_rows(loss, renormalize=arguments["renormalize"])
    given, (loss, z) = loss, fold_temperature(loss, z)
    need_grad = needs_grad(z) or learns_temperature(given)
    arguments.update(z=z.detach(), loss=loss.kind, parameters=loss.parameters, need_grad=need_grad)
    writes(*written)
    value, grad_z, pairs = call(op, arguments)
    if need_grad:
        value = with_gradient(value, z, grad_z, *learned_of(given))
        value = with_temperature(value, given, grad_z, z, *learned_of(given))
    return with_offset(value, given, pairs, z), pairs


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


def memory_sums(
    z: Tensor,
    labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    loss: PairLoss,
    *,
    number: int = 0,
    given: Tensor | None = None,
    first: int = 0,
    need_grad: bool = True,
    **options: Unpack[LossOptions],
) -> tuple[Tensor, Tensor]:
    """One pass of a loss of a batch against a bank that is a part of a longer one.

    Args:
        loss: any but all triplets, which have no sums that could be added up; its temperature is a number.
        number: of the pass, from 0; `loss.passes` has for each the slots that it fills.
        given: `[B]` float64, what `settle_sums` gave after the passes before; None for the first.
        first: number of the bank's first row in the longer one, which hardest triplets are known by.
        need_grad: False leaves out the second result.

    The others are those of `memory_loss`; without `bank_ids`, rows are numbered from 0 in each part.

    Returns:
        sums `[2, B, 4]` float64: of each slot value, weight, pairs, and shift, as `csrc/math/losses.h` has them; and
        grads `[2, B, D]`, the sum of weight times row, of exponents scaled by e^-shift, of an extreme its row. Both are
        zeros in a slot that the pass does not fill, and where a row does not rank. Neither has a derivative.

    Raises:
        RuntimeError: an argument is not as above, naming it.
        TypeError: there is no such option, or no such loss.
        ValueError: renormalize is False and the loss of distances.
    """
    checks.tensors("memory_sums", z=z, bank=bank)
    check_loss("memory_sums", loss)
    arguments = complete("memory_sums", options, LOSS_DEFAULTS)
    check_unit_rows(loss, renormalize=arguments["renormalize"])
    _widen(arguments)
    arguments.update(z=z.detach(), labels=labels, bank=bank.detach(), bank_labels=bank_labels, given=given)
    arguments.update(loss=loss.kind, parameters=loss.parameters, number=number, first=first, need_grad=need_grad)
    return call("memory_sums", arguments)  # type: ignore[no-any-return]


@fake("memory_sums")
def _(z: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    B, D = z.shape
    return z.new_empty(2, B, 4, dtype=torch.float64), z.new_empty(2, B if args[-1] else 0, D)


def settle_sums(
    parts: Tensor, loss: PairLoss, passes: int, anchors: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What the sums of all parts of a bank, after so many passes, come to.

    Args:
        parts: `[n, 2, B, 4]` float64, the sums of n parts, each slot as the last pass that fills it has it.
        loss: that of `memory_sums`.
        passes: how many of `loss.passes` are done.
        anchors: `[B]` bool, the rows that rank; None: all.

    Returns:
        given `[B]` for the next pass, zeros after the last; and, zeros before that: scale `[n, 2, B]`, what each
        part's gradient is multiplied by, besides the average over the anchors; totals `[7]`, sums over the anchors:
        `value` and `count` of the two groups, anchors, positives and negatives that have a weight. The loss is
        `sum(value / max(count, 1))` over the groups. Contrastive with "avg_nonzero" has two, one for each slot; the
        other losses have one. All float64. Of DCLW, after its first pass, all anchors are given the same, and totals 0
        and 2 are what that is made of: the log of the sum of e^(s / sigma), and over how many positives.

    Raises:
        RuntimeError: an argument is not as above, naming it.
        TypeError: no such loss.
    """
    check_loss("settle_sums", loss)
    arguments = {"parts": parts, "anchors": anchors, "loss": loss.kind, "parameters": loss.parameters, "passes": passes}
    return call("settle_sums", arguments)  # type: ignore[no-any-return]


def averages(totals: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of totals `[7]`: the loss `[]`, what sums of the two groups are multiplied by `[2]`, and pairs `[2]`."""
    average = 1 / totals[2:4].clamp(min=1)
    return (average * totals[:2]).sum().to(dtype), average, totals[5:] / totals[4].clamp(min=1)


@fake("settle_sums")
def _(parts: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    n, slots, B, _ = parts.shape
    return parts.new_empty(B), parts.new_empty(n, slots, B), parts.new_empty(7)
