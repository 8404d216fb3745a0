"""The ops of the loss in plain PyTorch, on the whole matrix of similarities: a batch against a bank, and itself."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from ..losses import PairLoss
from ..options import LOSS_DEFAULTS, PAIR_DEFAULTS, LossOptions, PairOptions, complete
from .losses import pair_loss, pair_loss_and_pairs
from .ops import transform_

__all__ = [
    "batch_loss", "memory_loss", "memory_loss_and_pairs", "nan_unless_finite", "similarity", "transform_memory_loss_",
]  # fmt: skip


def similarity(z: Tensor, rows: Tensor, renormalize: bool = True, eps: float = 1e-6) -> Tensor:
    """`s_ij = z_i · r_j`, with r_j divided by `max(|r_j|, eps)` if `renormalize`. Returns `[B, n]`.

    An anchor with a NaN or an Inf has NaN similarities and a NaN gradient.
    """
    if renormalize:
        rows = F.normalize(rows, dim=1, eps=eps)
    return nan_unless_finite(z) @ rows.T


def nan_unless_finite(z: Tensor) -> Tensor:
    """`z [B, D]`, in which a row with a NaN or an Inf is NaN throughout."""
    return z * torch.where(z.isfinite().all(dim=1, keepdim=True), 1.0, torch.nan).to(z.dtype)


def memory_loss(
    z: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, loss: PairLoss, **options: Unpack[LossOptions]
) -> Tensor:
    """Loss of the anchors `z [B, D]` against the first `count` bank rows, each standing for `scale * u + shift`.

    `exclude [B]` is the bank row an anchor must not be paired with, its own copy; with `bank_ids [M]`, the id of such
    rows. -1 and the smallest int64 are no id. The bank carries no gradient.
    """
    complete("memory_loss", options, LOSS_DEFAULTS)
    return memory_loss_and_pairs(z, labels, bank, bank_labels, loss, **options)[0]


def memory_loss_and_pairs(
    z: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, loss: PairLoss, **options: Unpack[LossOptions]
) -> tuple[Tensor, Tensor]:
    """`memory_loss`, and `pairs [2]`: how many positives and negatives of an anchor have a weight, on average."""
    s, positive, pair, _ = similarities(z, labels, bank, bank_labels, options)
    return pair_loss_and_pairs(loss, s, positive, pair, options.get("anchors"))


def similarities(
    z: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`s [B, n]` of the anchors with the first `count` bank rows; whether a pair is of one class, whether it is a pair
    at all; and the rows `[n, D]` as they are ranked."""
    o = SimpleNamespace(**complete("memory_loss_and_pairs", options, LOSS_DEFAULTS))
    n = len(bank) if o.count is None else int(o.count)
    rows = bank[:n].detach().to(z.dtype)
    if o.scale is not None and o.shift is not None:
        rows = rows * o.scale.to(z.dtype) + o.shift.to(z.dtype)
    positive = labels[:, None] == bank_labels[None, :n]
    pair = torch.ones_like(positive) if o.anchors is None else o.anchors[:, None].expand_as(positive)
    if o.exclude is not None:
        row_ids = torch.arange(n, device=z.device) if o.bank_ids is None else o.bank_ids[:n]
        has_id = (o.exclude != -1) & (o.exclude != torch.iinfo(torch.int64).min)
        pair = pair & (~has_id[:, None] | (o.exclude[:, None] != row_ids))
    if o.renormalize:
        rows = F.normalize(rows, dim=1, eps=o.eps)
    return similarity(z, rows, renormalize=False), positive, pair, rows


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
    """`transform_`, then `memory_loss_and_pairs` of the first `ranked` (None: `count`) rows, with its other options."""
    complete("transform_memory_loss_", options, PAIR_DEFAULTS)
    transform_(bank, sums, scale, shift, count)
    rows = count if ranked is None else ranked
    return memory_loss_and_pairs(z, labels, bank, bank_labels, loss, count=rows, **options)


def batch_loss(
    z: Tensor,
    labels: Tensor,
    loss: PairLoss,
    *,
    ids: Tensor | None = None,
    anchors: Tensor | None = None,
    renormalize: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """The same loss of the batch against itself, every row but the anchor's own and others of its id (>= 0) in
    `ids [B]`; gradients flow to both sides."""
    positive, pair = pairs_in_batch(labels, ids)
    z = nan_unless_finite(z)
    return pair_loss(loss, similarity(z, z, renormalize, eps), positive, pair, anchors)


def pairs_in_batch(labels: Tensor, ids: Tensor | None, own: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Of some rows of a batch with all: `[A, B]` whether a pair is of one class, and whether it is a pair at all."""
    pair = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)[own]
    if ids is not None:
        pair = pair & ((ids[own, None] < 0) | (ids[own, None] != ids))
    return labels[own, None] == labels, pair
