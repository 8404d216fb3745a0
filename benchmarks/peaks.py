"""`--kernel memory`: peak extra memory of every loss against a bank, next to pytorch-metric-learning's."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from typing import NamedTuple

import torch

from .comparisons import COMPARISONS, OURS, THEIRS, BankLoss, theirs_installed
from .machine import facts, named
from .memory import available_megabytes, extra_megabytes, in_fresh_process, limit_memory, unless_out_of_memory
from .problem import BankProblem
from .table import Row

LIMIT_MB = 16_000.0
# One class holds a third of the bank: github.com/KevinMusgrave/pytorch-metric-learning/issues/604
SKEWED = BankProblem(batch=64, memory=2048, dim=128, classes=28, majority=0.35)


class Peak(NamedTuple):
    """Of one forward and backward: most memory held besides its inputs, in MB, and the value of the loss."""

    peak_mb: float
    value: float


def run(args: Namespace) -> list[Row]:
    """Prints the table and returns its rows, one for each loss, shape and implementation that is installed."""
    (memory,) = args.memory
    problems = [BankProblem(args.batch, memory, args.dim, args.classes), SKEWED]
    installed = theirs_installed()
    print(
        f"memory: one forward and backward against a bank, float32, peak MB besides z and the bank\n"
        f"{named('cpu', args.threads)}, {THEIRS} {version(THEIRS) if installed else 'not installed'}\n"
    )
    print(" " * 24 + "".join(f"{title(problem):>48}" for problem in problems))
    print(f"{'loss':24}" + f"{OURS:>10}{THEIRS:>25}{'difference':>13}" * len(problems))
    rows: list[Row] = []
    for loss in COMPARISONS:
        print(f"{loss:24}", end="", flush=True)
        for problem in problems:
            limit = min(LIMIT_MB, 0.9 * available_megabytes())
            ours = peak(loss, OURS, problem, args.threads, limit)
            has = COMPARISONS[loss].name is not None
            theirs = peak(loss, THEIRS, problem, args.threads, limit) if installed and has else None
            off = relative_difference(ours, theirs)
            shown = "none" if not has else text(theirs, limit) if installed else "not installed"
            print(f"{text(ours, limit):>10}{shown:>25}{'-' if off is None else f'{off:.1e}':>13}", end="", flush=True)
            for implementation, measured in ((OURS, ours), (THEIRS, theirs))[: 1 + (installed and has)]:
                row: Row = {"implementation": implementation, "kernel": "memory", "loss": loss, **asdict(problem)}
                row |= {"device": "cpu", "dtype": "float32", "limit_mb": limit, **facts(args.threads)}
                # None: more than limit_mb
                rows.append(row | (measured._asdict() if measured else dict.fromkeys(Peak._fields)))
        print()
    print(
        f"\ndifference: of the two values of the loss, relative ({THEIRS} adds 1e-7 inside ntxent's logarithm).\n"
        f"Every number is from a process of its own, held to {LIMIT_MB:,.0f} MB or nine tenths of what is free."
    )
    return rows


def title(problem: BankProblem) -> str:
    skew = f", one {problem.majority:.0%}" if problem.majority else ""
    return f"B={problem.batch} M={problem.memory} D={problem.dim}, {problem.classes} classes{skew}"


def text(measured: Peak | None, limit: float) -> str:
    return f"> {limit:,.0f}" if measured is None else f"{measured.peak_mb:,.1f}"


def relative_difference(ours: Peak | None, theirs: Peak | None) -> float | None:
    if ours is None or theirs is None:
        return None
    return abs(ours.value - theirs.value) / max(abs(theirs.value), torch.finfo(torch.float32).tiny)


def peak(loss: str, implementation: str, problem: BankProblem, threads: int, limit: float) -> Peak | None:
    """Peak of one forward and backward in a fresh process; None if it needs more than `limit` MB."""
    try:
        return in_fresh_process(_measure, loss, implementation, problem, threads, limit)
    except MemoryError:
        return None


def _measure(loss: str, implementation: str, problem: BankProblem, threads: int, limit: float) -> Peak | None:
    torch.set_num_threads(threads)
    criterion = COMPARISONS[loss].make(implementation)
    _forward_backward(criterion, *BankProblem(8, 64, 16, classes=2).tensors())  # loads what libraries load late
    tensors = problem.tensors()
    values: list[float] = []
    limit_memory(limit)
    call = partial(extra_megabytes, lambda: values.append(_forward_backward(criterion, *tensors)))
    megabytes = unless_out_of_memory(call)
    return None if megabytes is None else Peak(megabytes, *values)


def _forward_backward(
    criterion: BankLoss, z: torch.Tensor, labels: torch.Tensor, bank: torch.Tensor, bank_labels: torch.Tensor
) -> float:
    z = z.detach().requires_grad_()
    loss = criterion(z, labels, bank, bank_labels)
    loss.backward()
    return loss.item()
