"""Time by interleaved repeats, memory by the high-water mark of a process of its own."""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import random
import resource
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import quantiles
from typing import TypeVar, cast

import torch

from .implementations import Call, make
from .problem import Problem

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, and the quartiles around it."""

    ms: float
    ms_low: float
    ms_high: float


def interleaved(calls: Mapping[str, Call], problem: Problem, repeats: int) -> dict[str, Timing]:
    """Times the implementations in turn, round after round, so that a busy moment of the machine hits them all; every
    round in another order, so that none always pays for the caches that another leaves behind, and garbage collected
    between rounds only. On CUDA a call ends when the device is done."""
    synchronize = torch.cuda.synchronize if problem.device == "cuda" else lambda: None
    for call in calls.values():  # compile, page in
        for seed in (2, 3):
            call(*problem.embeddings(problem.batch, seed))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    gc.disable()
    for round in range(repeats):
        x, labels = problem.embeddings(problem.batch, seed=100 + round)
        gc.collect()
        for name in order.sample(list(calls), len(calls)):
            synchronize()
            start = time.perf_counter()
            calls[name](x, labels)
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    gc.enable()
    result = {}
    for name, values in seconds.items():
        low, median, high = (
            (1e3 * q for q in quantiles(values, n=4, method="inclusive")) if repeats > 1 else [1e3 * values[0]] * 3
        )
        result[name] = Timing(median, low, high)
    return result


def peak_extra_megabytes(name: str, problem: Problem, threads: int, limit: float = math.inf) -> float | None:
    """Most memory one call holds beyond what was there before it, in MB; None if that is more than `limit`.

    On a CPU in a fresh process. Libraries are warmed up on a tiny problem first (torch.compile on the real one, as it
    compiles for a shape). The measured call is otherwise the first of its size, so nothing it needs is already cached.
    """
    if problem.device == "cuda":
        return _measure_on_cuda(name, problem)
    try:
        return in_fresh_process(_measure, name, problem, threads, limit)
    except MemoryError:
        return None


def _measure(name: str, problem: Problem, threads: int, limit: float) -> float | None:
    torch.set_num_threads(threads)
    warm = problem if name == "compile" else replace(problem, batch=8, memory=64, dim=16, classes=4)
    call = make(name, warm)
    for seed in (2, 3):
        call(*warm.embeddings(warm.batch, seed))
    if warm is not problem:
        call = make(name, problem)
    x, labels = problem.embeddings(problem.batch, seed=4)
    limit_memory(limit)
    return unless_out_of_memory(lambda: extra_megabytes(lambda: call(x, labels)))


def _measure_on_cuda(name: str, problem: Problem) -> float | None:
    try:
        call = make(name, problem)
        x, labels = problem.embeddings(problem.batch, seed=4)
        call(x, labels)  # libraries take a workspace once
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(x, labels)
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return None
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def unless_out_of_memory(measure: Callable[[], T]) -> T | None:
    """What `measure` returns; None if the system lacks the memory for it."""
    try:
        return measure()
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "bad_alloc" in str(error):
            return None
        raise


def in_fresh_process(function: Callable[..., T], *args: object) -> T:
    """`function(*args)`, which must pickle, in a process of its own: forked from one that has only
    imported what is measured, which takes a spawned one seconds.

    Raises:
        MemoryError: the system killed the process, as it does when memory runs out.
        RuntimeError: the function raised, and its traceback is on stderr; or the process died otherwise.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "benchmarks.implementations"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_send_result, args=(theirs, function, args))
    process.start()
    theirs.close()
    try:
        return cast(T, ours.recv())
    except EOFError:
        process.join()
        error = MemoryError if process.exitcode == -signal.SIGKILL else RuntimeError
        raise error(f"{function.__name__}{args} failed with exit code {process.exitcode}") from None
    finally:
        process.join()


def _send_result(result: Connection, function: Callable[..., object], args: tuple[object, ...]) -> None:
    result.send(function(*args))


def extra_megabytes(call: Callable[[], object]) -> float:
    """Most memory `call` holds beyond what this process had before it, in MB. Exact only in a fresh process."""
    before = _reset_peak()
    call()
    return (_peak() - before) / 1e6


def limit_memory(megabytes: float) -> None:
    """Lets this process map so much memory more than it has; an allocation beyond that raises. Linux only."""
    mapped = Path("/proc/self/statm")
    if mapped.exists() and math.isfinite(megabytes):
        limit = int(mapped.read_text().split()[0]) * resource.getpagesize() + int(megabytes * 1e6)
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def available_megabytes() -> float:
    """What the system could give to a process now, in MB; infinite where it does not say."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((int(line.split()[1]) * 1024e-6 for line in lines if line.startswith("MemAvailable")), math.inf)


def _reset_peak() -> int:
    """Forgets the high-water mark where the kernel allows it, and returns the present one in bytes.

    Freed memory goes back to the system first: what is allocated in its place would not count.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    if trim:
        trim(0)
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
