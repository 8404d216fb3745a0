"""Peak memory of a call: on a CPU by the high-water mark of a process of its own, on a GPU by torch's allocator."""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar, cast

import torch

from .implementations import make
from .problem import Problem

T = TypeVar("T")


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
    warm = (
        problem
        if name == "compile"
        else replace(problem, batch=8, memory=64, dim=16, classes=4, density=0.0, rows=None)
    )
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
        return peak_on_cuda(lambda: call(x, labels))
    except torch.OutOfMemoryError:
        return None


def peak_on_cuda(call: Callable[[], object]) -> float:
    """Most device memory that `call` holds beyond what was there before it, in MB."""
    call()  # libraries take a workspace once
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)


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
