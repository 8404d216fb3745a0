"""Memory that has been freed and that the C library keeps.

glibc may take new memory from the system at each step of training on a CPU, although what earlier steps freed would do:
blocks of a tensor's alignment do not fit again between small ones that live on. A study's process grew by a megabyte a
step until the system ended it, at 13 GB, of which 0.5 were in use.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

EVERY = 100
"""Steps from one ``trim`` to the next; it takes milliseconds."""


def trim(step: int) -> None:
    """Give the system back what is free, at each EVERY-th step; where the C library is not glibc, nothing is done."""
    if step % EVERY == 0:
        _trim()(0)


@cache
def _trim() -> Callable[[int], object]:
    try:
        trim: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # other C libraries do not have it; TypeError: on Windows
        return bool
    return trim
