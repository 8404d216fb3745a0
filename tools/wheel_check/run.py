"""Other programs: their output, or the exception that ends a check."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path


class Unavailable(Exception):
    """What a check needs is not available on this machine."""


class Failed(Exception):
    """A check ran and did not pass."""


def run(command: Sequence[str | Path], otherwise: type[Exception], environ: dict[str, str] | None = None) -> str:
    """Runs a command and returns what it printed on standard output.

    Raises:
        Exception: of the type `otherwise`, with the last lines printed, if it does not start or exits with an error.
    """
    try:
        done = subprocess.run(command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except OSError as error:
        raise otherwise(f"{command[0]}: {error.strerror}") from error
    if done.returncode != 0:
        last = (done.stdout + done.stderr).strip().splitlines()[-15:]
        raise otherwise("\n".join(last) or f"{command[0]} ended with status {done.returncode}")
    return done.stdout
