"""`Ranks`: the processes that share a memory. Each has a part of a batch, and a copy of the memory or a block of one.
All of them move it and store the whole batch: copies stay the same, to the bit."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from . import collectives
from .dtypes import compute_dtype
from .shards import Shards

# What embeddings are sent as; those of any other dtype as the first.
SENT_AS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DIFFERENT = "the ranks of a CrossBatchMemory are at different calls"


class Batch(NamedTuple):
    """What a step is given, checked."""

    embeddings: Tensor  # [B, D] floating point
    labels: Tensor  # [B] int64
    mask: Tensor | None = None  # [B] bool
    ids: Tensor | None = None  # [B] int64
    sizes: tuple[int, ...] = ()  # of the parts that ranks have of it
    learns: bool = True  # whether a rank may ask for a gradient


class Told(NamedTuple):
    """What the hosts tell each other before a step."""

    rows: int  # -1: there are no more
    dtype: int = 0  # of SENT_AS
    masked: int = 0  # whether there is a mask
    identified: int = 0  # whether there are ids
    learns: int = 0  # whether a gradient is asked for
    failed: int = 0  # whether the rank has raised, and takes no step
    options: int = 0  # a hash
    step: int = -1  # steps that its memory has taken; -1: the host would have to wait for that

    @classmethod
    def of(cls, batch: Batch) -> Told:
        """What is to be told of a batch."""
        x, labels, mask, ids, _, learns = batch
        dtype = SENT_AS.index(x.dtype) if x.dtype in SENT_AS else 0
        return cls(len(labels), dtype, mask is not None, ids is not None, learns)


class Ranks:
    """The processes of a group, as one of them sees them.

    The hosts tell each other how many rows they have, and what else must be right, before anything is sent. With a
    `batch_size` all have as many rows, always: a compiler knows the shapes. Then, of a GPU and in compiled steps, the
    hosts tell each other nothing, and none waits.

    Args:
        process_group: a ProcessGroup, or a DeviceMesh of one or two dimensions.
        shards: how many ranks hold the memory between them, if the mesh does not say so.
        batch_size: rows of each rank's batch.
        options: what must be the same on every rank.

    Raises:
        TypeError, ValueError: naming the argument, or the option, which all ranks raise.
    """

    def __init__(self, process_group: Any, shards: int, batch_size: int | None, options: Mapping[str, Any]) -> None:
        self.group = collectives.group_of(process_group)
        self.size, self.rank = self.group.size(), self.group.rank()
        self.batch_size = batch_size
        self._name = self.group.group_name
        self._host = collectives.host_group(self.group)
        self._agree({**options, "batch_size": batch_size, "shards": shards})
        if self.size % shards != 0:
            raise ValueError(f"shards must divide the {self.size} ranks of the process_group, got {shards}")
        self.shards = Shards(*(collectives.line_of(self.group, shards) if shards > 1 else (None, self.rank)))

    def __deepcopy__(self, memo: Any) -> Ranks:
        return self  # a group belongs to the process

    def __reduce__(self) -> NoReturn:
        raise TypeError("a CrossBatchMemory with a process_group cannot be pickled: save its state_dict()")

    def gather(
        self, check: Callable[[], Batch], step: Tensor, training: bool, options: Callable[[], Mapping[str, Any]]
    ) -> Batch:
        """The batch of all ranks, that of rank 0 first, in the dtype that a step computes in. The gradient of a rank's
        embeddings is W times its part of it: averaged over the W ranks, as DistributedDataParallel does, the gradients
        of a network's parameters are those of one process with the whole batch.

        Args:
            check: returns this rank's batch, or raises.
            step: `[]` int64, steps that this rank's memory has taken.
            training: whether it takes one now.
            options: what must be the same on every rank.

        Raises:
            ValueError: naming what differs between ranks.
            RuntimeError: another rank has raised, or its memory has taken another number of steps.
        """
        if self.batch_size is None and torch.compiler.is_compiling():
            raise RuntimeError("batch_size must be given to compile a CrossBatchMemory that has a process_group")
        if self.batch_size is not None and not reads_at_once(step):
            return self._gather_untold(self._of_batch_size(check()), step, training, options)
        of_call = {"call": "forward", "training": training, **options()}
        batch, told = self._tell(lambda: self._of_batch_size(check()), of_call, step)
        if self.batch_size is not None:
            self._check_alike(told)
        return self._exchange(batch, told, step)

    def _of_batch_size(self, batch: Batch) -> Batch:
        rows = len(batch.labels)
        if self.batch_size not in (None, rows):
            raise ValueError(
                f"embeddings must have batch_size={self.batch_size} rows on every rank, got {rows}: make the memory "
                "without batch_size if their number differs"
            )
        return batch

    def _check_alike(self, told: Sequence[Told]) -> None:
        """Raises where ranks that tell each other nothing would have to be alike: a program of one kind of device runs
        on all."""
        _same("ids", {rank: "ids" if of_rank.identified else None for rank, of_rank in enumerate(told)})
        if self.shards.size > 1:  # a gradient is of all blocks
            its = "whether a gradient is needed"
            _same(its, {rank: bool(of_rank.learns) for rank, of_rank in enumerate(told)})

    def _gather_untold(
        self, batch: Batch, step: Tensor, training: bool, options: Callable[[], Mapping[str, Any]]
    ) -> Batch:
        """The batch of all ranks. Each takes for granted that those of the others are like its own."""
        told = Told.of(batch)
        call = 16 * told.dtype + 4 * training + 2 * told.masked + told.identified
        if self.shards.size > 1:  # a gradient is of all blocks
            call += 8 * told.learns
        else:  # any rank may ask for one
            told = told._replace(learns=True)
        number = _in_graph(options(), step) if torch.compiler.is_compiling() else _hash(repr(options()))
        return self._exchange(batch, [told] * self.size, step, call, number)

    def rounds(self, batches: Iterator[Batch], like: Batch, step: Tensor) -> Iterator[Batch]:
        """The batches of all ranks, one of each at a time, until no rank has any left; `like` is a batch of no rows."""
        while True:
            batch, told = self._tell(lambda: next(batches, like), {"call": "fill_from"}, step, ended=like)
            if all(of_rank.rows < 0 for of_rank in told):
                return
            yield self._exchange(batch, told, step)

    def of_each(self, t: Tensor) -> Tensor:
        """`[W, …]` what each rank has."""
        return collectives.gather(t, self.size, self._name)

    def total(self, t: Tensor) -> Tensor:
        """The sum over all ranks, the same bits on each."""
        return self.of_each(t).sum(0)

    def total_of_own(self, t: Tensor, sizes: Sequence[int]) -> Tensor:
        """Of `t [N, D]` this rank's rows, summed over all ranks; `sizes` are those of the batch. The same bits every
        run."""
        own = sizes[self.rank]
        received = collectives.exchange(t, sizes, [own] * self.size, self._name)
        return received.view(self.size, own, *t.shape[1:]).sum(0)

    def _tell(
        self, check: Callable[[], Batch], options: Mapping[str, Any], step: Tensor, ended: Batch | None = None
    ) -> tuple[Batch, list[Told]]:
        """This rank's batch, and what all ranks tell of theirs. Raises on every rank what one of them raises."""
        batch, fault = None, None
        try:
            batch = check()
            own = Told.of(batch)._replace(options=_hash(repr(options)), step=int(step) if reads_at_once(step) else -1)
            own = own._replace(rows=-1) if batch is ended else own
        except Exception as error:  # whatever it is: the others wait
            fault, own = error, Told(rows=0, failed=1)
        told = self._told_by_all(own, fault)
        if any(of_rank.failed for of_rank in told):
            self._fail(fault)
        assert batch is not None
        if len({of_rank.options for of_rank in told}) > 1:
            self._agree(options)
        _same("embeddings' dtype", {rank: SENT_AS[of.dtype] for rank, of in enumerate(told) if of.rows > 0})
        _same("enqueue_mask", {rank: "a mask" if of.masked else None for rank, of in enumerate(told) if of.rows > 0})
        _same_step([of_rank.step for of_rank in told])
        return batch, told

    def _told_by_all(self, own: Told, fault: Exception | None) -> list[Told]:
        try:
            return [Told(*of_rank) for of_rank in collectives.gather_numbers(own, self._host)]
        except RuntimeError as error:
            after = "" if own.step < 0 else f" after {own.step} steps"
            its = f"rank {self.rank} of {self.size} has called a CrossBatchMemory{after}, and another rank has not"
            why = "it has left out a call, comes later than the group's timeout, or has died"
            raise RuntimeError(f"{its}: {why} ({error})") from error if fault is None else fault

    def _fail(self, fault: Exception | None) -> NoReturn:
        """Raises on each rank its own fault, and on one without any the first of the others."""
        texts = collectives.gather_objects(None if fault is None else _text(fault), self._host)
        if fault is not None:
            raise fault
        rank, text = next((rank, text) for rank, text in enumerate(texts) if text is not None)
        raise RuntimeError(f"rank {rank} takes no step: {text}")

    def _agree(self, options: Mapping[str, Any]) -> None:
        """Raises ValueError on every rank, naming the option, if one is not the same on all of them."""
        of_ranks = collectives.gather_objects({name: repr(value) for name, value in options.items()}, self._host)
        for name in of_ranks[0]:
            _same(name, {rank: given.get(name) for rank, given in enumerate(of_ranks)})

    def _exchange(
        self, batch: Batch, told: Sequence[Told], step: Tensor, call: int = 0, options: int | Tensor = 0
    ) -> Batch:
        """What the ranks have told of is sent, each rank's padded to the longest, and cut again. `step`, `call` and
        `options` must be the same on all of them."""
        sizes = tuple(max(0, of_rank.rows) for of_rank in told)
        rows = max(*sizes, 1)
        with_rows = [of_rank for of_rank in told if of_rank.rows > 0] or told[:1]
        labels, mask, ids = batch.labels, batch.mask, batch.ids
        ids = torch.full_like(labels, -1) if ids is None else ids
        mask = torch.zeros_like(labels) if mask is None else mask
        of_rows = F.pad(torch.stack([labels, ids, mask]), (0, rows - len(labels)))
        options = options if isinstance(options, Tensor) else torch.full_like(step, options)
        of_call = torch.stack([step, torch.full_like(step, call), options])
        sent = torch.cat([of_call[:, None], of_rows], 1)
        received = collectives.gather(sent, self.size, self._name)  # [W, 3, 1 + rows]
        _assert_same_call(received[:, :, 0])  # before embeddings are sent: of several dtypes, torch ends the process
        x = _Gathered.apply(batch.embeddings.to(SENT_AS[with_rows[0].dtype]), self._name, self.rank, sizes)
        labels, all_ids, all_masks = _joined(received[:, :, 1:].transpose(1, 2), sizes).t().contiguous().unbind()
        return Batch(
            x,
            labels,
            all_masks.bool() if any(of_rank.masked for of_rank in with_rows) else None,
            all_ids if any(of_rank.identified for of_rank in with_rows) else None,
            sizes,
            any(of_rank.learns for of_rank in told),
        )

    def own(self, batch: Batch) -> slice:
        """This rank's rows of a batch of all."""
        return _own(batch.sizes, self.rank)

    def line(self, batch: Batch) -> slice:
        """The rows of the ranks of its line, which rank against its block."""
        members = self.shards.members
        return slice(sum(batch.sizes[: members.start]), sum(batch.sizes[: members.stop]))


def _assert_same_call(of_ranks: Tensor) -> None:
    torch._assert_async(
        (of_ranks == of_ranks[:1]).all(),
        f"{DIFFERENT}: their memories have not taken the same number of steps; or, with a batch_size, their options "
        "differ, or the dtype of embeddings, or some train, were given enqueue_mask or ids or, of shards, need a "
        "gradient, and others not",
    )


def _text(fault: Exception) -> str:
    name = type(fault).__name__
    try:
        return f"{name}: {fault}"
    except Exception:  # its own __str__ has raised, and the others wait
        return name


def reads_at_once(t: Tensor) -> bool:
    """Whether a host can read a tensor without waiting for a device, and no compiler looks on."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling()


def _hash(text: str) -> int:
    return zlib.crc32(text.encode())


_hash._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in _autograd.py; of texts it is one


def _in_graph(options: Mapping[str, Any], like: Tensor) -> Tensor:
    """`[]` int64, a hash of the options where numbers among them may be variables of a compiled graph."""
    code = torch.zeros_like(like)
    for value in options.values():
        if isinstance(value, float):
            number = torch.full_like(like, value, dtype=torch.float64).view(torch.int64)
        else:
            number = torch.full_like(like, value if isinstance(value, int) else _hash(repr(value)))
        code = 1_000_003 * code + number
    return code


def _same(name: str, of_ranks: Mapping[int, Any]) -> None:
    for (first, one), (rank, other) in pairwise(of_ranks.items()):
        if one != other:
            its = f"{name} must be the same on every rank"
            raise ValueError(f"{its}, got {one} on rank {first} and {other} on rank {rank}")


def _same_step(of_ranks: Sequence[int]) -> None:
    for rank, (one, other) in enumerate(pairwise(of_ranks)):
        if one != other:
            its = f"the memory of rank {rank} has taken {one} steps, that of rank {rank + 1} {other}"
            raise RuntimeError(f"{DIFFERENT}: {its}")


def _own(sizes: Sequence[int], rank: int) -> slice:
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def _joined(parts: Tensor, sizes: Sequence[int]) -> Tensor:
    """The first rows of each rank's part of `[W, rows, …]`, one rank after the other."""
    if min(sizes) == parts.shape[1]:
        return parts.flatten(0, 1)
    return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])


class _Gathered(torch.autograd.Function):
    """`[N, D]` the rows of all ranks. Every rank knows the derivative by all of them: backward sends nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group_name: str, rank: int, sizes: tuple[int, ...]) -> Tensor:
        ctx.own, ctx.W, ctx.dtype = _own(sizes, rank), len(sizes), x.dtype
        parts = collectives.gather(F.pad(x, (0, 0, 0, max(*sizes, 1) - len(x))), len(sizes), group_name)
        return _joined(parts, sizes).to(compute_dtype(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (ctx.W * grad[ctx.own]).to(ctx.dtype), None, None, None
