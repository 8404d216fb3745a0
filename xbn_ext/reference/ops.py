"""The ops in plain PyTorch, nothing fused: each has its twin in `xbn_ext.ops`, of the same name and arguments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import compute_dtype

__all__ = [
    "adapted_gain", "bank_moments", "enqueue_", "kalman_", "match_moments", "moment_gap", "moments", "normalize",
    "rewrite_", "standardize_", "sums_of", "track_", "transform_",
]  # fmt: skip
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


GAIN_RATE = 0.1
"""Part of a correlation of innovations that the gain takes over."""
LEAST_GAIN, MOST_GAIN = 0.1, 0.999
"""Between which an adapted gain stays."""


def kalman_(
    state: list[Tensor],
    variance: Tensor,
    measured: list[Tensor],
    process_noise: float | None,
    measurement_noise: float,
    fixed_gain: float | None = None,
    innovation: Tensor | None = None,
) -> Tensor:
    """One step of a scalar random-walk Kalman filter shared by all dimensions of all `state` tensors.

        P⁻ = P + q      K = P⁻ / (P⁻ + r)      state += K (measured - state)      P = (1 - K) P⁻

    `variance` starts infinite: nothing is known, K is 1, and the first measurement is the state (P = r).
    An infinite q keeps it so: the state is the last measurement. `fixed_gain` replaces K after the first.
    Without a process noise, `variance` is P⁻ itself, and becomes the one whose gain is `adapted_gain`; `innovation` is
    that of the first state, `measured - state` as the last step found it, 0 before there were two.
    Returns the gain.
    """
    prior = variance + (process_noise or 0)
    gain = 1 / (1 + measurement_noise / prior)
    if fixed_gain is not None and prior.isfinite():
        gain = torch.full_like(gain, fixed_gain)
    new = measured[0] - state[0] if prior.isfinite() else torch.zeros_like(state[0])
    for s, m in zip(state, measured, strict=True):
        s += gain * (m - s)
    variance.copy_(gain * measurement_noise)  # (1 - K) P⁻ = K r
    if process_noise is None:
        assert innovation is not None
        after = adapted_gain(gain, new, innovation)
        variance.copy_(measurement_noise * after / (1 - after))  # K = P⁻ / (P⁻ + r)
        innovation.copy_(new)
    return gain


def adapted_gain(gain: Tensor, innovation: Tensor, before: Tensor) -> Tensor:
    """The gain of the next step, from the innovations `[D]` of this one and of the one before.

    Innovations of a filter with the best gain K* are uncorrelated. Of a random walk seen through noise, with P⁻ the
    variance of the state before and S = P⁻ + r that of the innovation, those of a gain K have

        E[ν_t+1 ν_t] = (1 - K) P⁻ - K r = P⁻ - K S        so that        K* = P⁻ / S = K + E[ν_t+1 ν_t] / S

    (R. K. Mehra, "On the identification of variances and adaptive Kalman filtering", IEEE Trans. Automatic Control 15,
    1970). One pair of innovations, over its dimensions, gives an estimate of that correlation; a tenth of it is taken
    over. So the gain rises while moments run, when innovations point the same way, and falls as they settle.
    """
    size = innovation.norm() * before.norm()
    correlation = innovation @ before / size if size > 0 else torch.zeros_like(gain)
    return (gain + GAIN_RATE * correlation).clamp(LEAST_GAIN, MOST_GAIN)


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
    process_noise: float | None,
    measurement_noise: float,
    fixed_gain: float | None = None,
    eps: float = 1e-6,
    stats: Tensor | None = None,
    innovation: Tensor | None = None,
) -> None:
    """Measures the batch `x`, filters, and composes into (scale, shift) the map that moves the bank to the target.

    A stored row u stands for `scale * u + shift`. A batch with fewer than two usable rows measures nothing. `stats [3]`
    becomes how far the bank's moments are from the batch's before and after, NaN where either has none, and the gain.
    """
    mean, std, rows = moments(x, mask)
    gain = torch.zeros_like(variance)
    if rows >= 2:
        noises = process_noise, measurement_noise, fixed_gain
        gain = kalman_([target_mean, target_std], variance, [mean, std], *noises, innovation)
    else:
        variance += process_noise or 0
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


def left(scale: Tensor, mean: Tensor, std: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of the dimensions `[D]` of stored rows with these moments and this map: which are live, which must be rewritten
    though dead, and which of all have left the standardised coordinates (`standardize_`)."""
    size = scale.abs()
    live = size * std >= eps
    died = (size * std < eps) & ~((size >= 1 / 64) & (size <= 64))
    return live, died, died | (live & ((mean.abs() > 4) | (std > 4) | (std < 0.25)))


def standardize_(
    bank: Tensor,
    sums: Tensor,
    scale: Tensor,
    shift: Tensor,
    count: Tensor,
    eps: float = 1e-6,
    *,
    ring_sums: Tensor | None = None,
    ring_count: Tensor | None = None,
) -> None:
    """Rewrites the stored rows in standardised coordinates, if they have left them, without moving what they stand for.

    A map that stays pending is composed at every step and may shrink or grow without end; the stored coordinates do
    the opposite and would lose their digits or overflow. They are taken back to mean 0, std 1 when in some live
    dimension |mean| > 4 or std is outside [1/4, 4]. A dead dimension has no spread to standardise, but may have shrunk
    until it died: one with a scale outside [1/64, 64] gets a scale of 1, or 16 bits could not hold a row in which it
    lives again. If the bank is a part of a ring, the moments are those of the ring.
    """
    in_all = count if ring_count is None else ring_count
    mean, std = bank_moments(sums if ring_sums is None else ring_sums, in_all)
    live, died, off = left(scale, mean, std, eps)
    if in_all == 0 or not off.any():
        return
    compute = compute_dtype(bank.dtype)
    a = torch.where(live, 1 / std, torch.where(died, scale, 1.0)).to(compute).double()
    b = torch.where(live | died, -mean * a, 0.0).to(compute).double()
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
    first: int = 0,
    ring_size: int | None = None,
) -> Tensor:
    """Writes the rows of `z [B, D]` that are in `mask [B]` into the ring and returns their slots `[B]`, else -1.

    Stored as `u = (z - shift) / scale`. Rows that are not finite, before or after rounding to the bank's dtype,
    stay out. Of more rows than the ring holds, the last M stay. A row whose sample has no id (it is negative) gets
    one that no other row has. Of a ring of `ring_size` slots the bank may be those from `first` on: it alone is
    written.
    """
    M = bank.shape[0] if ring_size is None else ring_size

    def stored() -> Tensor:
        return sums_of(bank[: max(0, int(count) - first)])

    before = stored()
    u = ((z.double() - shift) / scale).to(bank.dtype)
    store = u.isfinite().all(dim=1)
    if mask is not None:
        store = store & mask
    rows = store.nonzero()[:, 0][-M:]
    slots = torch.full_like(labels, -1)
    slots[rows] = (head + torch.arange(len(rows), device=head.device)) % M
    here = rows[(slots[rows] >= first) & (slots[rows] < first + bank.shape[0])]
    into = slots[here] - first
    bank[into] = u[here]
    bank_labels[into] = labels[here]
    if bank_ids is not None:
        own = -2 - slots
        bank_ids[into] = (own if ids is None else torch.where(ids >= 0, ids, own))[here]
    if bank_steps is not None and step is not None:
        bank_steps[into] = step
    head.copy_((head + len(rows)) % M)
    count.copy_((count + len(rows)).clamp(max=M))
    sums.add_(stored() - before)
    return slots
