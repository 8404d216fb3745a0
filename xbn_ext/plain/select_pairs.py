"""`SelectPairs` over a batch or a memory: the similarities of the loss inside, with other pairs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..dtypes import compute_dtype
from ..losses import CustomLoss, PairLoss, SelectPairs
from ..losses.learned import at, by_temperature
from . import custom
from .custom import Result
from .loss import loss_of
from .loss_of_batch import Rows
from .loss_of_memory import BankSimilarities
from .pairs import Chunk, Similarities


class Selected:
    """The similarities `of`, with other pairs: those that the loss selects by the labels of anchors `labels [B]` and of
    rows `of_rows [n]`."""

    temperature: Tensor | None = None  # what the similarities are divided by

    def __init__(self, of: Similarities, labels: Tensor, of_rows: Tensor, loss: SelectPairs) -> None:
        self.of, self.labels, self.of_rows, self.loss = of, labels, of_rows, loss
        self.anchors, self.grad = of.anchors, of.grad
        self.limit: Tensor | None = None  # [B, 1], negatives above it are no pairs
        if loss.false_negative_margin is not None:
            nearest = of.grad.new_full((len(labels),), -torch.inf)
            for chunk in self.related():
                if chunk.s.shape[1] > 0:
                    nearest = torch.maximum(nearest, chunk.s.masked_fill(~chunk.positive, -torch.inf).amax(1))
            nearest = torch.where(nearest == -torch.inf, torch.inf, nearest)
            self.limit = (nearest + loss.false_negative_margin)[:, None]

    def related(self) -> Iterator[Chunk]:
        """By the relation."""
        for chunk in self.of.chunks():
            of_rows = self.of_rows[chunk.start : chunk.start + chunk.s.shape[1]]
            positive, negative, weight = self.loss.related(self.labels, of_rows)
            pair = chunk.positive | chunk.negative
            yield chunk._replace(positive=pair & positive, negative=pair & negative, weight=weight)

    def chunks(self) -> Iterator[Chunk]:
        for chunk in self.related():
            if self.limit is not None:
                chunk = chunk._replace(negative=chunk.negative & ~(chunk.s > self.limit))
            if self.temperature is not None:
                chunk = chunk._replace(s=chunk.s / self.temperature)
            yield chunk

    def positives(self) -> Tensor:
        number = torch.zeros_like(self.labels)
        for chunk in self.related():
            number += chunk.positive.sum(1)
        return number

    def add(self, chunk: Chunk, weight: Tensor) -> None:
        self.of.add(chunk, weight if self.temperature is None else weight / self.temperature)

    def add_columns(self, column: Tensor, weight: Tensor) -> None:
        self.of.add_columns(column, weight if self.temperature is None else weight / self.temperature)

    def scale(self, factor: Tensor) -> None:
        self.of.scale(factor)

    def gradient(self) -> Tensor:
        return self.of.gradient()


def over_bank(loss: SelectPairs, similarities: BankSimilarities, need_grad: bool) -> Result:
    """The loss against a memory."""
    labels = similarities.labels[:, 0]
    selected = Selected(similarities, labels, similarities.bank_labels, loss)
    return _loss_of(loss, selected, similarities.z, need_grad)


def over_batch(loss: SelectPairs, batch: Rows, need_grad: bool) -> Result:
    """The loss of a batch against itself."""
    similarities = batch.similarities()
    selected = Selected(similarities, batch.labels, batch.labels, loss)
    s = torch.where(similarities.finite, similarities.similarity(), torch.nan)
    result = _loss_of(loss, selected, s, need_grad)
    return result._replace(grad=batch.by_rows(result.grad))


def try_out(loss: SelectPairs, z: Tensor, labels: Tensor) -> None:
    """Raises what the loss inside raises of embeddings like z, or the relation of labels `[B]`."""
    loss.check()
    loss._check_loss(z.device)
    if isinstance(loss.loss, CustomLoss):
        custom.try_out(loss.loss, z, labels)
    with torch.no_grad():
        loss.try_relation(labels)


def _loss_of(loss: SelectPairs, selected: Selected, by: Tensor, need_grad: bool) -> Result:
    """`by` is what the similarities collect the gradient by, in which they are linear."""
    with torch.enable_grad():  # a parametrization computes what learns
        inside = loss.loss
    if isinstance(inside, CustomLoss):
        return custom.loss_of(inside, selected, by.dtype, need_grad)
    assert isinstance(inside, PairLoss)
    folded, temperature = inside, getattr(inside, "temperature", None)
    if isinstance(temperature, Tensor):
        folded, selected.temperature = at(inside, temperature=1.0), temperature.detach().reshape(()).to(by.dtype)
    value, grad, pairs = loss_of(selected, folded.with_parameters(folded.parameters), need_grad)
    if not need_grad:
        return Result(value, None, [], pairs)
    slopes = []  # in the order of `learned_of`
    for name in inside.may_be_learned:
        learned = getattr(inside, name)
        if not isinstance(learned, Tensor) or not learned.requires_grad:
            continue
        if name == inside.offset:
            slope = inside.slope(*pairs.unbind())
        else:
            of_pairs = torch.where(selected.grad == 0, 0, by)  # of what is no pair it may be no number
            slope = by_temperature(learned, selected.grad, of_pairs, value)
        slopes.append(slope.to(compute_dtype(learned.dtype)).reshape(learned.shape))
    return Result(value, grad, slopes, pairs)
