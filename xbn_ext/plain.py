"""Every op in plain PyTorch, with the arguments of its schema: `torch.ops.xbn_ext` without the compiled library.

They compute what `xbn_ext.reference` says, on any device that has float64, in bounded memory: the bank is taken in
chunks, and neither the B x M similarities nor a second bank is stored. Statistics are float64.

Nothing waits for a value on a GPU, so a step can be captured in a CUDA graph. A loss of all triplets can not: it waits
for the largest number of positives of an anchor. The price is that `memory_loss`, `transform_` and `standardize_` pass
over the whole bank there, however few of its rows are filled or have to be rewritten.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from . import chunked, contract
from ._autograd import without_autocast
from .chunked import filled_rows, is_finite, reads, rows_of_a_chunk

BACKENDS = ("auto", "simt", "tensor", "composite", "screen", "pairs")
_backend = "auto"

P = ParamSpec("P")
R = TypeVar("R")


def exact(op: Callable[P, R]) -> Callable[P, R]:
    """Autocast, which does not touch what a kernel computes, would round the products of a plain op."""

    @functools.wraps(op)
    def without(*args: P.args, **options: P.kwargs) -> R:
        first = args[0] if args else next(iter(options.values()))
        assert isinstance(first, Tensor)
        with without_autocast(first.device.type):
            return op(*args, **options)

    return without


@exact
def normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    contract.check_normalize(x, eps)
    wide = x.double()
    norm = torch.linalg.vector_norm(wide, dim=1)
    return (inverse_length(norm, eps)[:, None] * wide).to(x.dtype).contiguous(), norm


def inverse_length(norm: Tensor, eps: float) -> Tensor:
    return 1 / torch.where(norm < eps, eps, norm)


@exact
def normalize_backward(grad_z: Tensor, z: Tensor, norm: Tensor, eps: float) -> Tensor:
    contract.check_normalize_backward(grad_z, z, norm, eps)
    grad, wide = grad_z.double(), z.double()
    along = torch.where(norm < eps, 0, (grad * wide).sum(1))
    grad_x = inverse_length(norm, eps)[:, None] * (grad - along[:, None] * wide)
    return grad_x.to(z.dtype).contiguous()


@exact
def moments(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    contract.check_moments(x, mask)
    rows = is_finite(x)
    if mask is not None:
        rows = rows & mask
    n = rows.sum()
    if len(x) == 0:
        zeros = x.new_zeros(x.shape[1], dtype=torch.float64)
        return zeros, zeros.clone(), n
    wide = x.double()
    first = wide.index_select(0, rows.to(torch.uint8).argmax().view(1))  # a mean far from zero costs no digits
    off = torch.where(rows[:, None], wide - first, 0)
    number = n.clamp(min=1)
    mean = off.sum(0) / number
    square = torch.where(rows[:, None], off - mean, 0).square().sum(0) / number
    return torch.where(n > 0, first[0] + mean, 0), square.sqrt(), n


def bank_moments(sums: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.bank_moments`, without a look at the count."""
    mean, mean_square = sums / count.clamp(min=1)
    variance = mean_square - mean**2
    std = torch.where(variance > 1e-12 * mean_square, variance, 0).sqrt()
    return torch.where(count == 0, 0, mean), torch.where(count == 0, 1, std)


@exact
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
    fixed_gain: float | None,
    eps: float,
    stats: Tensor | None = None,
) -> None:
    contract.check_track(
        target_mean, target_std, variance, scale, shift, x, mask, sums, count, process_noise, measurement_noise,
        fixed_gain, eps, stats,
    )  # fmt: skip
    x, mask = x.contiguous(), _dense(mask)
    written = {
        "target_mean": target_mean, "target_std": target_std, "variance": variance, "scale": scale, "shift": shift,
        "stats": stats,
    }  # fmt: skip
    contract.apart("track_", written, {"x": x, "mask": mask, "sums": sums, "count": count})
    mean, std, rows = moments(x, mask)
    measures = rows >= 2
    prior = variance + process_noise
    gain = 1 / (1 + measurement_noise / prior)
    if fixed_gain is not None:
        gain = torch.where(prior.isfinite(), fixed_gain, gain)
    gain = torch.where(measures, gain, 0)
    variance.copy_(torch.where(measures, gain * measurement_noise, prior))
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


def chunks_of(bank: Tensor, count: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The filled rows of a bank `[M, D]`, views of it, and which rows of a view are filled, `[n, 1]`; None: all."""
    n, unread = filled_rows(count, len(bank))
    # A sixteenth of a chunk on a CPU: all copies of it stay in the nearest cache.
    step = rows_of_a_chunk(bank.device, bank.shape[1] * (16 if bank.device.type == "cpu" else 1))
    for start in range(0, n, step):
        rows = bank[start : min(start + step, n)]
        is_filled = None
        if unread is not None:
            is_filled = (torch.arange(start, start + len(rows), device=bank.device) < unread)[:, None]
        yield rows, is_filled


def rewrite(bank: Tensor, count: Tensor, a: Tensor, b: Tensor, wanted: Tensor | None = None) -> Tensor:
    """The filled rows become `a * row + b`, if `wanted []` (None: yes). Returns their `sums [2, D]`, as rounded."""
    compute = torch.promote_types(bank.dtype, torch.float32)
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


@exact
def transform_(bank: Tensor, sums: Tensor, scale: Tensor, shift: Tensor, count: Tensor) -> None:
    c = contract.check_transform(bank, sums, scale, shift, count)
    contract.apart("transform_", {"bank": bank, "sums": sums, "scale": scale, "shift": shift}, {"count": count})
    c.value("count", count, len(bank))
    _transform(bank, sums, scale, shift, count)


def _transform(bank: Tensor, sums: Tensor, scale: Tensor, shift: Tensor, count: Tensor) -> None:
    sums.copy_(rewrite(bank, count, scale, shift))
    scale.fill_(1)
    shift.fill_(0)


@exact
def standardize_(bank: Tensor, sums: Tensor, scale: Tensor, shift: Tensor, count: Tensor, eps: float) -> None:
    """Looks at D numbers on a CPU where there is nothing to do; elsewhere it passes over the bank all the same."""
    c = contract.check_transform(bank, sums, scale, shift, count, "standardize_")
    c.eps(eps)
    contract.apart("standardize_", {"bank": bank, "sums": sums, "scale": scale, "shift": shift}, {"count": count})
    c.value("count", count, len(bank))
    mean, std = bank_moments(sums, count)
    live = scale.abs() * std >= eps
    off = live & ((mean.abs() > 4) | (std > 4) | (std < 0.25))
    wanted = off.any() & (count > 0)
    if reads(bank.device) and not wanted:
        return
    compute = torch.promote_types(bank.dtype, torch.float32)
    # Rounded as the rows are computed, so that the map undoes just that.
    a = torch.where(live & wanted, 1 / std, 1).to(compute).double()
    b = torch.where(live & wanted, -mean * a, 0).to(compute).double()
    sums.copy_(torch.where(wanted, rewrite(bank, count, a, b, wanted), sums))
    scale.div_(a)
    shift.sub_(scale * b)


@exact
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
    bank_ids: Tensor | None = None,
    ids: Tensor | None = None,
    bank_steps: Tensor | None = None,
    step: Tensor | None = None,
) -> Tensor:
    c = contract.check_enqueue(
        bank, bank_labels, sums, head, count, z, labels, mask, scale, shift, bank_ids, ids, bank_steps, step
    )
    z, labels, mask, ids = z.contiguous(), labels.contiguous(), _dense(mask), _dense(ids)
    written = {
        "bank": bank, "bank_labels": bank_labels, "sums": sums, "head": head, "count": count, "bank_ids": bank_ids,
        "bank_steps": bank_steps,
    }  # fmt: skip
    read = {"z": z, "labels": labels, "ids": ids, "mask": mask, "scale": scale, "shift": shift, "step": step}
    contract.apart("enqueue_", written, read)
    M, B = len(bank), len(z)
    c.value("head", head, M - 1)
    c.value("count", count, M)

    compute = torch.promote_types(bank.dtype, torch.float32)
    u = ((z.double() - shift) / scale).to(compute).to(bank.dtype)
    store = is_finite(u)
    if mask is not None:
        store = store & mask
    n = store.sum()
    surplus = (n - M).clamp(min=0)  # of more rows than the ring holds, the last M stay
    place = store.cumsum(0) - 1 - surplus
    store = store & (place >= 0)
    slots = torch.where(store, (head + place) % M, -1)

    # The slots that could be written, and the row that comes into each, if one does.
    window = torch.arange(min(B, M), device=bank.device)
    into, comes = (head + window) % M, window < n
    row = (~store).to(torch.uint8).argsort(stable=True)[: len(window)]

    def write(to: Tensor, new: Tensor) -> None:
        has_row = comes.view(-1, *[1] * (to.dim() - 1))
        to.index_copy_(0, into, torch.where(has_row, new, to[into]))

    evicted = torch.where((comes & (into < count))[:, None], bank[into].double(), 0)
    entering = torch.where(comes[:, None], u[row].double(), 0)
    sums.add_(torch.stack([(entering - evicted).sum(0), (entering.square() - evicted.square()).sum(0)]))
    write(bank, u[row])
    write(bank_labels, labels[row])
    if bank_ids is not None:
        own = -2 - slots
        write(bank_ids, (own if ids is None else torch.where(ids >= 0, ids, own))[row])
    if bank_steps is not None and step is not None:
        write(bank_steps, step.expand(len(window)))
    stored = n - surplus
    head.copy_((head + stored) % M)
    count.copy_((count + stored).clamp(max=M))
    return slots


@exact
def memory_loss(
    z: Tensor,
    labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    count: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    bank_ids: Tensor | None,
    exclude: Tensor | None,
    anchors: Tensor | None,
    loss: str,
    parameters: Sequence[float],
    renormalize: bool,
    eps: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    c = contract.check_memory_loss(z, labels, bank, bank_labels, count, scale, shift, bank_ids, exclude, anchors, eps)
    pair_loss = contract.parse_loss("memory_loss", loss, parameters)
    if count is not None:
        c.value("count", count, len(bank))
    return chunked.memory_loss(
        z, labels, bank, bank_labels, pair_loss, count=count, scale=scale, shift=shift, bank_ids=bank_ids,
        exclude=exclude, anchors=anchors, renormalize=renormalize, eps=eps, need_grad=need_grad,
    )  # fmt: skip


@exact
def transform_memory_loss_(
    bank: Tensor,
    sums: Tensor,
    scale: Tensor,
    shift: Tensor,
    count: Tensor,
    z: Tensor,
    labels: Tensor,
    bank_labels: Tensor,
    ranked: Tensor | None,
    bank_ids: Tensor | None,
    exclude: Tensor | None,
    anchors: Tensor | None,
    loss: str,
    parameters: Sequence[float],
    renormalize: bool,
    eps: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "transform_memory_loss_"
    c = contract.check_transform(bank, sums, scale, shift, count, op)
    contract.check_memory_loss(z, labels, bank, bank_labels, None, scale, shift, bank_ids, exclude, anchors, eps, op)
    if ranked is not None:
        c.counter("ranked", ranked)
    pair_loss = contract.parse_loss(op, loss, parameters)
    z, labels, bank_labels = z.contiguous(), labels.contiguous(), bank_labels.contiguous()
    bank_ids, exclude, anchors = _dense(bank_ids), _dense(exclude), _dense(anchors)
    read = {
        "count": count, "z": z, "labels": labels, "bank_labels": bank_labels, "ranked": ranked, "bank_ids": bank_ids,
        "exclude": exclude, "anchors": anchors,
    }  # fmt: skip
    contract.apart(op, {"bank": bank, "sums": sums, "scale": scale, "shift": shift}, read)
    c.value("count", count, len(bank))
    if ranked is not None:
        c.value("ranked", ranked, len(bank))
    _transform(bank, sums, scale, shift, count)
    return chunked.memory_loss(
        z, labels, bank, bank_labels, pair_loss, count=count if ranked is None else ranked, bank_ids=bank_ids,
        exclude=exclude, anchors=anchors, renormalize=renormalize, eps=eps, need_grad=need_grad,
    )  # fmt: skip


@exact
def batch_loss(
    dots: Tensor,
    labels: Tensor,
    ids: Tensor | None,
    anchors: Tensor | None,
    loss: str,
    parameters: Sequence[float],
    renormalize: bool,
    eps: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    contract.check_batch_loss(dots, labels, ids, anchors, eps)
    pair_loss = contract.parse_loss("batch_loss", loss, parameters)
    return chunked.batch_loss(
        dots, labels, pair_loss, ids=ids, anchors=anchors, renormalize=renormalize, eps=eps, need_grad=need_grad
    )


def cpu_isa() -> str:
    """There are no kernels whose instructions could be chosen."""
    return "none"


def cuda_architectures() -> str:
    return ""


def set_cuda_backend(name: str) -> str:
    """Returns what was set before. Without effect."""
    global _backend
    if name not in BACKENDS:
        raise RuntimeError(f"backend must be 'auto', 'simt', 'tensor', 'screen' or 'composite', got '{name}'")
    before, _backend = _backend, name
    return before


def _peak_fma(threads: int, rounds: int, float64: bool) -> tuple[float, float]:
    raise RuntimeError("_peak_fma: measures the processor by compiled code, and xbn_ext runs without its library")


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
