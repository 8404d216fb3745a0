"""What a command may replace: nothing but what it has written itself, or an empty file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from . import checkpoint, place
from .config import ConfigError
from .kinds import Kinds


def require_page(out: Path) -> None:
    """Raise ConfigError if there is something at ``out`` that is no page of HTML, or if no file can be there."""
    _require_possible(out, [out])
    if _holds_something(out) and not _begins_like_a_page(out):
        raise ConfigError(f"--out {out}: is there and is no page of HTML: move it, or choose another")


def require_own(out: Path, files: Sequence[Path], about: Path, kinds: Kinds, command: str) -> None:
    """Raise ConfigError if one of some files is there and the command has not written it, or cannot be there.

    Args:
        out: what was given.
        files: that it writes.
        about: the one among them that says what they are.
        kinds: what is in that.
        command: its name.
    """
    _require_possible(out, files)
    there = [path for path in files if _holds_something(path)]
    try:
        if there:
            checkpoint.read_json(about, kinds)
    except ConfigError as error:
        names = " and ".join(path.name for path in there)
        which = f"would replace {names}, which the command {command} has not written"
        raise ConfigError(f"--out {out}: {which}: move it, or choose another") from error


def _require_possible(out: Path, files: Sequence[Path]) -> None:
    """Raise ConfigError if it is known beforehand that a file cannot be written: its name is too long, it is a folder,
    or the folder it belongs in does not exist or may not be written to. ``out`` itself may be a folder to be made."""
    for path in files:
        try:
            os.lstat(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ConfigError(f"--out {out}: {error.strerror}: choose another") from error
        if os.path.isdir(path):
            raise ConfigError(f"--out {out}: {path} is a folder: choose another")
        if path.parent != out and not os.path.isdir(path.parent):
            raise ConfigError(f"--out {out}: there is no folder {path.parent}: make it, or choose another")
        place.require_writable(path.parent)


def _holds_something(path: Path) -> bool:
    """Also a pipe; not a folder, which no file replaces."""
    is_empty = os.path.isfile(path) and os.path.getsize(path) == 0
    return os.path.exists(path) and not os.path.isdir(path) and not is_empty


def _begins_like_a_page(path: Path) -> bool:
    if not os.path.isfile(path):
        return False
    with checkpoint.writing(path), path.open("rb") as file:  # one that may not be read must not be replaced either
        return file.read(256).lstrip().lower().startswith((b"<!doctype html", b"<html"))
