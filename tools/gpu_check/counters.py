"""Part C: what the hardware counted while a kernel ran, by ncu."""

from __future__ import annotations

import csv
import re
import shutil
import sys
from typing import Any

from .run import Row, Runner, Section, command, tail

# name -> (kernel, B, M, D)
PROFILES = {
    "sweep 64 60k 512": ("sweep_kernel", 64, 60_000, 512),
    "rewrite 1M 512": ("rewrite_kernel", 64, 1_000_000, 512),
    "sweep 1024 200k 512": ("sweep_kernel", 1024, 200_000, 512),
    "sweep 64 1M 512": ("sweep_kernel", 64, 1_000_000, 512),
}
METRICS = {
    "gpu__time_duration.sum": "us",
    "dram__bytes_read.sum": "dram read MB",
    "dram__bytes_write.sum": "dram written MB",
    "lts__t_bytes.sum": "L2 MB",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM %",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "dram %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
    "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active": "FMA pipe %",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": "bank conflicts",
    "launch__registers_per_thread": "registers",
}
SCALE = {"us": 1e-3, "dram read MB": 1e-6, "dram written MB": 1e-6, "L2 MB": 1e-6}  # from ns and bytes
STALL = re.compile(
    r"smsp__average_warps?_(?:latency_)?issue_stalled_(\w+?)(?:_per_issue_active|_per_warp_active)?\.(?:ratio|pct)$"
)
REFUSED = r"ERR_NVGPUCTRPERM|LibraryNotLoaded|Failed to initialize the profiler|not supported on this"


def drive(name: str) -> None:
    """Runs the kernel of a profile three times. Runs inside ncu, which looks at the last one."""
    import torch

    from xbn_ext import Contrastive, backend, ops

    from .timing import random_unit

    kernel, B, M, D = PROFILES[name]
    bank, bank_labels = random_unit(M, D, "cuda", seed=1)
    if kernel == "rewrite_kernel":
        f64: dict[str, Any] = {"dtype": torch.float64, "device": "cuda"}
        count = torch.tensor(M, device="cuda")
        for _ in range(3):
            ops.transform_(bank, torch.zeros(2, D, **f64), torch.ones(D, **f64), torch.zeros(D, **f64), count)
    else:
        z, labels = random_unit(B, D, "cuda", seed=2)
        z.requires_grad_()
        with backend("tensor"):
            for _ in range(3):
                ops.memory_loss(z, labels, bank, bank_labels, Contrastive(neg_margin=0.15))
    torch.cuda.synchronize()


def profile(runner: Runner, name: str) -> Section:
    """A section: one kernel under ncu, clocks left alone."""

    def function(section: Section) -> None:
        program = shutil.which("ncu")
        if program is None:
            section.status, section.note = "skipped", "ncu is not on PATH"
            return
        kernel, _, M, D = PROFILES[name]
        for metrics in (["--metrics", ",".join(METRICS)], []):  # a name that this ncu lacks spoils the run
            done = command(
                [program, "--clock-control", "none", "--target-processes", "all", "--kernel-name", f"regex:{kernel}",
                 "--launch-skip", "2", "--launch-count", "1", "--section", "WarpStateStats", "--section",
                 "SpeedOfLight", "--section", "LaunchStats", "--section", "Occupancy", *metrics, "--csv", "--page",
                 "raw", "--print-units", "base", sys.executable, "-m", "tools.gpu_check", "--profile", name],
                min(150, runner.left()),
            )  # fmt: skip
            values, refused = read_csv(done.stdout), re.search(REFUSED, done.stdout)
            if values or refused:
                break
        if not values:
            section.status, section.note = "skipped" if refused else "failed", tail(done.stdout, 600)
            return
        row = summary(values)
        row["dram read / bank"] = round(row["dram read MB"] / (4e-6 * M * D), 3) if "dram read MB" in row else None
        section.rows.append({"profile": name, **row})
        section.note = ", ".join(f"{key} {value}" for key, value in row.items())

    return runner.section(f"ncu {name}", function)


def read_csv(text: str) -> dict[str, str]:
    """Metric -> value of the one kernel in ncu's raw page: a line of names, a line of units, a line of values."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    table = list(csv.reader(lines))
    if len(table) < 3 or len(table[0]) != len(table[2]):
        return {}
    return dict(zip(table[0], table[2], strict=True))


def summary(values: dict[str, str]) -> Row:
    """The metrics of interest under short names, and the commonest reasons for which warps stood still."""
    row: Row = {}
    for metric, name in METRICS.items():
        if (value := _number(values.get(metric))) is not None:
            row[name] = round(value * SCALE.get(name, 1), 2)
    stalls: dict[str, float] = {}
    for metric, text in values.items():
        found = STALL.match(metric)
        if found and not found[1].endswith("not_issued") and (value := _number(text)) is not None:
            stalls[found[1]] = max(stalls.get(found[1], 0), value)
    top = sorted(stalls.items(), key=lambda item: -item[1])[:4]
    row["stalls"] = " ".join(f"{name}:{value:.2f}" for name, value in top)
    return row


def _number(text: str | None) -> float | None:
    try:
        return float(text.replace(",", "")) if text else None
    except ValueError:
        return None
