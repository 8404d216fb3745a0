"""How fast a kernel could be on this machine that does all of its work in the dtype of the problem: that work, over
what the machine reaches when it does nothing else, measured in the same run. A kernel that does some of it in fewer
bits, or finds it in the caches, can be faster.

Arithmetic: on a CPU, multiply-adds in registers alone, in the instruction set and on the threads of the kernels
(`torch.mm` is no roof: it may be half of it). On CUDA, and without the compiled library, `torch.mm` of large matrices;
with TF32 for what may use it. Bandwidth: of main memory, `copy` for what writes as much as it reads (both are
counted), else `read`, a sum, if that is faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from xbn_ext import build_info

from .clock import Call, Timing, timer
from .problem import Problem
from .table import Row

CEILINGS = {
    "cpu": ["read", "copy", "float32", "float64"],
    "cuda": ["read", "copy", "float32", "tf32", "float64"],
}
BUFFER_BYTES = {"cpu": 256 << 20, "cuda": 4 * 10**9}  # far larger than the caches
MM_SIZE = {"cpu": 2048, "cuda": 8192}
SECONDS = 0.2  # for each ceiling

Machine = dict[str, float]  # by ceiling, GB/s or GFLOP/s


class Work(NamedTuple):
    """Floating-point operations; bytes moved to or from main memory, and whether half of these are written."""

    flop: float
    bytes: float
    rewrites: bool = False


class Bound(NamedTuple):
    """The least time in milliseconds, and what it is spent on: "FMA", "tensor" (TF32 products) or "memory"."""

    ms: float
    name: str


# --- What the machine can do ----------------------------------------------------------------------------------------


def measure_machine(device: str, threads: int) -> Machine:
    """Takes seconds."""
    return {name: ceiling(name, device, threads) for name in CEILINGS[device]}


def ceiling(name: str, device: str, threads: int) -> float:
    """The best that the machine shows in some repeats."""
    if name in ("read", "copy"):
        size = BUFFER_BYTES[device]
        source = torch.zeros(size // 4, device=device)
        if name == "read":
            return _rate(size, lambda: torch.sum(source), device)
        target = torch.zeros_like(source)
        if device == "cpu":
            return _rate(2 * size, lambda: target.copy_(source), device)
        # By a kernel: what a GPU copies in a graph without one is slower by a third.
        return _rate(2 * size, lambda: torch.mul(source, 2, out=target), device)
    if device == "cpu" and build_info()["native"]:
        fma = torch.ops.xbn_ext._peak_fma
        flop, _ = fma(threads, 1 << 20, name == "float64")
        return _rate(flop, lambda: fma(threads, 1 << 20, name == "float64"), device)
    n = MM_SIZE[device]
    dtype = torch.float64 if name == "float64" else torch.float32
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    with tf32_products(name == "tf32"):
        return _rate(2 * n**3, lambda: torch.mm(a, b, out=out), device)


def _rate(amount: float, call: Call, device: str) -> float:
    return float(f"{1e-9 * amount / min(timer([call], device).run_for(SECONDS)):.4g}")


@contextmanager
def tf32_products(wanted: bool) -> Iterator[None]:
    """Lets library products of float32 on CUDA round to TF32, or not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if wanted else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# --- What a call has to do ------------------------------------------------------------------------------------------


def work_of(problem: Problem, rewrites_bank: bool, pairs: float) -> Work:
    """What no implementation of one call can do without.

    Floating-point operations are those of the products, 2 D for the similarity of every pair and 2 D for the gradient
    of each of the `pairs` per anchor that have a weight; elsewhere those of the formulas. Every pair counts the same,
    though a contrastive loss may tell from fewer bits that it has no weight. Bytes are of the bank, read
    once and, if it is rewritten, written once in the same pass; of its labels; and of the batch and its gradient. A
    step's own batch adds its similarities.
    """
    B, M, D = problem.batch, problem.memory, problem.dim
    bank, batch = M * D * problem.dtype.itemsize, B * D * problem.compute.itemsize
    stored = B * D * problem.dtype.itemsize + 8 * B
    match problem.kernel:
        case "normalize":
            return Work(3 * B * D, 2 * batch, True)
        case "moments" | "track":
            return Work(3 * B * D, batch)
        case "transform":
            return Work(2 * M * D, 2 * bank, True)
        case "standardize":  # nothing to do: a look at the sums
            return Work(0, 16 * D)
        case "enqueue":
            return Work(0, batch + 8 * B + stored, True)
        case "batch_loss":
            return Work(2 * B * D * (B + pairs), 2 * batch + 8 * B)
    loss = Work(2 * B * D * (M + pairs), bank + 8 * M + 2 * batch + 8 * B)
    if problem.kernel == "loss":
        return loss
    return Work(
        loss.flop + 2 * B * B * D + (2 * M * D if rewrites_bank else 0),
        loss.bytes + stored + (bank if rewrites_bank else 0),
        rewrites_bank,
    )


def bound_of(work: Work, machine: Machine, problem: Problem, name: str) -> Bound:
    """The least time that `work` takes this machine in the arithmetic of the implementation `name`."""
    words = name.split()
    tensor = "tensor" in words  # three products in TF32 for one to the digits of float32
    tf32 = ("tf32" in words or tensor) and "tf32" in machine
    peak = machine["tf32"] if tf32 else machine["float64" if problem.compute == torch.float64 else "float32"]
    arithmetic = 1e-6 * work.flop / (peak / 3 if tensor and tf32 else peak)
    memory = 1e-6 * work.bytes / (machine["copy"] if work.rewrites else max(machine["read"], machine["copy"]))
    return Bound(memory, "memory") if memory > arithmetic else Bound(arithmetic, "tensor" if tf32 else "FMA")


def shares(work: Work, bound: Bound | None, timing: Timing | None) -> Row:
    """Of a row: rates, None without a time; and the share of the roof in %, if that is known."""
    ms = timing and timing.ms
    row: Row = {"gflops": ms and 1e-6 * work.flop / ms, "gbs": ms and 1e-6 * work.bytes / ms}
    return row | ({"roofline": ms and 100 * bound.ms / ms, "bound": bound.name, "bound_ms": bound.ms} if bound else {})
