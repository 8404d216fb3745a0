"""What numbers are of: the machine and the versions."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from xbn_ext import build_info

from .table import Row


def named(device: str, threads: int) -> str:
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        kernels = build_info()["cpu_isa"] if build_info()["native"] else "without the compiled library"
        name = f"{_processor()}, {kernels}, {threads} threads"
    return f"{name}, torch {torch.__version__}"


def facts(threads: int) -> Row:
    """Of every row in a JSON file."""
    return {"threads": threads, "torch": torch.__version__, "cpu_isa": build_info()["cpu_isa"]}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
