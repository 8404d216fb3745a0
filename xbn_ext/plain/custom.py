"""A loss of the user's own, a chunk of the memory at a time. One pass reduces the terms of all pairs to two numbers for
each anchor; autograd has the derivative of the loss by these; a second pass multiplies it by those of the terms. Where
the loss is a sum over pairs, one pass does both. Where the terms of one side depend on the number of the other, each
side has passes of its own: forwards it comes second, and backwards first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._autograd import without_autocast
from ..dtypes import compute_dtype
from ..losses.custom import CustomLoss, OwnLoss, Reduction
from . import chunks
from .loss_of_batch import Rows
from .loss_of_memory import BankSimilarities
from .pairs import Chunk, Similarities


class Result(NamedTuple):
    """Of a loss over all chunks."""

    value: Tensor  # []
    grad: Tensor | None  # by the rows or, of `loss_of`, what the similarities have as the gradient; None: not asked for
    of_parameters: list[Tensor]  # derivatives by those of the loss that learn, float32 or wider
    pairs: Tensor  # [2] float64, active positives and negatives of an anchor


class _Part(NamedTuple):
    """The pairs of one side in a chunk."""

    s: Tensor  # [B, n], 0 where there is no pair, since a term or its derivative could be infinite there
    which: Tensor  # [B, n] bool, the pairs
    others: Tensor  # [B, n] bool, what is not a pair of this side
    weight: Tensor | None  # [B, n], of the terms
    columns: Tensor | None  # of the chunk; None: all
    rest: Tensor | None = None  # the columns in which something is no pair, if these are few

    def filled(self, t: Tensor, fill: float) -> Tensor:
        """`[B, n]` t with this number where there is no pair."""
        if self.rest is None:
            return torch.where(self.others, fill, t)
        t = t.clone(memory_format=torch.contiguous_format)  # a copy and a few columns take half of the time of a choice
        return t.index_copy_(1, self.rest, torch.where(self.others[:, self.rest], fill, t[:, self.rest]))


class _Side:
    """The positives of all anchors, or the negatives: their terms, reduced to `value [B]` (float64)."""

    given: tuple[Tensor, ...] = ()  # [B, 1] the number of the side that is reduced first, if this is the other

    def __init__(self, term: Callable[..., Tensor], reduction: Reduction, like: Tensor, *, positive: bool) -> None:
        self.term, self.reduction, self.positive = term, reduction, positive
        self.name = "positive" if positive else "negative"
        self.number, self.active = torch.zeros_like(like), torch.zeros_like(like)
        starts_at = -torch.inf if reduction in ("logsumexp", "max") else 0.0
        self.value = torch.full_like(like, starts_at)
        self.taken = torch.zeros_like(like, dtype=torch.bool)  # anchors whose largest term has been found again

    def part(self, chunk: Chunk, alone: bool = False) -> _Part:
        """Its pairs. Positives are few: where the host may look, only the columns that have some. `alone`: terms and
        their derivatives by s are all that is asked for, and those of no pair are left out."""
        s, which, weight = chunk.s, chunk.positive if self.positive else chunk.negative, chunk.weight
        columns = rest = None
        looks = chunks.reads(s.device) and which.numel() > 0
        if self.positive and looks:
            columns = _columns(which)
            s, which, weight = s[:, columns], which[:, columns], None if weight is None else weight[:, columns]
        others = ~which
        if not self.positive and looks:
            found = _columns(others)
            rest = found if 8 * len(found) < s.shape[1] else None
        part = _Part(s.detach(), which, others, None, columns, rest)
        if weight is not None:
            part = part._replace(weight=part.filled(weight.to(s.dtype), 1.0))
        return part if alone else part._replace(s=part.filled(s, 0.0))

    def terms(self, s: Tensor) -> Tensor:
        """As the loss has them, without weights of pairs."""
        terms = self.term(s, *self.given)
        if not isinstance(terms, Tensor) or terms.shape != s.shape or terms.dtype != s.dtype:
            got = f"{terms.dtype} {list(terms.shape)}" if isinstance(terms, Tensor) else type(terms).__name__
            raise TypeError(f"loss: {self.name}(s) must return {s.dtype} {list(s.shape)}, got {got}")
        return terms

    def weighted(self, terms: Tensor, part: _Part) -> Tensor:
        if part.weight is None:
            return terms
        return terms + part.weight.log() if self.reduction == "logsumexp" else terms * part.weight

    def look(self, terms: Tensor, part: _Part) -> None:
        if terms.shape[1] == 0:  # of nothing there is no largest
            return
        active = terms.bool() & part.which
        self.number += _count(part.which)
        self.active += _count(active if part.weight is None else active & part.weight.bool())
        terms = self.weighted(terms, part)
        if self.reduction in ("sum", "mean"):
            self.value = self.value + part.filled(terms, 0.0).sum(1).double()
            return
        of_pairs = part.filled(terms, -torch.inf)
        if self.reduction == "max":
            self.value = torch.maximum(self.value, of_pairs.amax(1).double())
        else:
            self.value = torch.logaddexp(self.value, of_pairs.logsumexp(1).double())

    def reduced(self) -> Tensor:
        return self.value / self.number.clamp(min=1) if self.reduction == "mean" else self.value

    def weights(self, terms: Tensor, part: _Part, of_reduced: Tensor) -> Tensor:
        """dLoss/dterm `[B, n]`, by that of the reduced number, `of_reduced [B]`. Of equal largest terms the first has
        all of it."""
        value, of_reduced = self.value.to(terms.dtype)[:, None], of_reduced[:, None]
        if self.reduction == "max":
            largest = part.which & ((terms == value) | terms.isnan())
            first = largest & (largest.cumsum(1) == 1) & ~self.taken[:, None]
            self.taken = self.taken | first.any(1)
            return torch.where(first, of_reduced, 0.0)
        if self.reduction == "logsumexp":
            return part.filled(of_reduced * (terms - value).exp(), 0.0)
        if self.reduction == "mean":
            of_reduced = of_reduced / self.number.clamp(min=1).to(terms.dtype)[:, None]
        return torch.where(part.which, of_reduced, 0.0)


class _Gradient:
    """By the similarities and by the parameters of the loss, chunk by chunk."""

    def __init__(self, loss: CustomLoss, similarities: Similarities) -> None:
        self.loss, self.parameters = loss, loss.learning()
        self.of_parameters = [torch.zeros_like(p, dtype=compute_dtype(p.dtype)) for p in self.parameters]
        self.of_given: Tensor | float = 0.0  # [B] by the number of the side that was reduced first
        self.similarities = similarities

    def add(self, chunk: Chunk, sides: Sequence[_Side], of_reduced: Sequence[Tensor], looks: bool = False) -> None:
        """Of some sides, by the derivatives by their numbers. `looks`: the terms have not been reduced yet, and are."""
        weight = None
        for side, its in zip(sides, of_reduced, strict=True):
            alone = not side.given and not self.parameters
            part = side.part(chunk, alone)
            with torch.enable_grad():
                s = part.s.requires_grad_()
                of_pairs = side.terms(s)
                terms = side.weighted(of_pairs, part)
            if chunk.start == 0:  # the others depend on the same
                check_learned(self.loss, terms, side.name, s, *side.given)
            if looks:
                side.look(of_pairs.detach(), part)
            by = [s, *side.given, *self.parameters]
            if side.reduction == "sum" and alone:  # what is no pair is left out below
                weights = its[:, None].expand_as(terms)
            else:
                weights = side.weights(terms.detach(), part, its)
            by_s, *by_others = _derivatives(terms, by, weights)
            by_s = part.filled(by_s, 0.0)
            if part.columns is not None:
                weight = torch.zeros_like(chunk.s) if weight is None else weight
                weight.index_add_(1, part.columns, by_s)
            else:
                weight = by_s if weight is None else weight.add_(by_s)
            for of_anchors in by_others[: len(side.given)]:
                self.of_given = self.of_given + of_anchors[:, 0]
            by_parameters = by_others[len(side.given) :]
            self.of_parameters = [a + b for a, b in zip(self.of_parameters, by_parameters, strict=True)]
        assert weight is not None
        self.similarities.add(chunk, weight)


def over_bank(loss: CustomLoss, similarities: BankSimilarities, need_grad: bool) -> Result:
    """The loss against a memory."""
    return loss_of(loss, similarities, similarities.z.dtype, need_grad)


def over_batch(loss: CustomLoss, batch: Rows, need_grad: bool) -> Result:
    """The loss of a batch against itself."""
    result = loss_of(loss, batch.similarities(), batch.z.dtype, need_grad)
    return result._replace(grad=batch.by_rows(result.grad))


def loss_of(loss: CustomLoss, similarities: Similarities, dtype: torch.dtype, need_grad: bool) -> Result:
    """`similarities` are of `dtype`, as what `loss` is given is. Without `need_grad` nothing is looked at twice."""
    loss.check()
    like = similarities.grad.new_zeros(len(similarities.grad), dtype=torch.float64)
    sides, anchors = _sides(loss, like), similarities.anchors
    rounds = _rounds(loss, sides)
    gradient = _Gradient(loss, similarities)
    in_one = need_grad and _is_a_sum_over_pairs(loss) and all(p.dtype != torch.float16 for p in gradient.parameters)
    ones = torch.ones_like(like, dtype=dtype)
    with torch.no_grad():
        for some in rounds:
            for chunk in similarities.chunks():
                if in_one:
                    gradient.add(chunk, some, [ones] * len(some), looks=True)
                else:
                    for side in some:
                        part = side.part(chunk)
                        side.look(side.terms(part.s), part)
            if some != rounds[-1]:
                _give(loss, some[0], rounds[-1][0], dtype, need_grad)
    pairs = torch.stack([side.active.sum() for side in sides]) / _ranking(anchors, like).clamp(min=1)
    with torch.set_grad_enabled(need_grad and not in_one):
        reduced = [side.reduced().to(dtype).requires_grad_(need_grad and not in_one) for side in sides]
        costs, number = _costs(loss, sides, reduced, anchors)
        value = costs / number
    if not need_grad:
        return Result(value, None, [], pairs)
    if in_one:
        similarities.scale(1 / number)
        return Result(
            value, similarities.gradient(), [its / number.to(its.dtype) for its in gradient.of_parameters], pairs
        )
    of_reduced = _derivatives(value, [*reduced, *gradient.parameters])
    of = dict(zip(sides, of_reduced[:2], strict=True))
    gradient.of_parameters = [its.to(compute_dtype(its.dtype)) for its in of_reduced[2:]]
    with torch.no_grad():
        for some in rounds[::-1]:
            of_some = [of[side] + gradient.of_given for side in some]
            for chunk in similarities.chunks():
                gradient.add(chunk, some, of_some)
    return Result(value.detach(), similarities.gradient(), gradient.of_parameters, pairs)


def try_out(loss: CustomLoss, z: Tensor, labels: Tensor) -> None:
    """Raises what the loss raises of similarities of the dtype and device of z, which require a gradient where grad is
    enabled, or of what it returns for them."""
    loss.check()
    with without_autocast(z.device.type):
        s = z.new_full((2, 3), 0.5, requires_grad=torch.is_grad_enabled())
        every = torch.ones_like(s, dtype=torch.bool)
        sides = _sides(loss, s.new_zeros(2, dtype=torch.float64))
        rounds = _rounds(loss, sides)
        for some in rounds:
            for side in some[::-1]:
                terms = side.terms(s)
                check_learned(loss, terms, side.name, s, *side.given)
                side.look(terms.detach(), _Part(s, every, ~every, None, None))
            if some != rounds[-1]:
                _give(loss, some[0], rounds[-1][0], s.dtype, s.requires_grad)
        costs, _ = _costs(loss, sides, [side.reduced().to(s.dtype) for side in sides], None)
        check_learned(loss, costs, "anchor")


def _is_a_sum_over_pairs(loss: CustomLoss) -> bool:
    """Then the weight of a pair is known without the others, up to what all are divided by. Until that is known, a
    derivative by a parameter may be too large for float16."""
    plain = getattr(loss.anchor, "__func__", None) is CustomLoss.anchor and not loss.needs_both
    return plain and loss.first is None and loss.reductions == ("sum", "sum")


def _sides(loss: CustomLoss, like: Tensor) -> tuple[_Side, _Side]:
    of_positives, of_negatives = loss.reductions
    return (
        _Side(loss.positive, of_positives, like, positive=True),
        _Side(loss.negative, of_negatives, like, positive=False),
    )


def _rounds(loss: CustomLoss, sides: tuple[_Side, _Side]) -> list[tuple[_Side, ...]]:
    """Which sides are reduced together."""
    positives, negatives = sides
    if loss.first is None:
        return [(negatives, positives)]
    return [(positives,), (negatives,)] if loss.first == "positives" else [(negatives,), (positives,)]


def _give(loss: CustomLoss, side: _Side, other: _Side, dtype: torch.dtype, need_grad: bool) -> None:
    """Gives the other side the number of this one. An anchor that pays nothing since it has no such pairs is given 0:
    times a term's derivative by an infinite number, its weight of 0 might not be 0."""
    value = torch.where(side.number > 0, side.reduced(), 0.0) if loss.needs_both else side.reduced()
    other.given = (value.to(dtype)[:, None].detach().requires_grad_(need_grad),)


def _ranking(anchors: Tensor | None, like: Tensor) -> Tensor:
    return torch.full_like(like[:1].sum(), len(like)) if anchors is None else anchors.sum().double()


def _costs(
    loss: CustomLoss, sides: tuple[_Side, _Side], reduced: list[Tensor], anchors: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What all anchors pay, and what it is divided by."""
    has_positives, has_negatives = (side.number > 0 for side in sides)
    pays = has_positives & has_negatives if loss.needs_both else has_positives | has_negatives
    costs = loss.anchor(*(torch.where(pays, number, 0.0) for number in reduced))
    if not isinstance(costs, Tensor) or costs.shape != pays.shape or not costs.is_floating_point():
        got = f"{costs.dtype} {list(costs.shape)}" if isinstance(costs, Tensor) else type(costs).__name__
        wanted = f"floating-point numbers {list(pays.shape)}"
        raise TypeError(f"loss: anchor(positives, negatives) must return {wanted}, got {got}")
    if loss.average == "anchors":
        number = pays.sum() if loss.needs_both else _ranking(anchors, sides[0].number)
    else:
        of_anchors = [side.number if loss.average == "pairs" else side.active for side in sides]
        number = torch.where(pays, of_anchors[0] + of_anchors[1], 0.0).sum()
    return torch.where(pays, costs, 0.0).sum(), number.clamp(min=1).to(costs.dtype)


def check_learned(loss: OwnLoss, of: Tensor, function: str, *given: Tensor) -> None:
    """Raises TypeError if `of`, which a function of the loss returns, depends on something that would get no gradient:
    what is neither given to it nor a parameter of the loss."""
    known = (*given, *loss.parameters())
    has_gradient = {id(t) for t in known}
    nodes, seen = [of.grad_fn], {t.grad_fn for t in known}  # of a parameter that is made of others, it has its own
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        leaf = getattr(node, "variable", None)  # of what autograd ends at
        if leaf is not None and id(leaf) not in has_gradient:
            raise TypeError(
                f"loss: {function} depends on a tensor {list(leaf.shape)} that requires a gradient and would get none: "
                "make it a parameter of the loss, or detach it"
            )


def _columns(which: Tensor) -> Tensor:
    """Those of `which [B, n]` in which something is True: as any(0), in a tenth of its time."""
    return which.view(torch.uint8).amax(0).nonzero()[:, 0]


def _count(which: Tensor) -> Tensor:
    """`[B]` how many of `which [B, n]` are True: as sum(1), in half of its time."""
    return which.view(torch.uint8).sum(1, dtype=torch.int32)


def _derivatives(of: Tensor, by: list[Tensor], weights: Tensor | None = None) -> list[Tensor]:
    if not of.requires_grad:
        return [torch.zeros_like(t) for t in by]
    return list(torch.autograd.grad(of, by, weights, allow_unused=True, materialize_grads=True))
