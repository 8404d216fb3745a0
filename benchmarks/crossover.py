"""The size of the memory below which plain PyTorch is as fast: fusing pays only where there is something to fuse."""

from __future__ import annotations

from dataclasses import replace

from .comparisons import OURS
from .implementations import BASELINES, timed
from .problem import Problem

LARGEST = 16_384
TAKING_PART = [name for name in BASELINES if name != "compile"]  # that is compiled again for each size


def crossover(problem: Problem, names: list[str], repeats: int) -> str:
    """Times this library and the PyTorch baselines among `names` at small sizes, and says where one of those is faster.
    Empty where a kernel does not look at the whole memory, or there is nothing to compare with."""
    ours = next((name for name in names if name.startswith(OURS)), None)
    baselines = [name for name in TAKING_PART if name in names]
    sizes = [problem.batch * 4**k for k in range(10) if problem.batch * 4**k <= min(LARGEST, problem.memory)]
    if problem.kernel in ("moments", "enqueue") or ours is None or not baselines or not sizes:
        return ""
    faster: dict[int, str] = {}
    for memory in sizes:
        small = replace(problem, memory=memory)
        times = timed([ours, *baselines], small, repeats, copies=1)  # so small a memory stays in the caches
        best = min(baselines, key=lambda name: times[name].ms)
        if times[best].ms < times[ours].ms:
            faster[memory] = f"{best} {times[best].ms:.3f} ms, {ours} {times[ours].ms:.3f} ms"
    measured, who = ", ".join(map(str, sizes)), ", ".join(baselines)
    if not faster:
        return f"crossover: {ours} is faster than {who} at M = {measured}"
    largest = max(faster)
    return f"crossover: one of {who} is faster up to M = {largest} ({faster[largest]}; measured: {measured})"
