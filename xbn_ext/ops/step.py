"""A training step of a memory as one op (its signature: `schemas.py`; what it does: `csrc/glue/step.h`), and its loss
without the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from .. import checks
from .._autograd import needs_grad, with_centered_gradient, with_gradient, without_autocast, writes
from ..filter import Filter
from ..losses import AnyLoss, PairLoss, check_loss, check_unit_rows
from ..losses.learned import has_sides, learned_of, learned_offset, learns_temperature, with_temperature
from ..options import LossOptions
from ..reference.loss import nan_unless_finite
from ._namespace import arguments_of, call, fake
from .batch import normalize
from .loss_of_batch import of_batch, sides_of
from .loss_of_memory import memory_loss

__all__ = ["loss_of", "losses_of", "step_"]

# The tensors of a memory, as `xbn_ext.CrossBatchMemory` and `xbn_ext.reference.Memory` name them. All are written.
STATE = (
    "bank", "bank_labels", "bank_ids", "bank_steps", "sums", "head", "count", "scale", "shift", "target_mean",
    "target_std", "variance", "innovation", "step",
)  # fmt: skip
MEASURED = ("pairs", "drift_stats")  # these, too, if the memory has them

_update = checks.one_of("inplace", "deferred")
_enqueue = checks.one_of("after", "before")


def step_(
    memory: Any,
    embeddings: Tensor,
    labels: Tensor,
    loss: PairLoss,
    *,
    filter: Filter | None = Filter(None, 1.0, None),  # noqa: B008  immutable
    update: Literal["inplace", "deferred"] = "inplace",
    normalize_embeddings: bool = True,
    renormalize: bool = True,
    batch_weight: float = 1.0,
    memory_weight: float = 1.0,
    center_gradient: bool = False,
    warmup_steps: int = 0,
    enqueue: Literal["after", "before"] = "after",
    enqueue_mask: Tensor | None = None,
    ids: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """One training step of a memory by one op: `normalize`, `track_`, `transform_` or `standardize_`, `batch_loss`,
    `memory_loss`, `enqueue_` in turn. All arguments are checked before anything is written.

    The gradient is computed along with the loss; the backward pass multiplies it. On a GPU the rows may be moved as
    they are ranked; then `sums` are mapped as they are, and counted in every 1,024th step.

    Args:
        memory: has the tensors of `xbn_ext.reference.Memory` as attributes; the op writes all of them. If it has
            `pairs` and `drift_stats`, these become what `memory_loss_and_pairs` and `track_` return of them.
        embeddings: `[B, D]` float32 or float64.
        labels: `[B]` int64.
        loss: which loss, with its parameters (`xbn_ext.losses`).
        filter: how the memory follows the drift (`xbn_ext.filter.make_filter`); None: not at all.

    The others are those of `xbn_ext.CrossBatchMemory` and of its call.

    Returns:
        A scalar of the embeddings' dtype, differentiable in the embeddings and in a temperature that is a tensor.

    Raises:
        RuntimeError: an argument is not as above, naming it; or a second derivative or a forward-mode one is asked for.
        TypeError: no such loss.
        ValueError: no such `update` or `enqueue`; or rows are not to be normalised and the loss is of distances.
    """
    checks.tensors("step_", embeddings=embeddings)
    check_loss("step_", loss)
    check_unit_rows(loss, normalize_embeddings=normalize_embeddings, renormalize=renormalize)
    if learned_offset(loss) is not None and torch.is_grad_enabled():
        raise TypeError(f"step_: this op has no gradient for a {loss.offset} that is learned; CrossBatchMemory has one")
    if center_gradient and has_sides(loss):
        raise TypeError("step_: this op centres no gradient where the temperature is a tensor; CrossBatchMemory does")
    state = {name: getattr(memory, name) for name in STATE} | {name: getattr(memory, name, None) for name in MEASURED}
    with without_autocast(embeddings.device.type):
        x, normalizes = embeddings if normalize_embeddings else nan_unless_finite(embeddings), normalize_embeddings
        sides, given = None, loss
        if has_sides(loss):
            x, normalizes = normalize(x, eps) if normalizes else x, False
            loss, sides = sides_of(loss, x, renormalize and not normalize_embeddings, eps)
        source = x if sides is None else sides
        need_grad = needs_grad(source) or learns_temperature(given)
        noises = dict(zip(Filter._fields, filter or Filter(math.inf, 1.0, None), strict=True))
        arguments = {
            **state, **noises, "x": x.detach(), "sides": None if sides is None else sides.detach(), "labels": labels,
            "mask": enqueue_mask, "ids": ids, "loss": loss.kind, "parameters": loss.parameters,
            "follows": filter is not None, "deferred": _update("update", update) == "deferred",
            "stores_first": _enqueue("enqueue", enqueue) == "before",
            "normalizes": normalizes, "renormalize": renormalize, "batch_weight": batch_weight,
            "memory_weight": memory_weight, "center_gradient": center_gradient, "warmup_steps": warmup_steps,
            "eps": eps, "need_grad": need_grad,
        }  # fmt: skip
        writes(*state.values())
        value, grad = call("step_", arguments)
        if need_grad:
            value = with_gradient(value, source, grad, *learned_of(given))
        if not need_grad or sides is None:
            return value  # type: ignore[no-any-return]
        (ranking, _), (by_ranking, _) = sides.tensor_split(2), grad.tensor_split(2)
        return with_temperature(value, given, by_ranking, ranking)


def loss_of(
    memory: Any,
    embeddings: Tensor,
    labels: Tensor,
    loss: AnyLoss,
    *,
    normalize_embeddings: bool,
    enqueue_mask: Tensor | None,
    ids: Tensor | None,
    eps: float,
    **options: Any,
) -> Tensor:
    """The loss of a batch by a memory that is only read. Arguments, result and errors are those of `step_`."""

    def against(z: Tensor, given: LossOptions) -> Tensor:
        return memory_loss(z, labels, memory.bank, memory.bank_labels, loss, **given)

    with without_autocast(embeddings.device.type):
        z = normalize(embeddings, eps) if normalize_embeddings else embeddings
        return losses_of(
            memory, z, labels, loss, against, mask=enqueue_mask, ids=ids, normalize_embeddings=normalize_embeddings,
            eps=eps, **options,
        )  # fmt: skip


def losses_of(
    memory: Any,
    z: Tensor,
    labels: Tensor,
    loss: AnyLoss,
    against: Callable[[Tensor, LossOptions], Tensor],
    against_itself: Callable[..., Tensor] = of_batch,
    *,
    mask: Tensor | None,
    ids: Tensor | None,
    slots: Tensor | None = None,
    normalize_embeddings: bool,
    renormalize: bool,
    batch_weight: float,
    memory_weight: float,
    center_gradient: bool,
    warmup_steps: int,
    eps: float,
) -> Tensor:
    """The weighted losses of a batch z, against itself and against a memory as it lies.

    Args:
        against: the loss against the memory, from z and what it is to be told.
        against_itself: that of the batch, with the arguments of `of_batch`.
        slots: `[B]` where the rows have been stored, -1 for nowhere; None: nowhere.
        normalize_embeddings: whether the rows of z have been normalised. Then those of the batch are not once more, as
            it is ranked against itself: a short row's gradient would grow with the square of 1 / eps.
    """
    anchors, values = None if mask is None else ~mask, []
    if batch_weight != 0:
        again = renormalize and not normalize_embeddings
        own = against_itself(z, labels, loss, ids=ids, anchors=anchors, renormalize=again, eps=eps)
        values.append(batch_weight * own)
    if memory_weight != 0:
        given: LossOptions = {
            "count": ranked_rows(memory, warmup_steps), "scale": memory.scale, "shift": memory.shift,
            "anchors": anchors, "renormalize": renormalize, "eps": eps,
        }  # fmt: skip
        if ids is not None:  # a negative one could be that of a row without an id
            without = torch.full_like(ids, -1) if slots is None else -2 - slots
            given |= {"bank_ids": memory.bank_ids, "exclude": torch.where(ids >= 0, ids, without)}
        elif slots is not None:  # without ids, a row's is its slot
            given |= {"exclude": slots}
        ranking = with_centered_gradient(z, anchors) if center_gradient and torch.is_grad_enabled() else z
        # Named first: a compiled graph may end in this call, and with values.append pending it would be compiled again
        # at every step.
        of_memory = against(ranking, given)
        values.append(memory_weight * of_memory)
    return sum(values[1:], values[0])


def ranked_rows(memory: Any, warmup_steps: int) -> Tensor:
    """How many rows of a memory are ranked: while it warms up none are, which the device decides."""
    return torch.where(memory.step < warmup_steps, 0, memory.count) if warmup_steps else memory.count


@fake("step_")
def _(*args: Any) -> tuple[Tensor, Tensor]:
    given = dict(zip(arguments_of["step_"], args, strict=True))
    x, sides = given["x"], given["sides"]
    source = x if sides is None else sides
    return x.new_empty(()), x.new_empty(source.shape if given["need_grad"] else (0, x.shape[1]))
