"""A loss against a bank in parts: a part adds up its chunks as the whole adds up its parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..losses import PairLoss
from ..reference import parts as reference
from ..reference import programs
from .chunks import exact
from .contract import Contract, check
from .loss import parse_loss
from .loss_of_memory import BankSimilarities, check_memory_loss


@exact
def memory_sums(
    z: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, count: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, bank_ids: Tensor | None, exclude: Tensor | None, anchors: Tensor | None,
    given: Tensor | None, loss: str, parameters: Sequence[float], number: int, first: int, renormalize: bool,
    eps: float, need_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `memory_loss`, it takes the first `count` rows on a CPU, elsewhere all."""
    op = "memory_sums"
    c = Contract(op, z)
    check_memory_loss(c, z, labels, bank, bank_labels, count, scale, shift, bank_ids, exclude, anchors, eps)
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
    similarities = BankSimilarities(
        z, labels, bank, bank_labels, count, scale, shift, bank_ids, exclude, anchors, renormalize, eps
    )
    of_anchor = z.new_zeros(B) if given is None else given.to(z.dtype)
    for chunk in similarities.chunks():
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
