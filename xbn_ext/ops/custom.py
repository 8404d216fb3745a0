"""A `CustomLoss` in the place of a native one: no op, but the PyTorch of `plain/custom.py`, with its gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from .._autograd import needs_grad, with_gradient, without_autocast
from ..losses import CustomLoss, InChunks, OwnLoss
from ..plain import custom, in_chunks
from ..plain.contract import Contract
from ..plain.loss_of_batch import NormalizedSimilarities, OwnSimilarities, check_batch
from ..plain.loss_of_memory import BankSimilarities, Ranked, check_memory_loss

F = TypeVar("F", bound=Callable[..., Any])


def outside_of_graphs(function: F) -> F:
    """A compiled graph ends here: the host reads how many rows there are, and calls the user's functions."""

    @wraps(function)
    def outside(*args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():  # only then, since disable() imports torch's compiler
            torch._dynamo.graph_break("a loss of your own is computed outside of graphs: compile without fullgraph")
            return torch.compiler.disable(function)(*args, **options)
        return function(*args, **options)

    return cast(F, outside)


@outside_of_graphs
def memory_loss(
    z: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, loss: OwnLoss, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """As `memory_loss_and_pairs`; `options` are complete. A pair counts where its term is not 0."""
    c, told = Contract("memory_loss", z), Ranked(**options)
    check_memory_loss(c, z, labels, bank, bank_labels, told)
    if told.count is not None:
        c.value("count", told.count, len(bank))
    with without_autocast(z.device.type), torch.no_grad():
        similarities = BankSimilarities(z.detach(), labels, bank.detach(), bank_labels, told)
    need_grad = _needs_grad(loss, z)
    with without_autocast(z.device.type), torch.no_grad():
        if isinstance(loss, InChunks):
            result = in_chunks.over_bank(loss, similarities, need_grad)
        else:
            result = custom.loss_of(_custom(loss), similarities, z.dtype, need_grad)
    return _with_gradients(result, loss, z, result.grad), result.pairs


@outside_of_graphs
def batch_loss(
    z: Tensor, labels: Tensor, loss: OwnLoss, ids: Tensor | None, anchors: Tensor | None, renormalize: bool,
    eps: float,
) -> Tensor:  # fmt: skip
    """As `batch_loss`."""
    rows, need_grad = z.detach(), _needs_grad(loss, z)
    with without_autocast(z.device.type), torch.no_grad():
        dots = rows @ rows.T
        c = Contract("batch_loss", dots)
        check_batch(c, dots, labels, ids, anchors, None)
        c.eps(eps)
        if isinstance(loss, InChunks):
            result = in_chunks.over_batch(loss, rows, labels, ids, anchors, need_grad)
            grad = result.grad
        else:
            similarities = OwnSimilarities(dots, labels, ids, anchors)
            if renormalize:
                similarities = NormalizedSimilarities(dots, labels, ids, anchors, eps)
            result = custom.loss_of(_custom(loss), similarities, z.dtype, need_grad)
            grad = None if result.grad is None else (result.grad + result.grad.T) @ rows
    return _with_gradients(result, loss, z, grad)


@outside_of_graphs
def try_out(loss: OwnLoss, z: Tensor) -> None:
    """Raises what the loss raises of embeddings of the dtype, device and width of z, or of what it returns for them.
    torch's random numbers go on as if it had not been called."""
    with torch.random.fork_rng([z.device] if z.device.type == "cuda" else []):
        if isinstance(loss, InChunks):
            in_chunks.try_out(loss, z)
        else:
            custom.try_out(_custom(loss), z)


def _custom(loss: OwnLoss) -> CustomLoss:
    if not isinstance(loss, CustomLoss):
        raise TypeError(f"loss must be a CustomLoss or an InChunks, got {type(loss).__name__}")
    return loss


def _needs_grad(loss: OwnLoss, z: Tensor) -> bool:
    learns = [needs_grad(t) for t in (z, *loss.parameters())]  # all are looked at: one with a tangent raises
    return any(learns)


def _with_gradients(result: custom.Result, loss: OwnLoss, z: Tensor, grad: Tensor | None) -> Tensor:
    value = result.value.to(z.dtype)
    if grad is None:
        return value
    learning = [p for p in loss.parameters() if p.requires_grad]
    whole = with_gradient(value, z, grad, *learning) if z.requires_grad else value
    for parameter, its in zip(learning, result.of_parameters, strict=True):
        whole = whole + with_gradient(torch.zeros_like(value), parameter, its, z, *learning)
    return whole
