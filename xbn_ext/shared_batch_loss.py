"""The loss against itself of a batch that several ranks have in common. Each ranks its own rows against all; what they
add to the loss, and to the gradient of the rows that they are ranked against, is exchanged."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from ._autograd import with_gradient
from .distributed import Batch, Ranks
from .losses import PairLoss
from .losses.learned import by_temperature, fold_temperature, learned_of, with_offset, with_slope
from .ops.loss_of_memory import averages
from .reference.loss import nan_unless_finite

# It takes two more exchanges and more calls of ops. On a CPU that is worth so many multiply-adds of a rank: a core does
# them in 6 ms. On a GPU it is an estimate: of 1,024 rows of 512 dimensions the whole loss took an H200 0.13 ms.
LEAST_SAVED = 1 << 28
LEAST_SAVED_ON_A_GPU = 1 << 31


def is_worth_it(ranks: Ranks, batch: Batch, loss: PairLoss) -> bool:
    """Whether it is faster that each ranks its own rows than that all rank all, by `ops.batch_loss`; and possible. The
    same on all ranks."""
    if loss.gives_in_common:
        return False
    N, D = batch.embeddings.shape
    least = LEAST_SAVED if batch.embeddings.device.type == "cpu" else LEAST_SAVED_ON_A_GPU
    return saved(N, N // ranks.size, D) >= least


def saved(rows: int, own: int, dim: int) -> int:
    """Multiply-adds. Of all rows there are two products, one of them the gradient; of own rows three, as the gradient
    has two sides."""
    return (2 * rows - 3 * own) * rows * dim


def batch_loss(
    ranks: Ranks, batch: Batch, learned: Tensor | None, z: Tensor, labels: Tensor, loss: PairLoss, *,
    ids: Tensor | None, anchors: Tensor | None, renormalize: bool, eps: float,
) -> Tensor:  # fmt: skip
    """As `ops.batch_loss` of the whole batch, whose gradient is right in this rank's own rows; of a learned temperature
    it is the whole.

    What is exchanged depends on nothing in which ranks may differ, so the gradient is computed even where this rank
    needs none: its anchors are in those of the others.
    """
    own = ranks.own(batch)
    if not renormalize:
        z = nan_unless_finite(z)
    rows = ops.normalize(z, eps) if renormalize else z
    given, (loss, scaled) = loss, fold_temperature(loss, z[own])
    sides = torch.cat((scaled, rows[own]))
    rows, ranking = rows.detach(), scaled.detach()

    of_own = None if anchors is None else anchors[own]
    totals, grad = ops.batch_sums(
        ranking @ rows.T, labels, loss, first=own.start, ids=ids, anchors=of_own, need_grad=batch.learns
    )
    value, average, pairs = averages(ranks.total(totals), z.dtype)
    if not batch.learns:
        return with_offset(value, given, pairs)
    of_negatives, of_positives = average.to(z.dtype)
    if loss.groups == 2:
        grad = grad * torch.where(labels[own, None] == labels, of_positives, of_negatives)
    else:
        grad = grad * of_negatives
    by_ranking = grad @ rows
    by_rows = ranks.total_of_own(grad.T @ ranking, batch.sizes)
    whole = with_gradient(value, sides, torch.cat((by_ranking, by_rows)), *learned_of(given))
    whole = with_offset(whole, given, pairs, sides)
    if learned is None:
        return whole
    slope = ranks.total(by_temperature(learned, by_ranking, ranking, value))
    return with_slope(whole, given.temperature, slope, sides, *learned_of(given))  # type: ignore[attr-defined]
