"""The processes of --workers: how many there are, how fast they are, and what becomes of their faults and signals."""

from __future__ import annotations

import atexit
import os
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import queues
from multiprocessing.process import BaseProcess
from typing import TypeVar
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from .cores import cores
from .data import DataError, Pixels

FEW = 1000
"""Fewer images are prepared by the process that trains: runs on them are short, and others take a while to start."""
MOST = 8
"""Processes, where nothing else is said: each takes some 200 MB."""
WORTHWHILE = 20
"""Per cent of the time that preparing images takes from which on a process for it is worth a try."""

NO_ROOM = 28
"""How a working process ends that has no room in shared memory for what it has prepared."""

T = TypeVar("T")

_started: WeakSet[BaseProcess] = WeakSet()
"""The processes of `batches`."""


def workers(
    asked: int | None, images: Sequence[Pixels] | NDArray[np.float32], device: torch.device, processes: int = 1
) -> int:
    """How many processes prepare images, of each process that trains; what is computed does not depend on it.

    Args:
        asked: --workers; None: as many as there are cores that the network does not use, MOST at most, and none where
            there are few images, or features in their place.
        images: the images that are prepared.
        device: where the network computes; on a CPU with torch's threads.
        processes: that train on this machine.
    """
    if asked is not None:
        return asked
    features = isinstance(images, np.ndarray) and images.dtype != np.uint8
    if features or len(images) < FEW:
        return 0
    used = torch.get_num_threads() if device.type == "cpu" else 1
    return max(0, min(MOST, cores() // processes - used))


class Rates:
    """How many images a second are prepared, and how many the network takes: the smaller number is the bottleneck.

    Without working processes they take turns. Both numbers are of all processes together. The first step is not counted
    in: much happens for the first time there.
    """

    def __init__(self, images: int, workers: int) -> None:
        """``images`` are those of a step, ``workers`` prepare them, in each process."""
        self.images, self.workers = images, workers
        self.steps = 0
        self.loading = self.network = self.preparing = self.waited = 0.0
        self._all_loading = self._all_network = 0.0

    def prepared(self, seconds: float, waited: float) -> None:
        """A batch has come: so long it took to prepare, and so long the network waited for it."""
        self.preparing += seconds
        self.waited += waited

    def step(self, seconds: float) -> None:
        """A step is over, after so many seconds, waiting included: ``loading`` and ``network`` are its rates now."""
        preparing, network = max(self.preparing / max(1, self.workers), 1e-9), max(seconds - self.waited, 1e-9)
        self.loading, self.network = self.images / preparing, self.images / network
        if self.steps:
            self._all_loading += preparing
            self._all_network += network
        self.steps += 1
        self.preparing = self.waited = 0.0

    def words(self) -> str:
        """The rates over all steps except the first, and which of the two to improve; nothing after one step."""
        if self.steps < 2:
            return ""
        images, loading, network = self.images * (self.steps - 1), self._all_loading, self._all_network
        rates = f"{images / loading:.0f} images/s prepared, {images / network:.0f} images/s through the network"
        if self.workers == 0:
            part = round(100 * loading / (loading + network))
            return f"{rates}; preparing them takes {part} % of the time" + "; try --workers" * (part >= WORTHWHILE)
        by = f"{self.workers} process{'es' * (self.workers > 1)}"
        slower = "the network decides" if loading <= network else "the network waits"
        more = loading > network and self.workers + 1 < cores()  # one core is the network's
        return f"{rates}; with {by} preparing them, {slower}" + ": try more --workers" * more


@contextmanager
def plain_errors() -> Iterator[None]:
    """While open, DataErrors from working processes lose torch's tracebacks, and a killed process becomes a DataError.

    Not only where batches are waited for: torch tells of a killed process from a signal handler, whatever goes on.

    Raises:
        DataError: an image cannot be read; or the system has ended a process, and what to do.
    """
    try:
        yield
    except DataError as error:
        if not str(error).startswith("Caught DataError in DataLoader worker"):
            raise
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from error
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        if any(process.exitcode == NO_ROOM for process in list(_started)):
            raise DataError(
                "--workers: there is no room left in /dev/shm, through which images come from the processes that "
                "prepare them: make it larger (docker run --shm-size), or have fewer --workers; --workers 0 needs none"
            ) from error
        raise DataError(
            "--workers: the system has ended a process that prepares images, most likely because memory ran out; "
            f"fewer --workers need less ({error})"
        ) from error


def batches(loader: DataLoader[T]) -> Iterator[T]:
    """What a loader brings. Its processes end when it raises or is no longer asked for, and do not wait for the garbage
    collector: that may close what they are told by before they are told."""
    iterator = iter(loader)
    _started.update(getattr(iterator, "_workers", ()))
    try:
        yield from iterator
    finally:
        end = getattr(iterator, "_shutdown_workers", None)  # not of one without processes
        if end is not None:
            with suppress(RuntimeError):  # torch tells of one that a second Ctrl-C has ended
                end()


@atexit.register
def _end_all() -> None:
    """Those that are left as the program ends. Python would send each SIGTERM, once, and wait for it: see `begin`."""
    for process in list(_started):
        if process.is_alive():
            with suppress(RuntimeError):  # torch tells of it
                process.kill()
                process.join()


def begin(worker: int) -> None:
    """A process that prepares images starts, number ``worker``. A first Ctrl-C or SIGTERM is left to the run.

    A terminal sends Ctrl-C to all processes, a batch system SIGTERM; the run still needs images up to its checkpoint.
    """

    def only_once(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, only_once)
    queues.Queue._on_queue_feeder_error = staticmethod(_end_of_lost)  # type: ignore[attr-defined]


def _end_of_lost(error: BaseException, lost: object) -> None:
    """What a process has prepared does not get to the one that trains, which would wait for it for ever: the queue
    only prints a traceback."""
    if "shared memory" in str(error):
        os._exit(NO_ROOM)
    traceback.print_exception(error)
    os._exit(1)
