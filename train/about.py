"""What the command line has to know of a setting, as metadata of its field."""

from __future__ import annotations

import argparse
from dataclasses import field
from pathlib import Path
from typing import Any

from . import losses


def about(text: str, *, group: str = "", run_only: bool = False, **argument: Any) -> dict[str, Any]:
    """What there is to know of a setting, as metadata of its field.

    Args:
        text: what --help says of it.
        group: starts a new section of --help with this title.
        run_only: may change when a run is continued.
        argument: further arguments for argparse.
    """
    return {"help": text, "group": group, "run_only": run_only, "argument": argument}


def of_loss(parameter: str, text: str, **argument: Any) -> Any:
    """The field of a parameter that some losses have: None if not given."""
    of_number = {} if "action" in argument else {"type": float}
    return field(default=None, metadata=about(losses.about(parameter, text), **of_number | argument))


def switch(text: str) -> dict[str, Any]:
    """The same of a setting that is on until the command line has it with ``--no-``."""
    return about(text, action=argparse.BooleanOptionalAction)


def folder_path(text: str) -> Path:
    """A path that was given: an empty one, as of a shell variable that is not set, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the name of a folder is empty")
    return _path(text)


def file_path(text: str) -> Path:
    """A path that was given, of a file or the beginning of its name."""
    if Path(text).name in ("", ".."):
        raise argparse.ArgumentTypeError(f"{text!r} does not end with the name of a file")
    return _path(text)


def _path(text: str) -> Path:
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} has a null character, which no name has")
    try:
        return Path(text).expanduser()  # no shell has, of what a file of settings says
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be found, as there is no such home folder") from None
