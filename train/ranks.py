"""The processes of one run, which torchrun starts: each has a part of every batch, and they agree on all that happens.

No other file of this program names ``torch.distributed``. Between two agreements a process does local work, which may
raise; where processes exchange tensors, none is missing, as all have agreed before that they go on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from xbn_ext.sampler import dealt

from .config import ConfigError
from .data import DataError
from .program import FAILED, STOPPED

T = TypeVar("T")
GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "failed to recv")
"""What torch says of a process that is there no more."""


class Elsewhere(Exception):
    """Another process cannot go on, for a reason that its message names; ``status`` is what to exit with."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Ranks:
    """One process alone: it leads, has all of everything, and agrees with itself."""

    size, rank, local_rank = 1, 0, 0
    local_size = 1
    """How many of them are on this machine."""
    group: Any = None
    """For ``CrossBatchMemory``."""

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def parts(self, count: int) -> list[slice]:
        """How so many things, one after the other, are dealt out: as even as possible, the first have one more."""
        return dealt(count, self.size)

    def part(self, count: int) -> slice:
        """This process's of ``parts``."""
        return self.parts(count)[self.rank]

    @contextmanager
    def together(self) -> Iterator[None]:
        """While open, each process works alone, and may raise. At the end all go on, or none.

        Raises:
            Elsewhere: this process could go on, another cannot.
        """
        yield

    def one_first(self, work: Callable[[], T]) -> T:
        """Each does the work, rank 0 before the others: they find what it has fetched. Raises as ``together``."""
        return work()

    def leader(self, work: Callable[[], T]) -> T:
        """What rank 0 gets by the work, which it alone does. Raises as ``together``."""
        return work()

    def any_says(self, flag: bool) -> bool:
        """Whether one of the processes says so."""
        return flag

    def add_up(self, parameters: Iterable[nn.Parameter]) -> None:
        """The gradients of each become the sums of all."""

    def joined(self, own: Tensor, parts: Sequence[slice]) -> Tensor:
        """The rows of all processes; ``own`` [n, *] are this one's. Dtypes and shapes are the same, except for n."""
        return own

    def synchronized(self, network: nn.Module) -> nn.Module:
        """The network with batch normalisation over the batches of all; its parameters and names stay."""
        return network

    @contextmanager
    def all_alive(self) -> Iterator[None]:
        """While open, a process that waits for one that is there no more raises Elsewhere."""
        yield


ALONE = Ranks()


class _Several(Ranks):
    """Processes of the default group."""

    def __init__(self) -> None:
        self.size, self.rank, self.group = dist.get_world_size(), dist.get_rank(), dist.group.WORLD
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))

    @contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:  # whatever it is: the others wait
            with suppress(Exception):  # the error is the better message
                self._tell(error)
            raise
        self._tell(None)

    def one_first(self, work: Callable[[], T]) -> T:
        results = []
        for own_turn in (self.rank == 0, self.rank != 0):
            with self.together():
                if own_turn:
                    results.append(work())
        return results[0]

    def leader(self, work: Callable[[], T]) -> T:
        result: list[Any] = [None]
        with self.together():
            if self.rank == 0:
                result = [work()]
        dist.broadcast_object_list(result, src=0, device=torch.device("cpu"))
        found: T = result[0]
        return found

    def any_says(self, flag: bool) -> bool:
        told = torch.tensor(int(flag))
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return bool(told)

    def add_up(self, parameters: Iterable[nn.Parameter]) -> None:
        # By hand and not by DistributedDataParallel. That averages, so 16-bit gradients would be as many times larger
        # than one process's as there are processes, and overflow earlier; it renames the network's parameters; and it
        # raises where one has no gradient. It would hide the time of this exchange behind the backward pass.
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, added in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(added.view_as(gradient))

    def joined(self, own: Tensor, parts: Sequence[slice]) -> Tensor:
        whole = torch.empty(parts[-1].stop, *own.shape[1:], dtype=own.dtype, device=own.device)
        whole[parts[self.rank]] = own
        for rank, part in enumerate(parts):
            if part.start < part.stop:
                dist.broadcast(whole[part], src=rank)
        return whole

    def synchronized(self, network: nn.Module) -> nn.Module:
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return converted

    @contextmanager
    def all_alive(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not any(sign in str(error) for sign in GONE):
                raise
            raise Elsewhere("another process of this run has ended; it, or torchrun, says why", FAILED) from error

    def _tell(self, error: BaseException | None) -> None:
        """Tell the others whether there is an error here; every rank calls this. Raise theirs if there is none here."""
        if not self.any_says(error is not None):
            return
        errors: list[tuple[str, int] | None] = [None] * self.size
        dist.all_gather_object(errors, None if error is None else _in_words(error))
        if error is None:
            rank, (text, status) = next((rank, told) for rank, told in enumerate(errors) if told is not None)
            raise Elsewhere(f"rank {rank}: {text}", status)


def _in_words(error: BaseException) -> tuple[str, int]:
    """What the others say of an error, and what they exit with."""
    if isinstance(error, SystemExit):
        return "exits", error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return "stopped", STOPPED
    text = str(error) if isinstance(error, ConfigError | DataError) else f"{type(error).__name__}: {error}"
    return text, FAILED


def expected() -> int:
    """How many processes torchrun says that there are."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else 1


def is_first() -> bool:
    """Whether this process is rank 0, or the only one."""
    return expected() == 1 or int(os.environ["RANK"]) == 0


@contextmanager
def join() -> Iterator[Ranks]:
    """While open, the processes that torchrun has started are a group; without it, or with one, there is no group."""
    if expected() == 1:
        yield ALONE
        return
    # Without a name there are two backends: gloo for tensors on the host, nccl for those on a GPU.
    dist.init_process_group(None if torch.cuda.is_available() else "gloo")
    try:
        yield _Several()
    finally:
        dist.destroy_process_group()
