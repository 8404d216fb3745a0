"""What the machine is, and how fast it can go at all."""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from .clock import measure
from .run import Job, Row

QUERY = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"


def facts(job: Job) -> None:
    """One row that says what runs here."""
    job.each([{}], lambda: _facts(job.device))


def _facts(device: str) -> Row:
    row: Row = {
        "device": "cpu", "capability": None, "multiprocessors": None, "l2_mb": None, "memory_gb": None,
        "torch": torch.__version__, "cuda": torch.version.cuda, "nvcc": _nvcc_version(),
        "python": platform.python_version(),
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


# --- Ceilings -----------------------------------------------------------------------------------------------------


def ceilings(job: Job) -> None:
    """Rows `{name, value, unit}`: what the device reaches with nothing else to do."""
    small = job.device == "cpu"
    n = 256 if small else 8192
    cases: list[dict[str, Any]] = [
        {"name": "copy", "unit": "GB/s", "size": 2**20 if small else 4 * 10**9},
        {"name": "fp32", "unit": "TFLOP/s", "size": n},
        {"name": "tf32", "unit": "TFLOP/s", "size": n},
        {"name": "bf16", "unit": "TFLOP/s", "size": n},
    ]
    if not small:
        cases.append({"name": "l2 read", "unit": "GB/s", "size": 0})
    job.each(cases, lambda name, unit, size: _ceiling(name, size, job.device))


def _ceiling(name: str, size: int, device: str) -> Row:
    if name == "copy":
        source = torch.zeros(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return {"value": _rate(2e-3 * size, measure([lambda: target.copy_(source)], device).us)}
    if name == "l2 read":
        return {"value": _l2_read()}
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    us = measure([lambda: torch.mm(a, b, out=out)], device).us
    torch.set_float32_matmul_precision("highest")
    return {"value": _rate(2e-6 * size**3, us)}


def _rate(amount: float, us: float) -> float:
    return round(amount / us, 2)


def _l2_read() -> float:
    """GB/s of reading a third of the second-level cache again and again."""
    p = torch.cuda.get_device_properties(0)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("nvcc is not on PATH")
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder, "l2_read.so"))
        subprocess.run(
            [nvcc, "-O3", "-shared", "-Xcompiler", "-fPIC", f"-arch=sm_{p.major}{p.minor}", "-o", library,
             str(Path(__file__).with_name("l2_read.cu"))],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
        read = ctypes.CDLL(library).l2_read
    pointer = ctypes.c_void_p
    read.argtypes = [pointer, ctypes.c_longlong, ctypes.c_int, pointer, ctypes.c_int, pointer]
    passes, size = 100, getattr(p, "L2_cache_size", 32 << 20) // 3 // 16 * 16
    data, sink = torch.zeros(size, dtype=torch.uint8, device="cuda"), torch.zeros(1, device="cuda")

    def call() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        error = read(data.data_ptr(), size // 16, passes, sink.data_ptr(), p.multi_processor_count, stream)
        if error != 0:
            raise RuntimeError(f"l2_read: CUDA error {error}")

    return _rate(1e-3 * size * passes, measure([call], "cuda").us)
