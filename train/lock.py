"""One run at a time in a folder: two would write the same files, and each remove what the other had begun."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .checkpoint import CHECKPOINT, METRICS, writing
from .config import ConfigError

State = tuple[tuple[int, int, int] | None, ...]
"""For each file that shows how far a run is: what changes when it is written, or None if there is no such file."""

_held: set[int] = set()


def _leave_to_parent() -> None:
    """A process that prepares images must not hold the lock: it may outlive a run that is killed by some seconds."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


def state(folder: Path) -> State:
    """What tells whether a run in ``folder`` has come further."""

    def of(path: Path) -> tuple[int, int, int] | None:
        try:
            found = os.stat(path)
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    return tuple(of(folder / name) for name in (METRICS, CHECKPOINT))


@contextmanager
def alone(folder: Path, before: State | None = None) -> Iterator[None]:
    """Make ``folder``; while open, no other process has it. Where the file system has no locks, nothing is locked.

    Args:
        folder: of a run or a study.
        before: its ``state`` when it was looked at.

    Raises:
        ConfigError: another process has it, or has been there since it was looked at; or it cannot be made.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    handle = _lock(folder)
    try:
        if before is not None and state(folder) != before:
            raise ConfigError(f"--out {folder}: another process has written there meanwhile; start again")
        yield
    finally:
        if handle is not None:
            _held.discard(handle)
            os.close(handle)


def _lock(folder: Path) -> int | None:
    """The handle that holds the lock; None where there are no locks, or the folder can be written but not read."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ConfigError(f"--out {folder}: another process is at work there; wait, or choose another") from None
    except OSError:
        os.close(handle)
        return None
    _held.add(handle)
    return handle
