"""What the reducers of pytorch-metric-learning make of a loss of some of the anchors, in parts that can be added up.

They are known by name: the package itself is not needed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn


class SubLoss(NamedTuple):
    """Of some of the anchors: the sum of its losses, and by how many of them that of all anchors is divided; None: by
    nothing."""

    sum: Tensor  # []
    number: Tensor | float | None


KNOWN = (
    "MeanReducer", "SumReducer", "AvgNonZeroReducer", "ThresholdReducer", "DivisorReducer", "ClassWeightedReducer",
)  # fmt: skip
"""A `MultipleReducers` has one of them for each sub-loss. A subclass of one may do anything, and is not known."""


class Recorder(nn.Module):
    """Takes the place of the reducer of a loss while it is called, and keeps the sub-losses: of the `first` anchors
    only, if the others are copies of these. Raises TypeError where they cannot be added up."""

    def __init__(self, reducer: Any, first: int | None = None) -> None:
        super().__init__()
        self.reducer, self.first = reducer, first
        self.sub_losses: dict[str, SubLoss] = {}
        self.returned: list[Tensor] = []

    def forward(self, losses: dict[str, dict[str, Any]], embeddings: Tensor, labels: Tensor) -> Tensor:
        first = self.first
        if first is not None:
            losses = {name: _of_first(info, first) for name, info in losses.items()}
        for name, info in losses.items():
            if isinstance(info["losses"], Tensor) and info["losses"].numel() > 0:  # else it is 0, of no pairs
                self.sub_losses[name] = _sub_loss(self.reducer, name, info, embeddings[:first], labels[:first])
        self.returned.append(embeddings.sum() * 0)
        return self.returned[-1]

    def result(self, value: Any) -> dict[str, SubLoss]:
        """The sub-losses, if they are all that the loss has made `value` of. Raises TypeError if not."""
        if [value is of_reducer for of_reducer in self.returned] != [True]:
            raise TypeError("loss: it must call its reducer once, and return what that returns")
        return self.sub_losses


class OverElements(nn.Module):
    """Takes the place of a reducer inside of a loss: raises TypeError where that averages over something else than
    embeddings."""

    def __init__(self, reducer: Any, of: str) -> None:
        super().__init__()
        self.reducer, self.of = reducer, of

    def forward(self, losses: dict[str, dict[str, Any]], embeddings: Tensor, labels: Tensor) -> Tensor:
        for info in losses.values():
            if info["reduction_type"] not in ("element", "already_reduced"):
                raise TypeError(f"loss: {self.of} in it averages over pairs or triplets: give it to InChunks itself")
        return self.reducer(losses, embeddings, labels)  # type: ignore[no-any-return]


def check(loss: Any) -> None:
    """Raises TypeError unless `SubLoss` holds of the reducers of a loss, if it has any."""
    reducer = getattr(loss, "reducer", None)
    own = [] if reducer is None else [reducer]
    if reducer is not None and _is(reducer, "MultipleReducers"):
        own = [*reducer.reducers.values(), reducer.default_reducer]
    for r in own:
        if not _is(r, *KNOWN):
            raise TypeError(f"loss: its reducer must be one of {', '.join(KNOWN)}, got {type(r).__name__}")
    inner = {id(r) for r in (reducer, *own)}
    for module, other in inside(loss):
        if id(other) not in inner and not _is(other, "MeanReducer"):
            raise TypeError(f"loss: {type(module).__name__} in it has a reducer of its own, {type(other).__name__}")


def inside(loss: Any) -> list[tuple[nn.Module, Any]]:
    """Modules in a loss that have reducers of their own, and these."""
    modules = loss.modules() if isinstance(loss, nn.Module) else ()
    return [(m, m.reducer) for m in modules if m is not loss and getattr(m, "reducer", None) is not None]


def _is(reducer: Any, *names: str) -> bool:
    return type(reducer).__name__ in names


def _of_first(info: dict[str, Any], anchors: int) -> dict[str, Any]:
    """What so many of the anchors pay."""
    losses, indices = info["losses"], info["indices"]
    if not isinstance(losses, Tensor) or info["reduction_type"] == "already_reduced":
        return info
    of_pairs = isinstance(indices, tuple | list)
    its = (indices[0] if of_pairs else indices) < anchors
    return {**info, "losses": losses[its], "indices": tuple(i[its] for i in indices) if of_pairs else indices[its]}


def _sub_loss(reducer: Any, name: str, info: dict[str, Any], embeddings: Tensor, labels: Tensor) -> SubLoss:
    if _is(reducer, "MultipleReducers"):
        reducer = dict(reducer.reducers.items()).get(name, reducer.default_reducer)
    losses, of_all = info["losses"], info["reduction_type"] == "already_reduced"
    if _is(reducer, "DivisorReducer") and not of_all and "divisor" not in info:
        raise TypeError("loss: it says no divisor, which its DivisorReducer needs")
    if _is(reducer, "ClassWeightedReducer") and losses.dim() > 1 and not of_all:
        raise TypeError(
            "loss: ClassWeightedReducer would multiply what an anchor pays by the weights of all: this loss has its "
            f"costs as {list(losses.shape)}"
        )
    value = reducer({name: info}, embeddings, labels)
    if of_all:  # by another reducer, to a mean over the embeddings, or one number for all
        return SubLoss(value.sum() * len(embeddings), len(embeddings))
    if _is(reducer, "SumReducer"):
        return SubLoss(value, None)
    number: Any = len(losses)
    if _is(reducer, "AvgNonZeroReducer", "ThresholdReducer"):
        low, high = reducer.low, reducer.high
        counted = losses.isfinite() if low is None else losses > low
        number = (counted if high is None else counted & (losses < high)).sum()
    elif _is(reducer, "DivisorReducer"):
        number = info["divisor"]
        if number == 0:  # the reducer has left the losses out: others may make the divisor more
            return SubLoss(losses.sum(), number)
    return SubLoss(value * number, number)
