"""The ops that compute nothing: what is asked of a build."""

from __future__ import annotations

from ..checks import listed
from ..options import WAYS, WAYS_FOR_TESTS

_way = "auto"


def cpu_isa() -> str:
    """There are no kernels whose instructions could be chosen."""
    return "none"


def cuda_architectures() -> str:
    return ""


def set_loss_way(name: str) -> str:
    """Returns what was set before. Without effect."""
    global _way
    if name not in WAYS_FOR_TESTS:
        raise RuntimeError(f"way must be {listed([repr(way) for way in WAYS])}, got '{name}'")
    before, _way = _way, name
    return before


def _peak_fma(threads: int, rounds: int, float64: bool) -> tuple[float, float]:
    raise RuntimeError("_peak_fma: measures the processor by compiled code, and xbn_ext runs without its library")
