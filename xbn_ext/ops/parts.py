"""A loss in parts (`csrc/glue/parts.h`). Of a bank: each part adds up what it has for each anchor, pass by pass;
the sums of all parts settle the loss, and what the gradient of each is multiplied by. Of a batch against itself,
in parts of its anchors: each has met all rows, and their totals are only to be added."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from .. import checks
from ..losses import PairLoss, check_loss, check_unit_rows
from ..options import LOSS_DEFAULTS, LossOptions, complete
from ._namespace import call, fake

__all__ = ["batch_sums", "memory_sums", "settle_sums"]


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
    for name in ("scale", "shift"):
        if isinstance(arguments[name], Tensor):
            arguments[name] = arguments[name].double()
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
        other losses have one. All float64.

    Raises:
        RuntimeError: an argument is not as above, naming it.
        TypeError: no such loss.
    """
    check_loss("settle_sums", loss)
    arguments = {"parts": parts, "anchors": anchors, "loss": loss.kind, "parameters": loss.parameters, "passes": passes}
    return call("settle_sums", arguments)  # type: ignore[no-any-return]


@fake("settle_sums")
def _(parts: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    n, slots, B, _ = parts.shape
    return parts.new_empty(B), parts.new_empty(n, slots, B), parts.new_empty(7)


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
        loss: which loss; its temperature is a number.
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
