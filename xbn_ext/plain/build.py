"""The ops that compute nothing: what is asked of a build."""

from __future__ import annotations

BACKENDS = ("auto", "simt", "tensor", "composite", "screen", "pairs")
_backend = "auto"


def cpu_isa() -> str:
    """There are no kernels whose instructions could be chosen."""
    return "none"


def cuda_architectures() -> str:
    return ""


def set_cuda_backend(name: str) -> str:
    """Returns what was set before. Without effect."""
    global _backend
    if name not in BACKENDS:
        raise RuntimeError(f"backend must be 'auto', 'simt', 'tensor', 'screen' or 'composite', got '{name}'")
    before, _backend = _backend, name
    return before


def _peak_fma(threads: int, rounds: int, float64: bool) -> tuple[float, float]:
    raise RuntimeError("_peak_fma: measures the processor by compiled code, and xbn_ext runs without its library")
