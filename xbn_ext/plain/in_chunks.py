"""`InChunks` over a batch or a memory: the loss is called for some of the anchors at a time, autograd differentiates
each call, and the parts are added up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..dtypes import compute_dtype
from ..losses import InChunks, few_pairs
from ..losses.reducers import OverElements, Recorder, SubLoss, inside
from .chunks import is_finite
from .custom import Result, check_learned
from .loss_of_batch import Rows, other_samples
from .loss_of_memory import BankSimilarities

MEAN = "mean over anchors"
"""The only sub-loss of a loss without a reducer that returns a scalar."""


class _Chunk(NamedTuple):
    """Some anchors of a batch, and what they are ranked against; or one that may meet no row."""

    anchors: Tensor  # [b] int64, their numbers
    rows: Tensor | None  # [n, D]; None: rows of the batch
    labels: Tensor  # [n], of the rows
    of_batch: Tensor | None = None  # [n] int64, which these are; None: all, and all are anchors
    eps: float | None = None  # of the norms by which rows of the batch are divided; None: they are not

    def references(self, z: Tensor) -> tuple[Tensor, ...]:
        """What the anchors are ranked against, in a batch `z [B, D]`, and the labels; nothing: against each other."""
        rows = self.rows if self.of_batch is None else z[self.of_batch]
        if rows is None:
            return ()
        if self.eps is not None:
            rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp(min=self.eps)
        return rows, self.labels


class _Total:
    """What the sub-losses of chunks add up to, with their gradients `by` some tensors."""

    def __init__(self, by: list[Tensor]) -> None:
        self.by = by
        self.sums: dict[str, list[Tensor]] = {}  # of a sub-loss: value, gradients
        self.numbers: dict[str, Tensor | float | None] = {}  # what they are divided by

    def add(self, parts: dict[str, SubLoss], share: float) -> None:
        """What anchors pay who count as a `share` of themselves."""
        for i, (name, part) in enumerate(parts.items()):
            more = i + 1 < len(parts)  # that come of the same graph
            sums = [part.sum.detach().double() * share]
            sums += [grad * share for grad in _gradients(part, self.by, more)]
            before = self.sums.get(name)
            self.sums[name] = sums if before is None else [a + b for a, b in zip(before, sums, strict=True)]
            number = part.number
            if isinstance(number, Tensor):
                number = number.double()  # a whole number times a float would be of the default dtype
            self.numbers[name] = None if number is None else number * share + (self.numbers.get(name) or 0.0)

    def add_free(self, anchors: int) -> None:
        """Anchors that pay nothing, and count where the loss is the mean over anchors."""
        if MEAN in self.sums:
            self.numbers[MEAN] = (self.numbers[MEAN] or 0.0) + anchors

    def keep_only(self, names: tuple[str, ...]) -> None:
        """Of the sub-losses."""
        self.sums = {name: sums for name, sums in self.sums.items() if name in names}

    def averages(self, like: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The loss (float64), and its gradients."""
        whole = [
            like.new_zeros((), dtype=torch.float64),
            *(torch.zeros_like(t, dtype=compute_dtype(t.dtype)) for t in self.by),
        ]
        for name, sums in self.sums.items():
            number = self.numbers[name]
            divisor = torch.as_tensor(1.0 if number is None else number, dtype=torch.float64, device=like.device)
            share = torch.where(divisor == 0, 0.0, 1 / divisor)  # of nothing that counts the mean is 0
            whole = [a + (b * share).to(a.dtype) for a, b in zip(whole, sums, strict=True)]
        return whole[0], whole[1:]


def _gradients(part: SubLoss, by: list[Tensor], retain_graph: bool) -> list[Tensor]:
    """Of the sum, float32 or wider. One that is float16 on its way is of the mean, since that of a sum overflows."""
    wide = [compute_dtype(t.dtype) for t in by]
    if not by or not part.sum.requires_grad:
        return [torch.zeros_like(t, dtype=dtype) for t, dtype in zip(by, wide, strict=True)]
    narrow = part.number is not None and any(t.dtype == torch.float16 for t in by)
    size = max(float(part.number or 0), 1.0) if narrow else 1.0
    whole = torch.full_like(part.sum, 1 / size)
    found = torch.autograd.grad(
        part.sum, by, whole, retain_graph=retain_graph, allow_unused=True, materialize_grads=True
    )
    return [grad.to(dtype) * size for grad, dtype in zip(found, wide, strict=True)]


def over_bank(loss: InChunks, similarities: BankSimilarities, need_grad: bool) -> Result:
    """The host reads the count of the rows, and which anchors must not be ranked against which."""
    z, finite = similarities.z, similarities.finite[:, 0]
    ranking = torch.ones_like(finite) if similarities.anchors is None else similarities.anchors
    result = _loss_of(
        loss, z, similarities.labels[:, 0], _against_rows(loss, similarities, ranking & finite), need_grad
    )
    value = torch.where((ranking & ~finite).any() & (similarities.n > 0), torch.nan, result.value)
    grad = None if result.grad is None else torch.where(finite[:, None], result.grad, torch.nan)
    return result._replace(value=value, grad=grad)


def over_batch(loss: InChunks, batch: Rows, need_grad: bool) -> Result:
    """All anchors in one call where each is ranked against all other rows as they are; else one by one."""
    z, labels, ids, anchors = batch.z, batch.labels, batch.ids, batch.anchors
    B = len(z)
    numbers = torch.arange(B, device=z.device)
    pair = other_samples(labels, ids)
    eps = batch.eps if batch.renormalize and not _of_length_1(z) else None
    whole = eps is None and (anchors is None or bool(anchors.all())) and int(pair.sum()) == B * (B - 1)

    def chunks() -> Iterator[_Chunk]:
        if whole and B > 0:
            yield _Chunk(numbers, None, labels)
        for i in [] if whole else (numbers if anchors is None else numbers[anchors]).tolist():
            others = pair[i].nonzero()[:, 0]
            yield _Chunk(numbers[i : i + 1], None, labels[others], others, eps)

    if bool(is_finite(z).all()):
        return _loss_of(loss, z, labels, chunks(), need_grad)
    nothing = _loss_of(loss, z[:0], labels[:0], iter(()), need_grad)
    nan = torch.full_like(z, torch.nan)
    return nothing._replace(value=nan.sum(), grad=nan if need_grad else None)


def _of_length_1(z: Tensor) -> bool:
    """All rows, as they are rounded, or 0: to divide them by their norms changes nothing then."""
    eps = torch.finfo(z.dtype).eps
    norm = torch.linalg.vector_norm(z.double(), dim=1)
    return bool((((norm - 1).abs() <= min(64 * eps, max(eps, 1e-5))) | (norm == 0)).all())


def try_out(loss: InChunks, z: Tensor, labels: Tensor) -> None:
    """Raises what the loss or its miner raises of embeddings of the dtype, device and width of z; TypeError if they
    write the references, which are the memory, and the next chunk's; and ValueError if the number that a sum is divided
    by is negative. What they keep in buffers stays as it is."""
    loss.check()
    rows = torch.linspace(-1, 1, 6 * z.shape[1], dtype=z.dtype, device=z.device).view(6, -1).cos()
    labels = torch.arange(6, device=z.device) % 2  # so that there are pairs of both kinds
    buffers = [(b, b._version, b.clone()) for b in loss.buffers() if not b.is_inference()]
    given = [] if rows.is_inference() else [(t, t._version) for t in (rows, labels)]
    its = rows[:4].clone(), labels[:4].clone()
    parts = _called(loss, *its, _picked(loss, *its, rows, labels), rows, labels)
    with torch.no_grad():
        for buffer, version, value in buffers:
            if buffer._version != version:
                buffer.copy_(value)
    if any(t._version != version for t, version in given):
        raise TypeError("loss: it, or its miner, writes ref_emb or ref_labels in place: let it copy them")
    for part in parts.values():
        check_learned(loss, part.sum, "it")
        if part.number is not None and part.number < 0:
            raise ValueError(f"loss: the number that its sum is divided by must not be negative, got {part.number:g}")


def _against_rows(loss: InChunks, similarities: BankSimilarities, ranking: Tensor) -> Iterator[_Chunk]:
    all_rows, labels = _rows_of(similarities)
    if len(labels) == 0:
        return
    apart = torch.zeros_like(ranking)
    for start, stop in similarities.spans():
        if similarities.exclude is not None:
            apart |= similarities.excluded(start, stop).any(1)
    together = (ranking & ~apart).nonzero()[:, 0]
    for anchors in together.split(loss.anchors) if len(together) > 0 else ():
        yield _Chunk(anchors, all_rows, labels)
    for i in (ranking & apart).nonzero()[:, 0].tolist():
        may_not = [similarities.excluded(start, stop, slice(i, i + 1))[0] for start, stop in similarities.spans()]
        others = (~torch.cat(may_not)[: len(labels)]).nonzero()[:, 0]
        yield _Chunk(torch.tensor([i], device=ranking.device), all_rows[others], labels[others])


def _rows_of(similarities: BankSimilarities) -> tuple[Tensor, Tensor]:
    """What the rows of the bank stand for `[n, D]`, divided by their norms if they are to be, and their labels."""
    n = similarities.n if similarities.count is None else int(similarities.count)
    bank, labels = similarities.bank[:n], similarities.bank_labels[:n]
    if similarities.scale_of_rows is None and not similarities.renormalize and bank.dtype == similarities.z.dtype:
        return bank, labels
    all_rows = similarities.z.new_empty(bank.shape)
    for u, out in zip(bank.split(similarities.step), all_rows.split(similarities.step), strict=True):
        rows, norm = similarities.rows(u)
        torch.div(rows, 1 if norm is None else norm[:, None], out=out)
    return all_rows, labels


def _loss_of(loss: InChunks, z: Tensor, labels: Tensor, chunks: Iterator[_Chunk], need_grad: bool) -> Result:
    leaf = z.detach().requires_grad_(need_grad)
    parameters = loss.learning()
    total = _Total([leaf, *parameters] if need_grad else [])
    counts, alone = few_pairs.Counts(), 0
    for chunk in chunks:
        if len(chunk.labels) == 0:  # a reducer averages over what the loss lists, which is not called for it
            alone += len(chunk.anchors)
            continue
        with torch.set_grad_enabled(need_grad):
            parts, share = _paid(loss, leaf, labels, chunk, counts)
        total.add(parts, share)
    total.add_free(alone)
    if counts.cost_nothing(loss.loss):
        total.keep_only(few_pairs.REGULARIZERS)
    value, grads = total.averages(z)
    unknown = z.new_full((2,), torch.nan, dtype=torch.float64)
    if not need_grad:
        return Result(value.to(z.dtype), None, [], unknown)
    return Result(value.to(z.dtype), grads[0], grads[1:], unknown)


def _paid(
    loss: InChunks, z: Tensor, labels: Tensor, chunk: _Chunk, counts: few_pairs.Counts
) -> tuple[dict[str, SubLoss], float]:
    """What the anchors of a chunk pay, and the share of themselves that they count as."""
    references = chunk.references(z)
    by_pairs = bool(references) and few_pairs.decide(loss.loss)
    # Alone, an anchor would cost nothing by an NCALoss, which asks for two: it comes twice, and counts half.
    twice = len(chunk.anchors) == 1 and bool(references) and not by_pairs
    numbers = chunk.anchors.repeat(2) if twice else chunk.anchors
    picked = _picked(loss, z[numbers], labels[numbers], *references)
    first = None
    if by_pairs and counts.are_few(picked, labels[numbers], chunk.labels):
        first = len(numbers)
        picked = few_pairs.pairs_of(picked, labels[numbers], chunk.labels).with_others(first)
        numbers = numbers.repeat(few_pairs.COPIES)
    return _called(loss, z[numbers], labels[numbers], picked, *references, first=first), 0.5 if twice else 1.0


def _picked(loss: InChunks, embeddings: Tensor, labels: Tensor, *references: Tensor) -> Any:
    """What the miner picks; None: all pairs."""
    if loss.miner is None:
        return None
    return loss.miner(embeddings.detach(), labels, *(t.detach() for t in references))


def _called(
    loss: InChunks, embeddings: Tensor, labels: Tensor, picked: Any, *references: Tensor, first: int | None = None
) -> dict[str, SubLoss]:
    """What the anchors pay, or only the `first` of them, where the others are copies."""
    with _recorded(loss.loss, first) as recorder:
        value = loss.loss(embeddings, labels, picked, *references)
    if recorder is not None:
        return recorder.result(value)
    whole, number = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    if not _is_scalar(whole) or not (number is None or _is_scalar(number) or isinstance(number, Real)):
        got = " and ".join(map(_kind, value)) if isinstance(value, tuple) else _kind(value)
        raise TypeError(f"loss: without a reducer it must return a scalar, or a sum and a number, got {got}")
    if isinstance(number, Tensor) and number.requires_grad:
        raise TypeError("loss: the number that its sum is divided by must not require a gradient: detach() it")
    if whole is not value:
        return {"loss": SubLoss(whole.sum(), number.sum() if isinstance(number, Tensor) else number)}
    return {MEAN: SubLoss(value.sum() * len(embeddings), len(embeddings))}


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1


def _kind(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


@contextmanager
def _recorded(loss: Any, first: int | None = None) -> Iterator[Recorder | None]:
    reducer: nn.Module | None = getattr(loss, "reducer", None)
    recorder = None if reducer is None else Recorder(reducer, first)
    with ExitStack() as stack:
        for module, other in inside(loss):
            _replace(stack, module, other, OverElements(other, type(module).__name__))
        if recorder is not None:
            _replace(stack, loss, reducer, recorder)
        yield recorder


def _replace(stack: ExitStack, module: Any, reducer: Any, other: nn.Module) -> None:
    """Its reducer, until the stack is left."""
    stack.callback(setattr, module, "reducer", reducer)
    module.reducer = other
