"""Memory that has been freed and that the C library keeps.

On a CPU glibc sometimes takes new memory from the system at each step of training and uses none that earlier steps have
freed; we do not know when. One process of a study grew until the system ended it, at 13 GB. Another, of 2.9 GB, grew by
about a megabyte a step, and ``malloc_trim`` left 0.5 GB of it.
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
