"""What this machine has: how many processes are worth starting, and what fits into its memory."""

from __future__ import annotations

import os


def cores() -> int:
    """Those that this process may run on."""
    # OpenMP that binds its threads has bound this one, too, to a core of its own.
    binds = os.environ.get("OMP_PROC_BIND", "false").lower() not in ("", "false")
    if binds or not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return len(os.sched_getaffinity(0))


def bytes_of_memory() -> int:
    """All that the machine has, free or not."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
