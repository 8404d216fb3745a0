"""`SelectPairs`: a pair loss with pairs that are not those of equal labels. What runs it is `plain/select_pairs.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..stateful import keeping_dtypes
from .custom import CustomLoss, OwnLoss
from .learned import learned_of
from .pair_loss import PairLoss
from .with_loss import WithLoss

Related = Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
Relation = Callable[[Tensor, Tensor], Related]


class SelectPairs(WithLoss, OwnLoss):
    """A pair loss that is told which pairs there are, for `CrossBatchMemory` and `memory_loss`: by any relation of two
    labels, and without the negatives that look like positives.

    It runs in plain PyTorch, a chunk of the memory at a time: the B×M matrix is never stored. What the loss learns is a
    parameter of this module.

    Examples:
        >>> def near(a, b):  # labels are numbers of places, in metres
        ...     distance = (place[a] - place[b]).norm(dim=-1)
        ...     return distance < 10, distance > 25
        >>> criterion = CrossBatchMemory(SelectPairs(Contrastive(), near), embedding_size=128, memory_size=8192)

    Args:
        loss: a pair loss of `xbn_ext`, or a `CustomLoss`.
        relation: called with labels of anchors `[b, 1]` and of rows `[1, n]` (int64), it returns `[b, n]` bool, which
            pairs are positives, and the others are negatives; or two of these, positives and negatives, and what is
            neither is no pair; or with them weights `[b, n]`, numbers from 0 on, by which the terms of a `CustomLoss`
            are multiplied (with `"logsumexp"` e to the terms), one of weight 0 being no pair. It must give the same of
            a pair each time. If it is a module, its tensors move along with this one; what it learns would get no
            gradient. None: positives are of equal labels. With `no_class`, rows of none come to it with labels of their
            own below -2^62.
        false_negative_margin: a negative that is more similar than the anchor's most similar positive, by more than
            this, is no pair: it may well be of the same class. In cosines, unless rows keep their length; below 0 it
            leaves out some that are less similar, too. Where an anchor has no positive, all its negatives count. The
            positives are those of the same side, the batch or the memory. None: all count. This takes one sweep more.

    Attributes:
        relation, false_negative_margin: may be set later; the next step looks at them.

    Raises:
        TypeError: `loss` is neither of these; `relation` cannot be called, writes the labels or returns something else.
        ValueError: `false_negative_margin` is not finite; weights are not, or are negative; a pair is positive and
            negative; or the relation has parameters that learn. What a relation returns is looked at before a step, for
            the labels of the batch.
    """

    def __init__(
        self,
        loss: PairLoss | CustomLoss,
        relation: Relation | None = None,
        *,
        false_negative_margin: float | None = None,
    ) -> None:
        super().__init__()
        if isinstance(loss, OwnLoss) and not isinstance(loss, CustomLoss):
            raise TypeError(f"loss must be a pair loss of xbn_ext or a CustomLoss, got {type(loss).__name__}")
        self._hold(loss)
        self.relation, self.false_negative_margin = relation, false_negative_margin
        self.check()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SelectPairs:
        """What the loss learns keeps its dtype, as it does in a memory."""
        for child in self.children() if recurse else ():
            child._apply(fn)
        super()._apply(keeping_dtypes(fn), recurse=False)
        return self

    def check(self) -> None:
        """Raises TypeError or ValueError for a relation or a margin that it does not take."""
        relation = self.relation
        if relation is not None and (not callable(relation) or isinstance(relation, type)):
            raise TypeError(f"relation must be None or a function of labels, got {relation!r}")
        if isinstance(relation, nn.Module) and any(p.requires_grad for p in relation.parameters()):
            raise ValueError("relation must have no parameters that learn: they would get no gradient")
        if self.false_negative_margin is not None:
            self.false_negative_margin = checks.moderate("false_negative_margin", self.false_negative_margin)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Gives what is learned of a `PairLoss` its first value again."""
        self._begin_to_learn()

    def learning(self) -> list[Tensor]:
        loss = self.loss
        return loss.learning() if isinstance(loss, OwnLoss) else learned_of(loss)

    def related(self, labels: Tensor, of_rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Positives and negatives of anchors `[b]` and rows `[n]`, both `[b, n]`, and the weights, if there are any.
        Raises TypeError where the relation returns something else than it must."""
        positive, negative, weight = self._given(labels, of_rows)
        negative = negative & ~positive
        if weight is None:
            return positive, negative, None
        has = weight.float() != 0  # as it is where similarities are float32
        return positive & has, negative & has, weight.detach()

    def try_relation(self, labels: Tensor) -> None:
        """Raises TypeError or ValueError for what is wrong with the relation, as far as labels `[B]` show it."""
        with torch.inference_mode(False):  # where a tensor counts how often it was written
            its, of_rows = labels.clone(), labels.clone()
        versions = its._version, of_rows._version
        positive, negative, weight = self._given(its, of_rows)
        if (its._version, of_rows._version) != versions:
            raise TypeError("relation: it must not write the labels, which are the caller's and the memory's")
        if bool((positive & negative).any()):
            raise ValueError("relation: a pair must not be positive and negative")
        if weight is not None and not bool((weight.float().isfinite() & (weight >= 0)).all()):
            raise ValueError("relation: weights must be finite in float32, and not negative")

    def _given(self, labels: Tensor, of_rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.relation is None:
            positive = labels[:, None] == of_rows
            return positive, ~positive, None
        result = self.relation(labels[:, None], of_rows[None])
        parts: tuple[Any, ...] = result if isinstance(result, tuple | list) else (result,)
        if not 1 <= len(parts) <= 3:
            raise TypeError(f"relation must return positives, negatives and weights at most, got {len(parts)} values")
        shape = (len(labels), len(of_rows))
        for what, part in zip(("positives", "negatives"), parts, strict=False):
            if not isinstance(part, Tensor) or part.dtype != torch.bool or part.shape != shape:
                raise TypeError(f"relation: {what} must be torch.bool {list(shape)}, got {_said(part)}")
            _check_place(what, part, labels)
        positive, negative, weight = parts[0], parts[1] if len(parts) > 1 else ~parts[0], None
        if len(parts) == 3:
            weight = parts[2]
            if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.shape != shape:
                raise TypeError(f"relation: weights must be floating-point numbers {list(shape)}, got {_said(weight)}")
            _check_place("weights", weight, labels)
            if not isinstance(self.loss, CustomLoss):
                raise TypeError(f"relation: weights need a CustomLoss, and the loss is {type(self.loss).__name__}")
        return positive, negative, weight

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "relation":  # a function may take the place of a module, and the reverse
            self._modules.pop(name, None)
            self.__dict__.pop(name, None)
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """What `print` shows."""
        relation = getattr(self.relation, "__name__", None) or type(self.relation).__name__
        return f"{self._name_of_loss()}, relation={relation if self.relation is not None else None}" + (
            "" if self.false_negative_margin is None else f", false_negative_margin={self.false_negative_margin}"
        )


def _check_place(what: str, part: Tensor, labels: Tensor) -> None:
    if part.layout != torch.strided:
        raise TypeError(f"relation: {what} must be dense, got {part.layout}")
    if part.device != labels.device:
        raise TypeError(f"relation: {what} must be on {labels.device}, as the labels are, got {part.device}")


def _said(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
