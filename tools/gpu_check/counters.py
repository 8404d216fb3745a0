"""What the hardware counted while our kernels ran, by ncu: all of them in one process, which takes seconds to start."""

from __future__ import annotations

import csv
import re
import shutil
import sys

from benchmarks.table import Row

from .run import Runner, Section, command, tail

SHAPE = (64, 60_000, 512)
KERNELS = "(sweep|screen|pair|similarity|score|weighted_rows|rewrite|moments|storable|store|settle|gradient)_kernel"
METRICS = {
    "gpu__time_duration.sum": "us",
    "dram__bytes_read.sum": "dram read MB",
    "dram__bytes_write.sum": "dram written MB",
    "lts__t_bytes.sum": "L2 MB",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM %",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "dram %",
    "l1tex__throughput.avg.pct_of_peak_sustained_active": "L1 %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
    "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active": "FMA pipe %",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor pipe %",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue %",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": "bank conflicts",
    "launch__registers_per_thread": "registers",
}
SCALE = {"us": 1e-3, "dram read MB": 1e-6, "dram written MB": 1e-6, "L2 MB": 1e-6}  # from ns and bytes
STALL = re.compile(
    r"smsp__average_warps?_(?:latency_)?issue_stalled_(\w+?)(?:_per_issue_active|_per_warp_active)?\.(?:ratio|pct)$"
)
REFUSED = r"ERR_NVGPUCTRPERM|LibraryNotLoaded|Failed to initialize the profiler|not supported on this"


def drive() -> None:
    """A step by every way, in place and deferred. Runs inside ncu, which looks at the last one of each."""
    import torch

    from xbn_ext import loss_way
    from xbn_ext.options import WAYS

    from .timing import TRAINED, calls_of, case_of

    for way in WAYS:
        if way in ("auto", "composite"):
            continue
        with loss_way(way):
            (step,) = calls_of(case_of("step", SHAPE, way, density=TRAINED), "cuda", 1)
            step()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            step()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def count(runner: Runner) -> Section:
    """A section: a row per kernel, clocks left alone."""

    def function(section: Section) -> None:
        program = shutil.which("ncu")
        if program is None:
            section.status, section.note = "skipped", "ncu is not on PATH"
            return
        for metrics in (["--metrics", ",".join(METRICS)], []):  # a name that this ncu lacks spoils the run
            done = command(
                [program, "--clock-control", "none", "--target-processes", "all", "--profile-from-start", "off",
                 "--kernel-name", f"regex:{KERNELS}", "--section", "WarpStateStats", "--section", "SpeedOfLight",
                 "--section", "LaunchStats", "--section", "Occupancy", *metrics, "--csv", "--page", "raw",
                 "--print-units", "base", sys.executable, "-m", "tools.gpu_check", "--count"],
                min(100, runner.left()),
            )  # fmt: skip
            found, refused = read_csv(done.stdout), re.search(REFUSED, done.stdout)
            if found or refused:
                break
        if not found:
            section.status, section.note = "skipped" if refused else "failed", tail(done.stdout, 600)
            return
        section.rows = [summary(values) for values in found]
        section.note = f"{len(found)} kernels"

    return runner.section("counters", function)


def read_csv(text: str) -> list[dict[str, str]]:
    """Of each kernel, metric -> value. ncu's raw page is a line of names, one of units, then one of values each."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    table = list(csv.reader(lines))
    return [dict(zip(table[0], values, strict=True)) for values in table[2:] if len(values) == len(table[0])]


def summary(values: dict[str, str]) -> Row:
    """The metrics of interest under short names, and the commonest reasons for which warps stood still."""
    kernel = re.search(r"(\w+_kernel)", values.get("Kernel Name", ""))
    row: Row = {"kernel": kernel[1] if kernel else "?"}
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
