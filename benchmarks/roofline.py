"""How fast a kernel could be on this machine that does all of its work in the dtype of the problem: that work, over
what the machine reaches when it does nothing else, measured in the same run. A kernel that does some of it in fewer
bits, or finds it in the caches, can be faster.

Arithmetic: on a CPU, multiply-adds in registers alone, in the instruction set and on the threads of the kernels
(`torch.mm` is no roof: it may be half of it). On CUDA, `torch.mm` of large matrices, with TF32 for what may use it.
Bandwidth: of main memory, the better of a copy (bytes read and written) and of a sum (bytes read); on CUDA of a copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from xbn_ext import ops

from .implementations import TF32, filled
from .problem import Problem
from .torch_memory import EPS, MEASUREMENT_NOISE, PROCESS_NOISE

BUFFER_BYTES = 256 << 20  # far larger than a CPU's caches, or a GPU's
MM_SIZE = 8192


@dataclass(frozen=True)
class Machine:
    """GFLOP/s in float32, in float64 and of TF32 products (0 where there are none), and GB/s."""

    float32: float
    float64: float
    tf32: float
    gbs: float


class Work(NamedTuple):
    """Floating-point operations, and bytes moved to or from main memory."""

    flop: float
    bytes: float


class Bound(NamedTuple):
    """The least time in milliseconds, and what it is spent on: "FMA", "tensor" (TF32 products) or "memory"."""

    ms: float
    name: str


def measure_machine(device: str, threads: int) -> Machine:
    """Takes about a second."""
    if device == "cpu":
        return Machine(_fma(threads, float64=False), _fma(threads, float64=True), 0.0, _bandwidth("cpu"))
    return Machine(
        _mm(torch.float32, tf32=False),
        _mm(torch.float64, tf32=False),
        _mm(torch.float32, tf32=True),
        _bandwidth("cuda"),
    )


def work_of(problem: Problem, rewrites_bank: bool, pairs: float) -> Work:
    """The work of one call.

    Floating-point operations are those of the products, 2 D for the similarity of every pair and 2 D for the gradient
    of each of the `pairs` per anchor that have a weight; elsewhere those of the formulas. Bytes are of the bank, read
    once and, if it is rewritten, written once in the same pass; of its labels; and of the batch and its gradient. A
    step's own batch adds its similarities.
    """
    B, M, D = problem.batch, problem.memory, problem.dim
    bank, batch = M * D * problem.dtype.itemsize, B * D * problem.compute.itemsize
    if problem.kernel == "moments":
        return Work(3 * B * D, batch)
    if problem.kernel == "transform":
        return Work(2 * M * D, 2 * bank)
    stored = B * D * problem.dtype.itemsize + 8 * B
    if problem.kernel == "enqueue":
        return Work(0, batch + 8 * B + stored)
    loss = Work(2 * B * D * (M + pairs), bank + 8 * M + 2 * batch + 8 * B)
    if problem.kernel == "loss":
        return loss
    return Work(
        loss.flop + 2 * B * B * D + (2 * M * D if rewrites_bank else 0),
        loss.bytes + stored + (bank if rewrites_bank else 0),
    )


def bound_of(work: Work, machine: Machine, problem: Problem, name: str) -> Bound:
    """The least time that `work` takes this machine in the arithmetic of the implementation `name`."""
    tf32 = name.endswith((TF32, " tensor")) and machine.tf32 > 0
    peak = machine.tf32 if tf32 else machine.float64 if problem.compute == torch.float64 else machine.float32
    if name.endswith(" tensor"):
        peak /= 3  # products in TF32 for one to the digits of float32
    arithmetic, memory = 1e-6 * work.flop / peak, 1e-6 * work.bytes / machine.gbs
    return Bound(memory, "memory") if memory > arithmetic else Bound(arithmetic, "tensor" if tf32 else "FMA")


def weighted_pairs(problem: Problem) -> float:
    """How many pairs of an anchor with the bank have a weight, on average, in the first call; 0 where nothing ranks."""
    if problem.kernel not in ("loss", "step"):
        return 0.0
    x, labels = problem.embeddings(problem.batch, seed=5)
    m = filled(problem)
    if problem.kernel == "step" and problem.drift != "none":
        ops.track_(
            m.target_mean, m.target_std, m.variance, m.scale, m.shift, x, None, m.sums, m.count, PROCESS_NOISE,
            MEASUREMENT_NOISE, None, EPS,
        )  # fmt: skip
    _, pairs = ops.memory_loss_and_pairs(
        x, labels, m.bank, m.bank_labels, problem.pair_loss, count=m.count, scale=m.scale, shift=m.shift
    )
    return float(pairs.sum())


def _fma(threads: int, float64: bool) -> float:
    """GFLOP/s."""
    flop, _ = torch.ops.xbn_ext._peak_fma(threads, 1 << 20, float64)
    seconds = _shortest(lambda: torch.ops.xbn_ext._peak_fma(threads, 1 << 20, float64), "cpu", 40)
    return 1e-9 * float(flop) / seconds


def _mm(dtype: torch.dtype, tf32: bool) -> float:
    """GFLOP/s."""
    a, b = (torch.randn(MM_SIZE, MM_SIZE, device="cuda").to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    seconds = _shortest(lambda: torch.mm(a, b, out=out), "cuda", 10)
    torch.backends.cuda.matmul.allow_tf32 = before
    return 2e-9 * MM_SIZE**3 / seconds


def _bandwidth(device: str) -> float:
    """GB/s."""
    source = torch.zeros(BUFFER_BYTES // 4, device=device)
    target = torch.zeros_like(source)
    copy = 2 * BUFFER_BYTES / _shortest(lambda: target.copy_(source), device, 20)
    read = 0.0 if device == "cuda" else BUFFER_BYTES / _shortest(lambda: source.sum(), device, 20)
    return 1e-9 * max(copy, read)


def _shortest(call: Callable[[], object], device: str, repeats: int) -> float:
    """Seconds, of the fastest of several runs."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    call()
    best = float("inf")
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        best = min(best, time.perf_counter() - start)
    return best
