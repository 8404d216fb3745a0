"""Processes that play the ranks of a run, as torchrun would start them.

They are forked from one that has imported what they need, which takes seconds, and has computed nothing.
"""

from __future__ import annotations

import io
import multiprocessing
import multiprocessing.context
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

PATIENCE = 60
"""Seconds after which a process that has not answered hangs."""

IMPORTED = ["torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo", "pytest", "xbn_ext", "train.run"]


def context() -> multiprocessing.context.ForkServerContext:
    multiprocessing.set_forkserver_preload(IMPORTED)
    return multiprocessing.get_context("forkserver")


def start(size: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call the function of a module with 0 .. ``size`` - 1, each in a process, and raise what the first to fail did."""
    context()
    torch.multiprocessing.start_processes(function, arguments, nprocs=size, start_method="forkserver")


class Answer(NamedTuple):
    """What a rank has done."""

    value: Any
    """What the function returned; None if it raised."""
    fault: str
    """The traceback, if it did."""
    out: str
    err: str


class Processes:
    """So many, from ``with`` to its end; each carries out one thing after the other. In the place of one that has ended
    another is started."""

    def __init__(self, size: int) -> None:
        self.context = context()
        self.pipes: list[Any] = [None] * size
        self.processes: list[Any] = [None] * size
        for rank in range(size):
            self._start(rank)

    def _start(self, rank: int) -> None:
        self.pipes[rank], there = self.context.Pipe()
        self.processes[rank] = self.context.Process(target=_serve, args=(there,))
        self.processes[rank].start()
        there.close()  # so that the end of the process is noticed

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()

    def __call__(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Answer]:
        """Call the function of a module in each of the first ``size``, as ranks of one run."""
        job = pickle.dumps((function, arguments))  # raises before any has begun
        for rank in range(size):
            if not self.processes[rank].is_alive():
                self._start(rank)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank, pipe in enumerate(self.pipes[:size]):
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
            pipe.send((names | {"MASTER_PORT": port}, job))
        return [self._answer(rank) for rank in range(size)]

    def _answer(self, rank: int) -> Answer:
        if not self.pipes[rank].poll(PATIENCE):
            for process in self.processes:
                process.kill()
                process.join()
            raise AssertionError(f"rank {rank} hangs")
        try:
            answer: Answer = pickle.loads(self.pipes[rank].recv())
        except EOFError:
            return Answer(None, "has ended", "", "")
        return answer


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            names, job = pipe.recv()
        except EOFError:  # the tests have been killed
            return
        function, arguments = pickle.loads(job)
        os.environ.update({name: str(value) for name, value in names.items()})
        value, fault = None, ""
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            try:
                value = function(*arguments)
            except BaseException:
                fault = traceback.format_exc()
        # Pickled here: a pipe's own pickler would share the memory of tensors, whose process may end.
        pipe.send(pickle.dumps(Answer(value, fault, out.getvalue(), err.getvalue())))
