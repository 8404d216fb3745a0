"""The processes of --workers: what goes wrong there is told in a line, and a wish to stop is left to the run."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from .data import DataError


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
        raise DataError(
            "--workers: the system has ended a process that prepares images, most likely because memory ran out; "
            f"fewer --workers need less ({error})"
        ) from error


def begin(worker: int) -> None:
    """A process that prepares images starts, number ``worker``. A first Ctrl-C or SIGTERM is left to the run.

    A terminal sends Ctrl-C to all processes, a batch system SIGTERM; the run still needs images up to its checkpoint.
    """

    def only_once(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, only_once)
