"""The ops, one screen each: typed wrapper, its gradient, fake kernel. `schemas.py` has their signatures, `csrc/glue/`
calls their kernels; what they mean is in `xbn_ext.reference`, which has the same names and signatures. The ops of
`torch.ops.xbn_ext` themselves have no gradients: called directly, `torch.autograd.grad` raises and `backward()` warns,
and leaves a part out.

Letters: B batch rows, M bank rows (capacity), D dimension. Embeddings are float32 or float64, the bank is of any of
`xbn_ext.dtypes.MEMORY_DTYPES`, whatever their dtype; statistics are float64, counters int64 scalars. Bad shapes, dtypes
and devices raise RuntimeError naming the op and the argument before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import _library  # noqa: F401  registers torch.ops.xbn_ext
from ._autograd import differentiable_once, needs_grad, with_gradient, without_autocast, writes
from .losses import PairLoss, check_loss, fold_temperature
from .options import LOSS_DEFAULTS, PAIR_DEFAULTS, LossOptions, PairOptions, complete

_ops: Any = torch.ops.xbn_ext
_ARGUMENTS: dict[str, list[str]] = {}  # of each op with a fake kernel, by name: those of its schema


@contextmanager
def over(namespace: Any) -> Iterator[None]:
    """Within it the functions here call the ops of another namespace than `torch.ops.xbn_ext`, or a module's functions
    with their arguments. In all threads, and in the backward of what was computed, which must be within it, too. For
    the project's tests and benchmark."""
    global _ops
    before, _ops = _ops, namespace
    try:
        yield
    finally:
        _ops = before


def _fake(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers what gives the results' shapes. One tensor on the meta device brings a call here: of others on a CPU it
    would make numbers that nothing has computed, or write nothing, so here too all must be on one device."""
    names = [argument.name for argument in getattr(_ops, op).default._schema.arguments]
    _ARGUMENTS[op] = names

    def register(shapes: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any) -> Any:
            tensors = [(name, t) for name, t in zip(names, args, strict=False) if isinstance(t, Tensor)]
            for name, t in tensors:
                if t.device != tensors[0][1].device:
                    raise RuntimeError(f"{op}: {name} is on another device than the other arguments")
            return shapes(*args)

        torch.library.register_fake(f"xbn_ext::{op}")(checked)
        return shapes

    return register


def normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """The rows of `x [B, D]` divided by `max(|row|, eps)`, as `torch.nn.functional.normalize` does, by one kernel; its
    gradient by another.

    Norms are float64, so those of finite float32 rows never overflow.

    Raises:
        RuntimeError: x is not `[B, D]`, float32 or float64; or a second derivative or a forward-mode one is asked for.
    """
    z, norm = _ops.normalize(x.detach(), eps)
    return _Normalized.apply(z, x, norm, eps) if needs_grad(x) else z  # type: ignore[no-any-return]


@_fake("normalize")
def _(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float64)


class _Normalized(torch.autograd.Function):
    """`z`, which depends on x."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        z = z.view_as(z)
        ctx.save_for_backward(z, norm)
        ctx.eps = eps
        return z

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor) -> tuple[Tensor | None, ...]:
        z, norm = ctx.saved_tensors
        with torch.no_grad():  # detach() would do, if it could be batched: is_grads_batched=True
            grad_x = _ops.normalize_backward(grad_z, z, norm, ctx.eps)
        return None, differentiable_once(grad_x, grad_z, z), None, None


@_fake("normalize_backward")
def _(grad_z: Tensor, z: Tensor, norm: Tensor, eps: float) -> Tensor:
    return z.new_empty(z.shape)


def moments(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased std per dimension of the finite rows of `x [B, D]` in `mask [B]` (bool; None: all).

    Returns `mean [D]`, `std [D]` (float64) and `rows []` (int64), how many rows counted; with none, zeros.
    """
    return _ops.moments(x, mask)  # type: ignore[no-any-return]


@_fake("moments")
def _(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    D = x.shape[1]
    return (
        x.new_empty(D, dtype=torch.float64),
        x.new_empty(D, dtype=torch.float64),
        x.new_empty((), dtype=torch.int64),
    )


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
    """Measures the moments of `x [B, D]`, filters them, and composes the map that moves the bank there.

    Args:
        target_mean: `[D]` filter state, written.
        target_std: `[D]` filter state, written.
        variance: scalar, filter variance, written; infinite before the first measurement.
        scale: `[D]` of the bank's pending map, written: a stored row u stands for `scale * u + shift`.
        shift: `[D]` of the map, written.
        x: `[B, D]` embeddings of the batch; rows that are not finite are left out, and with fewer than two rows nothing
            is measured.
        mask: `[B]` bool, the rows to measure; None: all.
        sums: `[2, D]` sum and sum of squares of the stored rows.
        count: how many rows are stored.
        process_noise: q >= 0, may be infinite; only q / r matters.
        measurement_noise: r > 0.
        fixed_gain: use this gain in [0, 1] after the first measurement instead of the Kalman gain.
        eps: a dimension with a standard deviation below it keeps its scale.
        stats: `[3]` float64, written: how far the bank's moments are from those of the batch before and after the map,
            `sqrt(|mean - mean|² + |std - std|²)`, NaN where the batch measures nothing or the bank is empty; and the
            gain of the filter, 0 where the batch measures nothing.
    """
    writes(target_mean, target_std, variance, scale, shift, stats)
    _ops.track_(
        target_mean, target_std, variance, scale, shift, x, mask, sums, count,
        process_noise, measurement_noise, fixed_gain, eps, stats,
    )  # fmt: skip


@_fake("track_")
def _(*args: Any) -> None:
    return None


def transform_(bank: Tensor, sums: Tensor, scale: Tensor, shift: Tensor, count: Tensor) -> None:
    """Writes the pending map into rows [0, count) of `bank [M, D]`: they become `scale * row + shift`.

    `sums [2, D]` is recounted from the rows as written; `scale`, `shift` `[D]` become 1 and 0.
    """
    writes(bank, sums, scale, shift)
    _ops.transform_(bank, sums, scale, shift, count)


@_fake("transform_")
def _(*args: Any) -> None:
    return None


def standardize_(bank: Tensor, sums: Tensor, scale: Tensor, shift: Tensor, count: Tensor, eps: float = 1e-6) -> None:
    """Rewrites the rows of a bank with a pending map in standardised coordinates, if they have left them.

    What the rows stand for does not change: `scale`, `shift` `[D]` compensate, `sums [2, D]` is recounted. A dimension
    whose standard deviation is below `eps` is left alone. Costs a look at D numbers when there is nothing to do.
    """
    writes(bank, sums, scale, shift)
    _ops.standardize_(bank, sums, scale, shift, count, eps)


@_fake("standardize_")
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
) -> Tensor:
    """Writes the finite rows of `z [B, D]` in `mask [B]` into the ring as `(z - shift) / scale`.

    `bank [M, D]`, `bank_labels [M]`, `sums [2, D]`, `head`, `count` are updated. Returns `slots [B]` (int64):
    where each row went, -1 where it was not stored. If there are more rows than the ring holds, the last M stay.

    `bank_ids [M]` (int64) takes the rows' `ids [B]`, or `-2 - slot` for a row that has none (`ids` is None or
    negative): no other row of the ring has that. `bank_steps [M]` (int64) takes `step`, a scalar.
    """
    writes(bank, bank_labels, sums, head, count, bank_ids, bank_steps)
    return _ops.enqueue_(  # type: ignore[no-any-return]
        bank, bank_labels, sums, head, count, z, labels, mask, scale, shift, bank_ids, ids, bank_steps, step
    )


@_fake("enqueue_")
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


def memory_loss(
    z: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, loss: PairLoss, **options: Unpack[LossOptions]
) -> Tensor:
    """Loss of a batch against a bank of embeddings, differentiable in `z`, in one sweep over the bank.

    The similarity is `z_i · r_j / max(|r_j|, eps)`; neither the B×M similarities nor a second bank is ever stored. (On
    a GPU the composite way stores a chunk of them, about 24 MB, the screen a bit for each pair: `xbn_ext.loss_way`.)

    Args:
        z: `[B, D]` embeddings, usually of unit length.
        labels: `[B]` int64.
        bank: `[M, D]` contiguous; carries no gradient.
        bank_labels: `[M]` int64.
        loss: which loss, with its parameters (`xbn_ext.losses`).
        options: those of `xbn_ext.options.LossOptions`.

    Returns:
        A scalar of z's dtype. An anchor with a NaN or an Inf makes it NaN (unless it has no pairs that it would pay
        for), and its own gradient in any case.

    Raises:
        RuntimeError: an argument is not as above; or a second derivative or a forward-mode one is asked for.
        TypeError: there is no such option, or no such loss.
    """
    return _memory_loss("memory_loss", z, labels, bank, bank_labels, loss, options)[0]


def memory_loss_and_pairs(
    z: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, loss: PairLoss, **options: Unpack[LossOptions]
) -> tuple[Tensor, Tensor]:
    """`memory_loss`, and `pairs [2]` (float64): how many positives and negatives of an anchor have a weight, on average
    over the anchors. A pair has no weight if it is within its margin, not mined, or in no triplet that costs something.
    """
    return _memory_loss("memory_loss_and_pairs", z, labels, bank, bank_labels, loss, options)


def _memory_loss(
    function: str, z: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, loss: PairLoss, options: LossOptions
) -> tuple[Tensor, Tensor]:
    arguments = complete(function, options, LOSS_DEFAULTS)
    for name in ("scale", "shift"):
        if isinstance(arguments[name], Tensor):  # what is neither this nor None, torch refuses by name
            arguments[name] = arguments[name].double()
    arguments.update(labels=labels, bank=bank.detach(), bank_labels=bank_labels)
    return _ranked("memory_loss", z, loss, arguments)


def _ranked(
    op: str, z: Tensor, loss: PairLoss, arguments: dict[str, Any], written: tuple[Tensor, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Loss and pairs by an op that takes `arguments`, in the order of its schema, and what is put into them here."""
    check_loss(op, loss)
    loss, z = fold_temperature(loss, z)
    need_grad = needs_grad(z)
    arguments.update(z=z.detach(), loss=loss.kind, parameters=loss.parameters, need_grad=need_grad)
    writes(*written)
    value, grad_z, pairs = getattr(_ops, op)(*[arguments[name] for name in _ARGUMENTS[op]])
    return (with_gradient(value, z, grad_z) if need_grad else value), pairs


@_fake("memory_loss")
def _memory_loss_fake(z: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_grad = args[-1]
    grad_z = z.new_empty(z.shape if need_grad else (0, z.shape[1]))
    return z.new_empty(()), grad_z, z.new_empty(2, dtype=torch.float64)


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
    """`transform_`, then `memory_loss_and_pairs` of the moved bank. On a CPU one sweep does both where batch and bank
    have the same dtype, the batch has at most 256 rows and `ranked` is None or equals `count`; mined losses and all
    triplets always take two.

    Args:
        ranked: int64 scalar, how many of the `count` rows are ranked against; None: all.
        options: those of `xbn_ext.options.PairOptions`.

    The other arguments are those of the two ops. `z` must not share memory with `bank`.
    """
    arguments = complete("transform_memory_loss_", options, PAIR_DEFAULTS)
    arguments.update(bank=bank, sums=sums, scale=scale, shift=shift, count=count, ranked=ranked)
    arguments.update(labels=labels, bank_labels=bank_labels)
    return _ranked("transform_memory_loss_", z, loss, arguments, written=(bank, sums, scale, shift))


@_fake("transform_memory_loss_")
def _(
    bank: Tensor, sums: Tensor, scale: Tensor, shift: Tensor, count: Tensor, z: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _memory_loss_fake(z, *args)  # type: ignore[no-any-return]


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
    """Loss of a batch against itself: each anchor with all other rows. Differentiable in `z` on both sides.

    Holds the B×B similarities and their gradient while it runs.

    Args:
        z: `[B, D]` embeddings.
        labels: `[B]` int64.
        loss: which loss, with its parameters (`xbn_ext.losses`).
        ids: `[B]` int64 sample ids: rows with the same id (>= 0) are not paired.
        anchors: `[B]` bool, the rows that rank; None: all. Every row is ranked.
        renormalize: the similarity is `z_i · z_j / max(|z_j|, eps)`; False: `z_i · z_j`.
        eps: lower bound of a row's norm.

    Returns:
        A scalar of z's dtype. A row with a NaN or an Inf makes it NaN (unless no anchor that pays has a pair with it),
        and the gradient in any case.

    Raises:
        RuntimeError: an argument is not as above; or a second derivative or a forward-mode one is asked for.
    """

    def op(dots: Tensor, loss: PairLoss, renormalize: bool, need_grad: bool) -> tuple[Tensor, Tensor]:
        return _ops.batch_loss(  # type: ignore[no-any-return]
            dots, labels, ids, anchors, loss.kind, loss.parameters, renormalize, eps, need_grad
        )

    check_loss("batch_loss", loss)
    if z.dim() != 2 or z.dtype not in (torch.float32, torch.float64):  # the op would speak of its products
        raise RuntimeError(f"batch_loss: z must be [B, D], float32 or float64, got {z.dtype} {list(z.shape)}")
    if isinstance(labels, Tensor) and labels.shape != z.shape[:1]:
        raise RuntimeError(f"batch_loss: labels must be [B] ({len(z)}), got {list(labels.shape)}")
    return from_products(op, loss, z, renormalize, eps)


def from_products(
    op: Callable[[Tensor, PairLoss, bool, bool], tuple[Tensor, Tensor]],
    loss: PairLoss,
    z: Tensor,
    renormalize: bool,
    eps: float,
) -> Tensor:
    """The loss by `op(dots, loss, renormalize, need_grad)`, which gives it and its derivative G by the products
    `[B, B]` of `z [B, D]` with itself. By z that is `(G + Gᵀ) z`. The op takes the rows' norms from the diagonal; where
    it cannot, as a learned temperature has gone into one side of the products, the other side is normalised first."""
    with without_autocast(z.device.type):
        if not renormalize:  # then no norm turns an Inf into NaN, and a product of Inf could cost nothing
            z = z * torch.where(z.isfinite().all(dim=1, keepdim=True), 1.0, torch.nan).to(z.dtype)
        folded, scaled = fold_temperature(loss, z)
        if scaled is z:
            need_grad, rows = needs_grad(z), z.detach()
            value, grad_dots = op(rows @ rows.T, folded, renormalize, need_grad)
            return with_gradient(value, z, (grad_dots + grad_dots.T) @ rows) if need_grad else value
        # Both gradients are made here: a backward pass inside an autocast block would take these products in 16 bits.
        sides = torch.cat((scaled, normalize(z, eps) if renormalize else z))
        need_grad, (anchors, rows) = needs_grad(sides), sides.detach().tensor_split(2)
        value, grad_dots = op(anchors @ rows.T, folded, False, need_grad)
        if not need_grad:
            return value
        return with_gradient(value, sides, torch.cat((grad_dots @ rows, grad_dots.T @ anchors)))


@_fake("batch_loss")
def _(dots: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    need_grad = args[-1]
    return dots.new_empty(()), dots.new_empty(dots.shape if need_grad else (0, dots.shape[1]))
