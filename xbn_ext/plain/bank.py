"""The ops that write the memory and what is kept of it: `track_`, `transform_`, `standardize_`, `enqueue_`."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..dtypes import compute_dtype
from ..reference.ops import GAIN_RATE, LEAST_GAIN, MOST_GAIN, left
from . import chunks
from .batch import moments
from .chunks import exact, is_finite
from .contract import Contract, apart, check, dense


@exact
def track_(
    target_mean: Tensor, target_std: Tensor, variance: Tensor, scale: Tensor, shift: Tensor, x: Tensor,
    mask: Tensor | None, sums: Tensor, count: Tensor, process_noise: float | None, measurement_noise: float,
    fixed_gain: float | None, eps: float, stats: Tensor | None = None, innovation: Tensor | None = None,
) -> None:  # fmt: skip
    c = Contract("track_", x)
    c.matrix("x", x, "[B, D]", (None, None))
    c.rows_mask("mask", mask, x.shape[0])
    written = check_track(
        c, x.shape[1], target_mean, target_std, variance, innovation, scale, shift, sums, count, process_noise,
        measurement_noise, fixed_gain, eps, stats,
    )  # fmt: skip
    x, mask = x.contiguous(), dense(mask)
    apart("track_", written, {"x": x, "mask": mask, "sums": sums, "count": count})
    c.value("count", count, 2**63 - 1)

    mean, std, rows = moments(x, mask)
    measures = rows >= 2
    prior = variance + (process_noise or 0)
    gain = 1 / (1 + measurement_noise / prior)
    if fixed_gain is not None:
        gain = torch.where(prior.isfinite(), fixed_gain, gain)
    gain = torch.where(measures, gain, 0)
    posterior = gain * measurement_noise
    if process_noise is None and innovation is not None:  # one of them is given
        new = torch.where(prior.isfinite(), mean - target_mean, 0)
        posterior = adapt(innovation, new, gain, measures) * measurement_noise
    variance.copy_(torch.where(measures, posterior, prior))
    target_mean.add_(gain * (mean - target_mean))
    target_std.add_(gain * (std - target_std))

    stored_mean, stored_std = bank_moments(sums, count)
    before_mean, before_std = scale * stored_mean + shift, scale.abs() * stored_std
    dead = (before_std < eps) | (target_std < eps)
    a = torch.where(dead, 1, target_std / before_std)
    b = target_mean - a * before_mean
    known = variance.isfinite()
    shift.copy_(torch.where(known, a * shift + b, shift))
    scale.copy_(torch.where(known, a * scale, scale))
    if stats is not None:
        has_gap = measures & (count > 0)
        gaps = [
            ((m - mean).square().sum() + (s - std).square().sum()).sqrt()
            for m, s in ((before_mean, before_std), (scale * stored_mean + shift, scale.abs() * stored_std))
        ]
        stats.copy_(torch.stack([*(torch.where(has_gap, gap, torch.nan) for gap in gaps), gain]))


def adapt(innovation: Tensor, new: Tensor, gain: Tensor, measures: Tensor) -> Tensor:
    """Takes over the new innovation `[D]` of the mean, where the batch measures something. Returns the variance before
    the next step, over the measurement noise: `reference.adapted_gain` is its gain."""
    size = new.norm() * innovation.norm()
    cosine = torch.where(size > 0, (new * innovation).sum() / size, 0)
    adapted = (gain + GAIN_RATE * cosine).clamp(LEAST_GAIN, MOST_GAIN)
    innovation.copy_(torch.where(measures, new, innovation))
    return adapted / (1 - adapted)


def check_track(
    c: Contract, D: int, target_mean: Tensor, target_std: Tensor, variance: Tensor, innovation: Tensor | None,
    scale: Tensor, shift: Tensor, sums: Tensor, count: Tensor, process_noise: float | None, measurement_noise: float,
    fixed_gain: float | None, eps: float, stats: Tensor | None, stats_name: str = "stats",
) -> dict[str, Tensor | None]:  # fmt: skip
    """Returns what is written."""
    c.statistic("target_mean", target_mean, "[D]", (D,))
    c.statistic("target_std", target_std, "[D]", (D,))
    c.statistic("variance", variance, "a scalar", ())
    if innovation is not None:
        c.statistic("innovation", innovation, "[D]", (D,))
    c.statistic("scale", scale, "[D]", (D,))
    c.statistic("shift", shift, "[D]", (D,))
    c.statistic("sums", sums, "[2, D]", (2, D))
    c.counter("count", count)
    if stats is not None:
        c.statistic(stats_name, stats, "[3]", (3,))
    is_known = process_noise is not None or innovation is not None
    check(is_known, f"{c.op}: without a process_noise an innovation is needed")
    if process_noise is not None:
        check(process_noise >= 0, f"{c.op}: process_noise must not be negative, got {process_noise:g}")
    ok = measurement_noise > 0 and math.isfinite(measurement_noise)
    check(ok, f"{c.op}: measurement_noise must be positive and finite, got {measurement_noise:g}")
    check(fixed_gain is None or 0 <= fixed_gain <= 1, f"{c.op}: fixed_gain must be within [0, 1]")
    c.eps(eps)
    return {
        "target_mean": target_mean, "target_std": target_std, "variance": variance, "innovation": innovation,
        "scale": scale, "shift": shift, stats_name: stats,
    }  # fmt: skip


def bank_moments(sums: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.bank_moments`, without a look at the count."""
    count = count.clamp(min=0)  # one that is damaged, where it is not looked at
    mean, mean_square = sums / count.clamp(min=1)
    variance = mean_square - mean**2
    std = torch.where(variance > 1e-12 * mean_square, variance, 0).sqrt()
    return torch.where(count == 0, 0, mean), torch.where(count == 0, 1, std)


def check_transform(op: str, bank: Tensor, sums: Tensor, scale: Tensor, shift: Tensor, count: Tensor) -> Contract:
    c = Contract(op, bank)
    c.bank("bank", bank)
    D = bank.shape[1]
    c.statistic("sums", sums, "[2, D]", (2, D))
    c.statistic("scale", scale, "[D]", (D,))
    c.statistic("shift", shift, "[D]", (D,))
    c.counter("count", count)
    return c


@exact
def transform_(bank: Tensor, sums: Tensor, scale: Tensor, shift: Tensor, count: Tensor) -> None:
    c = check_transform("transform_", bank, sums, scale, shift, count)
    apart("transform_", {"bank": bank, "sums": sums, "scale": scale, "shift": shift}, {"count": count})
    c.value("count", count, len(bank))

    write_map(bank, sums, scale, shift, count)


def write_map(bank: Tensor, sums: Tensor, scale: Tensor, shift: Tensor, count: Tensor) -> None:
    sums.copy_(rewrite(bank, count, scale, shift))
    scale.fill_(1)
    shift.fill_(0)


@exact
def standardize_(
    bank: Tensor, sums: Tensor, scale: Tensor, shift: Tensor, count: Tensor, eps: float,
    ring_sums: Tensor | None = None, ring_count: Tensor | None = None,
) -> None:  # fmt: skip
    """Looks at D numbers on a CPU where there is nothing to do; elsewhere it passes over the bank all the same."""
    c = check_transform("standardize_", bank, sums, scale, shift, count)
    c.eps(eps)
    check((ring_sums is None) == (ring_count is None), "standardize_: ring_sums and ring_count go together")
    if ring_sums is not None:
        c.statistic("ring_sums", ring_sums, "[2, D]", (2, bank.shape[1]))
    if ring_count is not None:
        c.counter("ring_count", ring_count)
    read = {"count": count, "ring_sums": ring_sums, "ring_count": ring_count}
    apart("standardize_", {"bank": bank, "sums": sums, "scale": scale, "shift": shift}, read)
    c.value("count", count, len(bank))

    in_all = count if ring_count is None else ring_count
    mean, std = bank_moments(sums if ring_sums is None else ring_sums, in_all)
    live, died, off = left(scale, mean, std, eps)
    wanted = off.any() & (in_all > 0)
    if chunks.reads(bank.device) and not wanted:
        return
    compute = compute_dtype(bank.dtype)
    # Rounded as the rows are computed, so that the map undoes just that.
    a = torch.where(live & wanted, 1 / std, torch.where(died & wanted, scale, 1)).to(compute).double()
    b = torch.where((live | died) & wanted, -mean * a, 0).to(compute).double()
    sums.copy_(torch.where(wanted, rewrite(bank, count, a, b, wanted), sums))
    scale.div_(a)
    shift.sub_(scale * b)


def rewrite(bank: Tensor, count: Tensor, a: Tensor, b: Tensor, wanted: Tensor | None = None) -> Tensor:
    """The filled rows become `a * row + b`, if `wanted []` (None: yes). Returns their `sums [2, D]`, as rounded."""
    compute = compute_dtype(bank.dtype)
    a, b = a.to(compute), b.to(compute)
    sums = a.new_zeros(2, len(a), dtype=torch.float64)
    for rows, is_filled in chunks_of(bank, count):
        new = (rows.to(compute) * a + b).to(bank.dtype)
        if is_filled is not None:
            new = torch.where(is_filled if wanted is None else is_filled & wanted, new, rows)
        rows.copy_(new)
        written = new.double() if is_filled is None else torch.where(is_filled, new.double(), 0)
        sums += torch.stack([written.sum(0), written.square().sum(0)])
    return sums


def chunks_of(bank: Tensor, count: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The filled rows of a bank `[M, D]`, views of it, and which rows of a view are filled, `[n, 1]`; None: all."""
    n, unread = chunks.filled_rows(count, len(bank))
    # A sixteenth of a chunk on a CPU: all copies of it stay in the nearest cache.
    step = chunks.rows_of_a_chunk(bank.device, bank.shape[1] * (16 if bank.device.type == "cpu" else 1))
    for start in range(0, n, step):
        rows = bank[start : min(start + step, n)]
        is_filled = None
        if unread is not None:
            is_filled = (torch.arange(start, start + len(rows), device=bank.device) < unread)[:, None]
        yield rows, is_filled


@exact
def enqueue_(
    bank: Tensor, bank_labels: Tensor, sums: Tensor, head: Tensor, count: Tensor, z: Tensor, labels: Tensor,
    mask: Tensor | None, scale: Tensor, shift: Tensor, bank_ids: Tensor | None = None, ids: Tensor | None = None,
    bank_steps: Tensor | None = None, step: Tensor | None = None, first: int = 0, ring_size: int | None = None,
) -> Tensor:  # fmt: skip
    c = Contract("enqueue_", bank)
    written = check_enqueue(
        c, bank, bank_labels, sums, head, count, z, labels, mask, scale, shift, bank_ids, ids, bank_steps, step, first,
        ring_size,
    )  # fmt: skip
    z, labels, mask, ids = z.contiguous(), labels.contiguous(), dense(mask), dense(ids)
    read = {"z": z, "labels": labels, "ids": ids, "mask": mask, "scale": scale, "shift": shift, "step": step}
    apart("enqueue_", written, read)
    M, rows, B = len(bank) if ring_size is None else ring_size, len(bank), len(z)
    c.value("head", head, M - 1)
    c.value("count", count, M)

    compute = compute_dtype(bank.dtype)
    u = ((z.double() - shift) / scale).to(compute).to(bank.dtype)
    store = is_finite(u)
    if mask is not None:
        store = store & mask
    n = store.sum()
    surplus = (n - M).clamp(min=0)  # of more rows than the ring holds, the last M stay
    place = store.cumsum(0) - 1 - surplus
    store = store & (place >= 0)
    slots = torch.where(store, (head + place) % M, -1)

    # The rows of the bank that could be written, from the head on or, if that is in another part, from the first on;
    # the stored row that is due in each, and whether there is one.
    begin = torch.where((head >= first) & (head < first + rows), head - first, 0)
    into = (begin + torch.arange(min(B, rows), device=bank.device)) % max(rows, 1)
    due = (first + into - head) % M
    comes = due < n
    row = (~store).to(torch.uint8).argsort(stable=True)[due.clamp(max=B - 1)]

    def write(to: Tensor, new: Tensor) -> None:
        has_row = comes.view(-1, *[1] * (to.dim() - 1))
        to.index_copy_(0, into, torch.where(has_row, new, to[into]))

    evicted = torch.where((comes & (first + into < count))[:, None], bank[into].double(), 0)
    entering = torch.where(comes[:, None], u[row].double(), 0)
    sums.add_(torch.stack([(entering - evicted).sum(0), (entering.square() - evicted.square()).sum(0)]))
    write(bank, u[row])
    write(bank_labels, labels[row])
    if bank_ids is not None:
        own = -2 - slots
        write(bank_ids, (own if ids is None else torch.where(ids >= 0, ids, own))[row])
    if bank_steps is not None and step is not None:
        write(bank_steps, step.expand(len(into)))
    stored = n - surplus
    head.copy_((head + stored) % M)
    count.copy_((count + stored).clamp(max=M))
    return slots


def check_enqueue(
    c: Contract, bank: Tensor, bank_labels: Tensor, sums: Tensor, head: Tensor, count: Tensor, z: Tensor,
    labels: Tensor, mask: Tensor | None, scale: Tensor, shift: Tensor, bank_ids: Tensor | None, ids: Tensor | None,
    bank_steps: Tensor | None, step: Tensor | None, first: int = 0, ring_size: int | None = None,
) -> dict[str, Tensor | None]:  # fmt: skip
    """Returns what is written."""
    c.bank("bank", bank)
    M, D = bank.shape
    check(M > 0 or ring_size is not None, f"{c.op}: bank must have at least one row")
    check(first >= 0, f"{c.op}: first must not be negative, got {first}")
    room = M if ring_size is None else ring_size
    ok = room > 0 and first + M <= room
    check(ok, f"{c.op}: ring_size must have room for M = {M} slots from first = {first} on, got {room}")
    c.labels("bank_labels", bank_labels, "[M]", M)
    c.contiguous("bank_labels", bank_labels)
    c.statistic("sums", sums, "[2, D]", (2, D))
    c.counter("head", head)
    c.counter("count", count)
    c.matrix("z", z, "[B, D]", (None, D))
    B = z.shape[0]
    c.labels("labels", labels, "[B]", B)
    c.rows_mask("mask", mask, B)
    c.statistic("scale", scale, "[D]", (D,))
    c.statistic("shift", shift, "[D]", (D,))
    for name, t in (("bank_ids", bank_ids), ("bank_steps", bank_steps)):
        if t is not None:
            c.labels(name, t, "[M]", M)
            c.contiguous(name, t)
    check(bank_ids is not None or ids is None, f"{c.op}: ids need bank_ids to be stored in")
    if ids is not None:
        c.labels("ids", ids, "[B]", B)
    check((bank_steps is None) == (step is None), f"{c.op}: bank_steps and step go together")
    if step is not None:
        c.counter("step", step)
    return {
        "bank": bank, "bank_labels": bank_labels, "sums": sums, "head": head, "count": count, "bank_ids": bank_ids,
        "bank_steps": bank_steps,
    }  # fmt: skip
