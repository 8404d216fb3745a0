"""`OwnLoss`, a loss that no kernel knows, and `CustomLoss`, one by what a pair costs. What runs it over a memory is
`plain/custom.py`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, nn

from .. import checks
from .pair_loss import PairLoss

Reduction = Literal["sum", "mean", "logsumexp", "max"]
Average = Literal["anchors", "pairs", "active pairs"]
First = Literal["positives", "negatives"]


class OwnLoss(nn.Module):
    """A loss in the place of a `PairLoss` that PyTorch computes: `CustomLoss`, `InChunks`, `SelectPairs`."""

    passes: ClassVar[tuple[tuple[int, ...], ...]] = ()
    """None that could be added up over parts of a memory."""

    def learning(self) -> list[Tensor]:
        """What its value depends on besides embeddings, and learns."""
        return [p for p in self.parameters() if p.requires_grad]

    def forward(self, *args: Any, **options: Any) -> None:
        """Not to be called: a `CrossBatchMemory` asks for the terms, or calls the loss inside."""
        raise TypeError(f"{type(self).__name__} is not called itself: give it to CrossBatchMemory or memory_loss")


class CustomLoss(OwnLoss):
    """A pair loss of your own, for `CrossBatchMemory` and `memory_loss`. It is differentiated by autograd, a chunk of
    the memory at a time: the B×M matrix is never stored.

    A subclass says what a pair costs, as elementwise functions of its similarity. For each anchor the terms of its
    positives are reduced to one number, those of its negatives to another; `anchor` makes of the two what the anchor
    pays; and the loss is the sum over the anchors divided by `average`. Parameters of the module learn along; another
    tensor that requires a gradient must not be used.

    Examples:
        >>> class Sigmoid(CustomLoss):
        ...     def positive(self, s):
        ...         return softplus(10 - 10 * s)
        ...     def negative(self, s):
        ...         return softplus(10 * s - 10)
        >>> criterion = CrossBatchMemory(Sigmoid(), embedding_size=128, memory_size=8192)

    Attributes:
        reduction: how the terms of an anchor are reduced: `"sum"` (the default), `"mean"`, `"logsumexp"` or `"max"`; or
            two of them, for positives and negatives. Of no terms a sum and a mean are 0, the others -inf. An anchor
            without any pair pays nothing.
        average: what the costs of the anchors are divided by, at least 1: the number of `"anchors"` (the default), of
            all their `"pairs"`, or of the `"active pairs"`, whose term is not 0.
        needs_both: True: an anchor without positives or without negatives pays nothing, and is not counted.
        first: None, or the pairs whose terms are reduced first. Those of the others may then depend on that number:
            with `"positives"` it is `negative(s, positives)`, with `"negatives"` `positive(s, negatives)`, the second
            argument being `[B, 1]`. The gradient goes through it unless you detach it. This takes twice the sweeps.

    Raises:
        TypeError: a function of a subclass returns something else than as many numbers as it was given, or uses a
            tensor that requires a gradient and is no parameter of the loss.
        ValueError: an attribute is not one of these words. Raised when the loss is made; and, before anything is
            written, by the step after it was set.
    """

    reduction: ClassVar[Reduction | tuple[Reduction, Reduction]] = "sum"
    average: ClassVar[Average] = "anchors"
    needs_both: ClassVar[bool] = False
    first: ClassVar[First | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.check()

    def check(self) -> None:
        """Raises ValueError for an attribute that is not one of its words."""
        for word in self.reductions:
            _known("reduction", word, get_args(Reduction))
        _known("average", self.average, get_args(Average))
        checks.flag("needs_both", self.needs_both)
        if self.first is not None:
            _known("first", self.first, get_args(First))

    @property
    def reductions(self) -> tuple[Reduction, Reduction]:
        """Those of positives and negatives."""
        both = (self.reduction,) * 2 if isinstance(self.reduction, str) else self.reduction
        if not isinstance(both, tuple | list) or len(both) != 2:
            raise ValueError(f"reduction must be a word or two of them, for positives and negatives, got {both!r}")
        return both[0], both[1]

    def positive(self, s: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # which a type checker takes for: or more
        """The terms of positive pairs, by their similarities `[B, n]`, each of its own similarity alone; and with
        `first = "negatives"` of the anchor's number."""
        raise NotImplementedError("a CustomLoss must have positive(s)")

    def negative(self, s: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The terms of negative pairs, likewise."""
        raise NotImplementedError("a CustomLoss must have negative(s)")

    def anchor(self, positives: Tensor, negatives: Tensor) -> Tensor:
        """What anchors pay, `[B]`, by the reduced terms of their positives and negatives, `[B]` each."""
        return positives + negatives


def _known(name: str, word: str, words: tuple[str, ...]) -> None:
    if word not in words:
        raise ValueError(f"{name} must be {checks.listed([repr(w) for w in words])}, got {word!r}")


AnyLoss = PairLoss | OwnLoss
