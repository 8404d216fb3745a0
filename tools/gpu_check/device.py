"""What the machine is, and how fast it can go at all."""

from __future__ import annotations

import platform
import re
import subprocess

import torch

from benchmarks.roofline import CEILINGS, ceiling
from benchmarks.table import Row, unit

from .run import Job

QUERY = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"


def worker(job: Job) -> None:
    """A row that says what runs here; then rows `{name, value, unit}`: what it reaches with nothing else to do."""
    if job.device == "cuda" and not torch.cuda.is_available():
        why = (
            "this is a CPU build of torch" if torch.version.cuda is None else "torch finds none; is its driver too old?"
        )
        raise RuntimeError(why)
    names = [name for name in CEILINGS[job.device] if name != "float64"]  # slow on many GPUs, and nothing here needs it
    job.each([{}, *({"name": name} for name in names)], lambda **case: _row(job.device, **case))


def _row(device: str, name: str = "") -> Row:
    if not name:
        return _facts(device)
    return {"value": ceiling(name, device, torch.get_num_threads()), "unit": unit(name)}


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
