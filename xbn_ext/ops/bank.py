"""The ops that write the memory and what is kept of it (`csrc/glue/bank.h`): `track_`, `transform_`,
`standardize_`, `enqueue_`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._autograd import writes
from . import _namespace
from ._namespace import fake

__all__ = ["enqueue_", "standardize_", "track_", "transform_"]


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
    """Measures the moments of `x [B, D]`, filters them, and composes the map that moves the bank there.

    Args:
        target_mean: `[D]` filter state, written.
        target_std: `[D]` filter state, written.
        variance: scalar, filter variance, written; infinite before the first measurement. Without a process noise that
            before the next measurement, else after the last.
        scale: `[D]` of the bank's pending map, written: a stored row u stands for `scale * u + shift`.
        shift: `[D]` of the map, written.
        x: `[B, D]` embeddings of the batch; rows that are not finite are left out, and with fewer than two rows nothing
            is measured.
        mask: `[B]` bool, the rows to measure; None: all.
        sums: `[2, D]` sum and sum of squares of the stored rows.
        count: how many rows are stored.
        process_noise: q >= 0, may be infinite; only q / r matters. None: it is estimated, so that innovations become
            uncorrelated (`xbn_ext.reference.adapted_gain`).
        measurement_noise: r > 0.
        fixed_gain: use this gain in [0, 1] after the first measurement instead of the Kalman gain.
        eps: a dimension with a standard deviation below it keeps its scale.
        stats: `[3]` float64, written: how far the bank's moments are from those of the batch before and after the map,
            `sqrt(|mean - mean|² + |std - std|²)`, NaN where the batch measures nothing or the bank is empty; and the
            gain of the filter, 0 where the batch measures nothing.
        innovation: `[D]` float64, written where the process noise is estimated: how far the batch's mean was from the
            filter's; 0 before the second step. Needed then.
    """
    writes(target_mean, target_std, variance, scale, shift, stats, innovation)
    _namespace.called.track_(
        target_mean, target_std, variance, scale, shift, x, mask, sums, count,
        process_noise, measurement_noise, fixed_gain, eps, stats, innovation,
    )  # fmt: skip


@fake("track_")
def _(*args: Any) -> None:
    return None


def transform_(bank: Tensor, sums: Tensor, scale: Tensor, shift: Tensor, count: Tensor) -> None:
    """Writes the pending map into rows [0, count) of `bank [M, D]`: they become `scale * row + shift`.

    `sums [2, D]` is recounted from the rows as written; `scale`, `shift` `[D]` become 1 and 0.
    """
    writes(bank, sums, scale, shift)
    _namespace.called.transform_(bank, sums, scale, shift, count)


@fake("transform_")
def _(*args: Any) -> None:
    return None


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
    """Rewrites the rows of a bank with a pending map in standardised coordinates, if they have left them.

    What the rows stand for does not change: `scale`, `shift` `[D]` compensate, `sums [2, D]` is recounted. A dimension
    whose standard deviation is below `eps` gets a scale of 1 if its scale is outside [1/64, 64], and else is left
    alone. Costs a look at D numbers when there is nothing to do.

    Where the bank is a part of a ring, `ring_sums [2, D]` and `ring_count` are those of all of it, and decide.
    """
    writes(bank, sums, scale, shift)
    _namespace.called.standardize_(bank, sums, scale, shift, count, eps, ring_sums, ring_count)


@fake("standardize_")
def _(*args: Any) -> None:
    return None


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
    """Writes the finite rows of `z [B, D]` in `mask [B]` into the ring as `(z - shift) / scale`.

    `bank [M, D]`, `bank_labels [M]`, `sums [2, D]`, `head`, `count` are updated. Returns `slots [B]` (int64):
    where each row went, -1 where it was not stored. If there are more rows than the ring holds, the last M stay.

    `bank_ids [M]` (int64) takes the rows' `ids [B]`, or `-2 - slot` for a row that has none (`ids` is None or
    negative): no other row of the ring has that. `bank_steps [M]` (int64) takes `step`, a scalar.

    The bank may be a part of a ring of `ring_size` slots, `first` the slot of its first row; None: it is the ring.
    `head`, `count` and `slots` are of the ring, and the rows that go into other parts are not written; `sums` changes
    by what enters the bank and what leaves it.
    """
    writes(bank, bank_labels, sums, head, count, bank_ids, bank_steps)
    return _namespace.called.enqueue_(  # type: ignore[no-any-return]
        bank, bank_labels, sums, head, count, z, labels, mask, scale, shift, bank_ids, ids, bank_steps, step, first,
        ring_size,
    )  # fmt: skip


@fake("enqueue_")
def _(
    bank: Tensor,
    bank_labels: Tensor,
    sums: Tensor,
    head: Tensor,
    count: Tensor,
    z: Tensor,
    labels: Tensor,
    *_: Any,
) -> Tensor:
    return labels.new_empty(z.shape[0])
