"""What the terminal can show."""

from __future__ import annotations

import io
import sys


def escape_the_rest() -> None:
    """From now on, characters that standard output's encoding lacks are printed as escapes, as standard error does;
    else a name of a folder could end a run."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
