"""One training step, from the ops of this package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..filter import Drift, Filter, make_filter
from ..losses import PairLoss
from .loss import batch_loss, memory_loss
from .ops import enqueue_, normalize, standardize_, track_, transform_


@dataclass
class Memory:
    """The state of a memory, tensor by tensor what `xbn_ext.CrossBatchMemory` keeps in its `state_dict`."""

    bank: Tensor  # [M, D] ring; a row u stands for scale * u + shift
    bank_labels: Tensor  # [M] int64
    sums: Tensor  # [2, D] sum and sum of squares of the stored rows
    head: Tensor  # [] int64, next slot to write
    count: Tensor  # [] int64, filled slots
    scale: Tensor  # [D]
    shift: Tensor  # [D]
    target_mean: Tensor  # [D] filtered moments of the embeddings
    target_std: Tensor  # [D]
    variance: Tensor  # [] of the filter, infinite before the first measurement
    innovation: Tensor  # [D] of the mean, in the last step
    step: Tensor  # [] int64, training steps taken
    bank_ids: Tensor  # [M] int64 of the samples; negative: its own
    bank_steps: Tensor  # [M] int64, the step in which a row was stored

    @classmethod
    def empty(cls, memory_size: int, embedding_size: int, dtype: torch.dtype = torch.float64) -> Memory:
        f64 = torch.float64
        return cls(
            bank=torch.zeros(memory_size, embedding_size, dtype=dtype),
            bank_labels=torch.zeros(memory_size, dtype=torch.int64),
            sums=torch.zeros(2, embedding_size, dtype=f64),
            head=torch.zeros((), dtype=torch.int64),
            count=torch.zeros((), dtype=torch.int64),
            scale=torch.ones(embedding_size, dtype=f64),
            shift=torch.zeros(embedding_size, dtype=f64),
            target_mean=torch.zeros(embedding_size, dtype=f64),
            target_std=torch.zeros(embedding_size, dtype=f64),
            variance=torch.tensor(torch.inf, dtype=f64),
            innovation=torch.zeros(embedding_size, dtype=f64),
            step=torch.zeros((), dtype=torch.int64),
            bank_ids=torch.zeros(memory_size, dtype=torch.int64),
            bank_steps=torch.zeros(memory_size, dtype=torch.int64),
        )


def step_(
    m: Memory,
    embeddings: Tensor,
    labels: Tensor,
    loss: PairLoss,
    *,
    filter: Filter | None = Filter(None, 1.0, None),  # noqa: B008  immutable
    update: str = "inplace",
    normalize_embeddings: bool = True,
    renormalize: bool = True,
    batch_weight: float = 1.0,
    memory_weight: float = 1.0,
    center_gradient: bool = False,
    warmup_steps: int = 0,
    enqueue: str = "after",
    enqueue_mask: Tensor | None = None,
    ids: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """One training step: returns the loss and leaves `m` as the next step finds it.

    `filter`: how the memory follows the drift (`xbn_ext.filter.make_filter`); None: not at all. The other options are
    those of `xbn_ext.CrossBatchMemory`.
    """
    z = normalize(embeddings, eps) if normalize_embeddings else embeddings
    stored = z.detach()

    # The embeddings have drifted since the bank's rows were computed: move the bank to where they are now.
    if filter is not None:
        track_(
            m.target_mean, m.target_std, m.variance, m.scale, m.shift, stored, enqueue_mask, m.sums, m.count,
            *filter, eps, innovation=m.innovation,
        )  # fmt: skip
        if update == "inplace":
            transform_(m.bank, m.sums, m.scale, m.shift, m.count)
        else:
            standardize_(m.bank, m.sums, m.scale, m.shift, m.count, eps)

    def put() -> Tensor:
        return enqueue_(
            m.bank, m.bank_labels, m.sums, m.head, m.count, stored, labels, enqueue_mask, m.scale, m.shift,
            bank_ids=m.bank_ids, ids=ids, bank_steps=m.bank_steps, step=m.step,
        )  # fmt: skip

    # Rank the batch against itself and against the memory. Rows that only feed the memory are not anchors.
    own_slots = put() if enqueue == "before" else torch.full_like(labels, -1)
    own_ids = -2 - own_slots  # what enqueue_ calls a row without an id
    exclude = own_ids if ids is None else torch.where(ids >= 0, ids, own_ids)
    anchors = None if enqueue_mask is None else ~enqueue_mask
    total = z.new_zeros(())
    if batch_weight != 0:  # 0 times NaN would be NaN
        again = renormalize and not normalize_embeddings
        total = batch_weight * batch_loss(z, labels, loss, ids=ids, anchors=anchors, renormalize=again, eps=eps)
    if memory_weight != 0:
        ranked = m.count * (m.step >= warmup_steps)
        ranking = z
        if center_gradient:  # the same values; their gradient loses the mean of what turns the anchors
            chosen = z.isfinite().all(1) if anchors is None else z.isfinite().all(1) & anchors
            mean = z[chosen].sum(0) / chosen.sum().clamp(min=1)
            zero, row = mean - mean.detach(), z[chosen].detach()
            along = (zero * row).sum(1, keepdim=True) / row.square().sum(1, keepdim=True).clamp(min=1e-300)
            ranking = z.index_put((chosen,), z[chosen] - (zero - along * row))
        total = total + memory_weight * memory_loss(
            ranking, labels, m.bank, m.bank_labels, loss, count=ranked, scale=m.scale, shift=m.shift,
            bank_ids=m.bank_ids, exclude=exclude, anchors=anchors, renormalize=renormalize, eps=eps,
        )  # fmt: skip
    if enqueue == "after":
        put()
    m.step += 1
    return total


def step(
    m: Memory,
    embeddings: Tensor,
    labels: Tensor,
    loss: PairLoss,
    *,
    drift: Drift = "axbn",
    process_noise: float | None = None,
    measurement_noise: float = 1.0,
    ema_momentum: float = 0.1,
    **options: Any,
) -> Tensor:
    """`step_` with the filter by the names that `xbn_ext.CrossBatchMemory` gives it."""
    its_filter = make_filter(drift, process_noise, measurement_noise, ema_momentum)
    return step_(m, embeddings, labels, loss, filter=its_filter, **options)
