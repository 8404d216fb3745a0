"""The specification: one training step of adaptive cross batch normalization in plain PyTorch.

Every op of `xbn_ext.ops` has its twin here under the same name and with the same arguments, and `step` puts them
together as `xbn_ext.CrossBatchMemory` does. Nothing is fused and the whole similarity matrix is built: this is for
reading and for testing. Run it in float64 and it is the truth that every kernel is measured against. The other plain
PyTorch, in chunks and for use, is `xbn_ext.plain`.

Letters: B batch rows, M bank rows (capacity), D dimension, `count` filled bank rows. `z [B, D]` are the
embeddings of the batch, `bank [M, D]` those of past batches. Whatever the dtype of the embeddings, statistics
(moments, sums, the affine map) are float64.

The method is our reconstruction of "Adaptive Cross Batch Normalization for Metric Learning" (arXiv 2303.17127)
from its abstract; the cross-batch memory is that of "Cross-Batch Memory for Embedding Learning" (arXiv
1912.06798).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from .losses import PairLoss
from .options import LOSS_DEFAULTS, PAIR_DEFAULTS, LossOptions, PairOptions, complete
from .reference_losses import pair_loss, weighted_pairs

SOME_ROWS = 4096  # of the bank, that are copied in float64 at a time

# --- Embeddings of unit length --------------------------------------------------------------------------


def normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """The rows of `x [B, D]` divided by `max(|row|, eps)`, computed in float64: no norm of a float32 row overflows."""
    return F.normalize(x.double(), dim=1, eps=eps).to(x.dtype)


# --- The embeddings drift: where are their moments now? -------------------------------------------------


def moments(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased standard deviation per dimension of the finite rows of `x [B, D]` that are in `mask [B]`.

    Returns `mean [D]`, `std [D]` in float64 and `rows []`, how many rows counted; with none, zeros.
    """
    rows = x.isfinite().all(dim=1)
    if mask is not None:
        rows = rows & mask
    x = x[rows].double()
    n = rows.sum()
    if n == 0:
        return x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1]), n
    return x.mean(dim=0), x.var(dim=0, correction=0).sqrt(), n


def kalman_(
    state: list[Tensor],
    variance: Tensor,
    measured: list[Tensor],
    process_noise: float,
    measurement_noise: float,
    fixed_gain: float | None = None,
) -> Tensor:
    """One step of a scalar random-walk Kalman filter shared by all dimensions of all `state` tensors.

        P⁻ = P + q      K = P⁻ / (P⁻ + r)      state += K (measured - state)      P = (1 - K) P⁻

    `variance` starts infinite: nothing is known, K is 1, and the first measurement is the state (P = r).
    An infinite q keeps it so: the state is the last measurement. `fixed_gain` replaces K after the first.
    Returns the gain.
    """
    prior = variance + process_noise
    gain = 1 / (1 + measurement_noise / prior)
    if fixed_gain is not None and prior.isfinite():
        gain = torch.full_like(gain, fixed_gain)
    for s, m in zip(state, measured, strict=True):
        s += gain * (m - s)
    variance.copy_(gain * measurement_noise)  # (1 - K) P⁻ = K r
    return gain


def bank_moments(sums: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std of the stored rows from their sums `[2, D]`; an empty bank counts as standardised.

    A variance below 1e-12 of the mean square is what the rounding of the sums leaves, and counts as none.
    """
    if count == 0:
        return torch.zeros_like(sums[0]), torch.ones_like(sums[0])
    mean, mean_square = sums / count
    variance = mean_square - mean**2
    return mean, torch.where(variance > 1e-12 * mean_square, variance, 0.0).sqrt()


def match_moments(mean: Tensor, std: Tensor, to_mean: Tensor, to_std: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`scale, shift` that take values with moments (mean, std) to (to_mean, to_std), per dimension.

    A dimension that is dead on either side (std below `eps`) keeps its scale: the map stays invertible.
    """
    scale = torch.where((std < eps) | (to_std < eps), 1.0, to_std / std)
    return scale, to_mean - scale * mean


def moment_gap(mean: Tensor, std: Tensor, to_mean: Tensor, to_std: Tensor) -> Tensor:
    """Distance of the normal distributions with these moments `[D]`, dimensions independent (2-Wasserstein)."""
    return ((mean - to_mean).square().sum() + (std - to_std).square().sum()).sqrt()


def track_(
    target_mean: Tensor,
    target_std: Tensor,
    variance: Tensor,
    scale: Tensor,
    shift: Tensor,
    x: Tensor,
    mask: Tensor | None,
    sums: Tensor,
    count: Tensor,
    process_noise: float,
    measurement_noise: float,
    fixed_gain: float | None = None,
    eps: float = 1e-6,
    stats: Tensor | None = None,
) -> None:
    """Measures the batch `x`, filters, and composes into (scale, shift) the map that moves the bank to the target.

    A stored row u stands for `scale * u + shift`. A batch with fewer than two usable rows measures nothing. `stats [3]`
    becomes how far the bank's moments are from the batch's before and after, NaN where either has none, and the gain.
    """
    mean, std, rows = moments(x, mask)
    gain = torch.zeros_like(variance)
    if rows >= 2:
        gain = kalman_([target_mean, target_std], variance, [mean, std], process_noise, measurement_noise, fixed_gain)
    else:
        variance += process_noise
    if stats is not None:
        stats.fill_(torch.nan)
        stats[2] = gain
    if variance.isinf():
        return
    stored_mean, stored_std = bank_moments(sums, count)
    before = scale * stored_mean + shift, scale.abs() * stored_std
    a, b = match_moments(*before, target_mean, target_std, eps)
    scale.copy_(a * scale)
    shift.copy_(a * shift + b)
    if stats is not None and rows >= 2 and count > 0:
        after = scale * stored_mean + shift, scale.abs() * stored_std
        stats[0], stats[1] = moment_gap(*before, mean, std), moment_gap(*after, mean, std)


# --- The bank: a ring of past embeddings ------------------------------------------------------------------


def transform_(bank: Tensor, sums: Tensor, scale: Tensor, shift: Tensor, count: Tensor) -> None:
    """Writes the pending map into the filled rows of `bank`, recounts `sums`, and resets the map to identity."""
    rows = bank[: int(count)]
    rewrite_(rows, scale, shift)
    sums.copy_(sums_of(rows))
    scale.fill_(1)
    shift.fill_(0)


def rewrite_(rows: Tensor, a: Tensor, b: Tensor) -> None:
    """The rows `[n, D]` become `a * row + b`, computed in float64."""
    for some in rows.split(SOME_ROWS):
        some.copy_(some.double() * a + b)


def sums_of(rows: Tensor) -> Tensor:
    """Sum and sum of squares over the rows `[n, D]`, as float64 `[2, D]`."""
    sums = rows.new_zeros(2, rows.shape[1], dtype=torch.float64)
    for some in rows.split(SOME_ROWS):
        sums += torch.stack([some.double().sum(dim=0), some.double().square().sum(dim=0)])
    return sums


def standardize_(bank: Tensor, sums: Tensor, scale: Tensor, shift: Tensor, count: Tensor, eps: float = 1e-6) -> None:
    """Rewrites the stored rows in standardised coordinates, if they have left them, without moving what they stand for.

    A map that stays pending is composed at every step and may shrink or grow without end; the stored coordinates do
    the opposite and would lose their digits or overflow. They are taken back to mean 0, std 1 when in some live
    dimension |mean| > 4 or std is outside [1/4, 4].
    """
    mean, std = bank_moments(sums, count)
    live = scale.abs() * std >= eps
    off = live & ((mean.abs() > 4) | (std > 4) | (std < 0.25))
    if count == 0 or not off.any():
        return
    compute = torch.promote_types(bank.dtype, torch.float32)
    a = torch.where(live, 1 / std, 1.0).to(compute).double()
    b = torch.where(live, -mean * a, 0.0).to(compute).double()
    rows = bank[: int(count)]
    rewrite_(rows, a, b)
    sums.copy_(sums_of(rows))
    scale.div_(a)
    shift.sub_(scale * b)


def enqueue_(
    bank: Tensor,
    bank_labels: Tensor,
    sums: Tensor,
    head: Tensor,
    count: Tensor,
    z: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    bank_ids: Tensor | None = None,
    ids: Tensor | None = None,
    bank_steps: Tensor | None = None,
    step: Tensor | None = None,
) -> Tensor:
    """Writes the rows of `z [B, D]` that are in `mask [B]` into the ring and returns their slots `[B]`, else -1.

    Stored as `u = (z - shift) / scale`. Rows that are not finite, before or after rounding to the bank's dtype,
    stay out. Of more rows than the ring holds, the last M stay. A row whose sample has no id (it is negative) gets
    one that no other row has.
    """
    M = bank.shape[0]
    u = ((z.double() - shift) / scale).to(bank.dtype)
    store = u.isfinite().all(dim=1)
    if mask is not None:
        store = store & mask
    rows = store.nonzero()[:, 0][-M:]
    slots = torch.full_like(labels, -1)
    slots[rows] = (head + torch.arange(len(rows), device=head.device)) % M
    bank[slots[rows]] = u[rows]
    bank_labels[slots[rows]] = labels[rows]
    if bank_ids is not None:
        own = -2 - slots
        bank_ids[slots[rows]] = (own if ids is None else torch.where(ids >= 0, ids, own))[rows]
    if bank_steps is not None and step is not None:
        bank_steps[slots[rows]] = step
    head.copy_((head + len(rows)) % M)
    count.copy_((count + len(rows)).clamp(max=M))
    sums.copy_(sums_of(bank[: int(count)]))
    return slots


# --- The loss: a batch against a set of rows --------------------------------------------------------------


def similarity(z: Tensor, rows: Tensor, renormalize: bool = True, eps: float = 1e-6) -> Tensor:
    """`s_ij = z_i · r_j`, with r_j divided by `max(|r_j|, eps)` if `renormalize`. Returns `[B, n]`.

    An anchor with a NaN or an Inf has NaN similarities and a NaN gradient.
    """
    if renormalize:
        rows = F.normalize(rows, dim=1, eps=eps)
    return nan_unless_finite(z) @ rows.T


def nan_unless_finite(z: Tensor) -> Tensor:
    """`z [B, D]`, in which a row with a NaN or an Inf is NaN throughout."""
    return z * torch.where(z.isfinite().all(dim=1, keepdim=True), 1.0, torch.nan)


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
    o = SimpleNamespace(**complete("memory_loss_and_pairs", options, LOSS_DEFAULTS))
    n = len(bank) if o.count is None else int(o.count)
    rows = bank[:n].detach().to(z.dtype)
    if o.scale is not None and o.shift is not None:
        rows = rows * o.scale.to(z.dtype) + o.shift.to(z.dtype)
    positive = labels[:, None] == bank_labels[None, :n]
    pair = torch.ones_like(positive)
    if o.exclude is not None:
        row_ids = torch.arange(n, device=z.device) if o.bank_ids is None else o.bank_ids[:n]
        has_id = (o.exclude != -1) & (o.exclude != torch.iinfo(torch.int64).min)
        pair = ~has_id[:, None] | (o.exclude[:, None] != row_ids)
    s = similarity(z, rows, o.renormalize, o.eps)
    return pair_loss(loss, s, positive, pair, o.anchors), weighted_pairs(loss, s.detach(), positive, pair, o.anchors)


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
    positive = labels[:, None] == labels[None, :]
    pair = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    if ids is not None:
        pair = pair & ((ids[:, None] < 0) | (ids[:, None] != ids))
    z = nan_unless_finite(z)
    return pair_loss(loss, similarity(z, z, renormalize, eps), positive, pair, anchors)


# --- One step -----------------------------------------------------------------------------------------------


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
            step=torch.zeros((), dtype=torch.int64),
            bank_ids=torch.zeros(memory_size, dtype=torch.int64),
            bank_steps=torch.zeros(memory_size, dtype=torch.int64),
        )


def step(
    m: Memory,
    embeddings: Tensor,
    labels: Tensor,
    loss: PairLoss,
    *,
    drift: str = "axbn",
    process_noise: float = 1.0,
    measurement_noise: float = 1.0,
    ema_momentum: float = 0.1,
    update: str = "inplace",
    normalize_embeddings: bool = True,
    renormalize: bool = True,
    batch_weight: float = 1.0,
    memory_weight: float = 1.0,
    warmup_steps: int = 0,
    enqueue: str = "after",
    enqueue_mask: Tensor | None = None,
    ids: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """One training step: returns the loss and leaves `m` as the next step finds it."""
    z = normalize(embeddings, eps) if normalize_embeddings else embeddings
    stored = z.detach()

    # The embeddings have drifted since the bank's rows were computed: move the bank to where they are now.
    if drift != "none":
        q = {"xbn": torch.inf, "axbn": process_noise, "ema": 0.0}[drift]
        gain = ema_momentum if drift == "ema" else None
        track_(
            m.target_mean, m.target_std, m.variance, m.scale, m.shift, stored, enqueue_mask, m.sums, m.count,
            q, measurement_noise, gain, eps,
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
        total = batch_weight * batch_loss(z, labels, loss, ids=ids, anchors=anchors, renormalize=renormalize, eps=eps)
    if memory_weight != 0:
        ranked = m.count * (m.step >= warmup_steps)
        total = total + memory_weight * memory_loss(
            z, labels, m.bank, m.bank_labels, loss, count=ranked, scale=m.scale, shift=m.shift,
            bank_ids=m.bank_ids, exclude=exclude, anchors=anchors, renormalize=renormalize, eps=eps,
        )  # fmt: skip
    if enqueue == "after":
        put()
    m.step += 1
    return total
