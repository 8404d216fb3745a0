"""Time by interleaved repeats, memory by the high-water mark of a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import quantiles

import torch

from .baselines import IMPLEMENTATIONS, Step
from .problem import Problem


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one step: median, and the quartiles around it."""

    ms: float
    ms_low: float
    ms_high: float


def interleaved(steps: Mapping[str, Step], problem: Problem, repeats: int) -> dict[str, Timing]:
    """Times the implementations in turn, round after round, so that a busy moment of the machine hits them all."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round in range(repeats):
        x, labels = problem.embeddings(problem.batch, seed=100 + round)
        for name, step in steps.items():
            start = time.perf_counter()
            step(x, labels)
            seconds[name].append(time.perf_counter() - start)
    result = {}
    for name, values in seconds.items():
        low, median, high = (1e3 * q for q in quantiles(values, n=4)) if repeats > 1 else [1e3 * values[0]] * 3
        result[name] = Timing(median, low, high)
    return result


def peak_extra_megabytes(implementation: str, problem: Problem, threads: int) -> float:
    """Most memory one step holds beyond what was there before it, in MB, in a fresh process.

    Libraries are warmed up on a tiny problem first (torch.compile on the real one, as it compiles for a shape).
    The measured step is otherwise the first of its size, so nothing it needs is already cached.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure_peak, args=(implementation, problem, threads, theirs))
    process.start()
    theirs.close()
    try:
        return float(ours.recv())
    except EOFError:
        raise RuntimeError(f"{implementation} failed at {problem}") from None
    finally:
        process.join()


def _measure_peak(implementation: str, problem: Problem, threads: int, result: Connection) -> None:
    torch.set_num_threads(threads)
    make = IMPLEMENTATIONS[implementation]
    warm = problem if implementation == "compile" else Problem(8, 64, 16, classes=4)
    step = make(warm)
    for seed in (2, 3):
        step(*warm.embeddings(warm.batch, seed))
    if warm is not problem:
        step = make(problem)
    x, labels = problem.embeddings(problem.batch, seed=4)
    before = _reset_peak()
    step(x, labels)
    result.send((_peak() - before) / 1e6)


def _reset_peak() -> int:
    """Forgets the high-water mark where the kernel allows it, and returns the present one in bytes."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return _peak()


def _peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, the only such system
