"""The losses that the kernels know."""

from __future__ import annotations

from typing import Any

from . import exponents, margins
from .pair_loss import PairLoss

KINDS: dict[str, PairLoss] = {loss.kind: loss for loss in (*margins.KINDS, *exponents.KINDS)}
"""Every kind of loss that the kernels know, with its default parameters."""

LOSSES = {loss.name: type(loss) for loss in KINDS.values()}
"""Their classes, by name."""


def check_loss(op: str, loss: Any) -> None:
    """Raises TypeError unless the kernels know the loss: a class of `LOSSES`, or a subclass with the same numbers."""
    classes = tuple(LOSSES.values())
    if not isinstance(loss, classes):
        hint = ", which InChunks takes" if hasattr(loss, "compute_loss") else ""  # one of pytorch-metric-learning
        raise TypeError(f"{op}: loss must be an xbn_ext loss such as Contrastive(), got {type(loss).__name__}{hint}")
    if type(loss) in classes:
        return
    known = KINDS.get(loss.kind)
    if known is None or loss.numbers() != known.numbers():
        raise TypeError(
            f"{op}: loss must be one that the kernels know: {type(loss).__name__} is of the kind {loss.kind!r} and has "
            f"the numbers {', '.join(loss.numbers())}"
        )
