"""What the machine is, and how fast it can go at all."""

from __future__ import annotations

import platform
import re
import subprocess
from typing import Any

import torch

from .clock import measure
from .run import Job, Row

QUERY = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"


def worker(job: Job) -> None:
    """A row that says what runs here; then rows `{name, value, unit}`: what it reaches with nothing else to do."""
    if job.device == "cuda" and not torch.cuda.is_available():
        why = (
            "this is a CPU build of torch" if torch.version.cuda is None else "torch finds none; is its driver too old?"
        )
        raise RuntimeError(why)
    job.each([{}, *ceilings(small=job.device == "cpu")], lambda **case: _row(job.device, **case))


def ceilings(small: bool = False) -> list[Row]:
    n, size = (256, 2**20) if small else (8192, 4 * 10**9)
    rows: list[Row] = [{"name": name, "unit": "GB/s", "size": size} for name in ("read", "copy")]
    return rows + [{"name": name, "unit": "TFLOP/s", "size": n} for name in ("fp32", "tf32", "bf16")]


def _row(device: str, **case: Any) -> Row:
    return _ceiling(case["name"], case["size"], device) if case else _facts(device)


def _facts(device: str) -> Row:
    from xbn_ext import build_info

    row: Row = {
        "device": "cpu", "capability": None, "multiprocessors": None, "l2_mb": None, "memory_gb": None,
        "torch": torch.__version__, "cuda": torch.version.cuda, "nvcc": _nvcc_version(),
        "python": platform.python_version(), "library": build_info()["cuda"],
    }  # fmt: skip
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        row |= {
            "device": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "l2_mb": round(getattr(p, "L2_cache_size", 0) / 2**20, 1),
            "memory_gb": round(p.total_memory / 1e9, 1),
            **_nvidia_smi(),
        }
    return row


def _nvcc_version() -> str | None:
    try:
        text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"V(\d+\.\d+\.\d+)", text)
    return found[1] if found else None


def _nvidia_smi() -> Row:
    """Driver, clocks in MHz and power limit in W, as nvidia-smi shows them; nothing where it does not."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--id=0", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.strip().split("\n")[0].split(",")]
    names = QUERY.split(",")
    return dict(zip(names, values, strict=True)) if done.returncode == 0 and len(values) == len(names) else {}


def _ceiling(name: str, size: int, device: str) -> Row:
    """Kernels, all of them: what a GPU copies in a graph without one is slower by a third."""
    if name in ("read", "copy"):
        a = torch.zeros(size // 4, device=device)
        if name == "read":
            return {"value": _rate(1e-3 * size, measure([lambda: torch.sum(a)], device, 0.2).us)}
        b = torch.empty_like(a)
        return {"value": _rate(2e-3 * size, measure([lambda: torch.mul(a, 2, out=b)], device, 0.2).us)}
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    x, y = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(x)
    us = measure([lambda: torch.mm(x, y, out=out)], device, 0.2).us
    torch.set_float32_matmul_precision("highest")
    return {"value": _rate(2e-6 * size**3, us)}


def _rate(amount: float, us: float) -> float:
    return float(f"{amount / us:.4g}")
