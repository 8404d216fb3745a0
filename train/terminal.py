"""What the terminal can show."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast

from tqdm import tqdm

from .program import FAILED, called


def prepare() -> None:
    """From now on, characters that standard output's encoding lacks are printed as escapes, as standard error does;
    else a name of a folder could end a run. A stream that is closed, as of a daemon, leads to nothing."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if type(sys.stderr) is io.TextIOWrapper:
        sys.stderr = cast(TextIO, _Lenient(sys.stderr))


def say(*lines: object) -> None:
    """Print, above the bar if there is one. What cannot be seen, such as a line break in a name, is escaped. Once the
    output is closed nothing is printed any more, and the run goes on: Ctrl-C ends the ``tee`` behind it, too, and the
    run still has a checkpoint to write."""
    try:
        tqdm.write("\n".join(printable(str(line)) for line in lines))
        sys.stdout.flush()
    except OSError:
        _forget(sys.stdout)


def answer(*lines: object) -> None:
    """Print what was asked for: no line of it may be lost. A reader who has left, such as ``head``, has seen enough.

    Raises:
        OSError: it cannot be written, as where the disk is full.
    """
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:
        _forget(sys.stdout)
    except OSError:
        _forget(sys.stdout)  # else Python tries once more as it ends
        raise


def _forget(stream: TextIO) -> None:
    """From now on what is written to it leads to nothing."""
    with suppress(OSError):  # no file of the system
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Lenient:
    """Standard error for notes: once it is closed, or its disk is full, they lead to nothing, and the program goes
    on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            _forget(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            _forget(self._stream)


def printable(text: str) -> str:
    """Characters that are not to be seen, such as a line break in the name of a file, become escapes."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def note(line: str) -> None:
    """Print a line on standard error, which is not part of the output. What cannot be seen is escaped."""
    print(printable(line), file=sys.stderr)


def complain(command: str, why: object) -> None:
    """Say why a command ends, in the lines that it is given in; "" is training."""
    for line in f"{called(command)}: error: {why}".split("\n"):
        note(line)


def refuse(command: str, error: Exception) -> int:
    """Say in one line why a command ends; returns its exit status."""
    complain(command, printable(str(error).removeprefix("--data: ")))
    return FAILED


@contextmanager
def silent(asked_for: bool = True) -> Iterator[None]:
    """While open, Python prints nothing. A traceback of what leaves it is seen."""
    if not asked_for:
        yield
        return
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        yield
