"""A loss that no kernel knows in the place of a native one: no op, but PyTorch, with its gradients. `plain/custom.py`,
`in_chunks.py` and `select_pairs.py` have what each kind does."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from .. import checks
from .._autograd import needs_grad, with_gradient, without_autocast, without_saved_tensors_hooks
from ..dtypes import compute_dtype
from ..losses import CustomLoss, InChunks, OwnLoss, SelectPairs
from ..plain import custom, in_chunks, select_pairs
from ..plain.contract import Contract
from ..plain.loss_of_batch import Rows, check_batch
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
    need_grad = _needs_grad(loss, z)
    with without_autocast(z.device.type), torch.no_grad(), without_saved_tensors_hooks():
        similarities = BankSimilarities(z.detach(), labels, bank.detach(), bank_labels, told)
        result = _runner(loss).over_bank(loss, similarities, need_grad)
    return _with_gradients(result, loss, z), result.pairs


@outside_of_graphs
def batch_loss(
    z: Tensor, labels: Tensor, loss: OwnLoss, ids: Tensor | None, anchors: Tensor | None, renormalize: bool,
    eps: float,
) -> Tensor:  # fmt: skip
    """As `batch_loss`."""
    rows, need_grad = z.detach(), _needs_grad(loss, z)
    with without_autocast(z.device.type), torch.no_grad(), without_saved_tensors_hooks():
        dots = rows @ rows.T
        c = Contract("batch_loss", dots)
        check_batch(c, dots, labels, ids, anchors, None)
        c.eps(eps)
        batch = Rows(rows, dots, labels, ids, anchors, renormalize, eps)
        result = _runner(loss).over_batch(loss, batch, need_grad)
    return _with_gradients(result, loss, z)


@outside_of_graphs
def try_out(loss: OwnLoss, embeddings: Tensor, labels: Tensor) -> None:
    """Raises what the loss raises of embeddings of the dtype, device and width of these and of labels `[B]`, or of what
    it returns for them. torch's random numbers go on as if it had not been called."""
    z = embeddings.new_empty((0, embeddings.shape[1]), dtype=compute_dtype(embeddings.dtype))
    with torch.random.fork_rng([z.device] if z.device.type == "cuda" else []):
        _runner(loss).try_out(loss, z, labels)


class _Runner(Protocol):
    """What each kind of loss has in a file of `plain/`."""

    def over_bank(self, loss: Any, similarities: BankSimilarities, need_grad: bool) -> custom.Result:
        """Against a memory."""

    def over_batch(self, loss: Any, batch: Rows, need_grad: bool) -> custom.Result:
        """Of a batch against itself."""

    def try_out(self, loss: Any, z: Tensor, labels: Tensor) -> None:
        """Raises what the loss would."""


_RUNNERS: dict[type[OwnLoss], _Runner] = {CustomLoss: custom, InChunks: in_chunks, SelectPairs: select_pairs}


def _runner(loss: OwnLoss) -> _Runner:
    for kind, runner in _RUNNERS.items():
        if isinstance(loss, kind):
            return runner
    kinds = checks.listed([kind.__name__ for kind in _RUNNERS])
    raise TypeError(f"loss must be a {kinds}, got {type(loss).__name__}")


def _needs_grad(loss: OwnLoss, z: Tensor) -> bool:
    learns = [needs_grad(t) for t in (z, *loss.parameters(), *loss.learning())]  # all: one with a tangent raises
    return any(learns)


def _with_gradients(result: custom.Result, loss: OwnLoss, z: Tensor) -> Tensor:
    value, grad = result.value.to(z.dtype), result.grad
    if grad is None:
        return value
    learning = loss.learning()
    whole = with_gradient(value, z, grad, *learning) if z.requires_grad else value
    for parameter, its in zip(learning, result.of_parameters, strict=True):
        whole = whole + with_gradient(torch.zeros_like(value), parameter, its, z, *learning)
    return whole
