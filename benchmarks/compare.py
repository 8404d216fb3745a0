"""Every kernel except `--kernel memory`: all implementations of it, timed in one run, as a table and as rows."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import torch

from .comparisons import OURS
from .crossover import crossover
from .implementations import DEFERRED, ON_CUDA, rewrites_bank, timed, weighted_pairs, why_not
from .machine import facts
from .memory import available_megabytes, peak_extra_megabytes
from .options import Options
from .problem import DTYPES, Problem
from .roofline import Machine, bound_of, shares, work_of
from .table import HEADER, Row, line
from .truth import errors


def compare(options: Options, machine: Machine, threads: int) -> list[Row]:
    """Measures one case, prints its table as it goes along, and returns its rows: one for each memory size and
    implementation. What needs more memory than there is has a row without numbers."""
    problems = [_problem(options, memory) for memory in options["memory"]]
    names = _taking_part(options, problems[0])
    print(f"\n{title(problems[0], threads)}\n{HEADER}")
    rows: list[Row] = []
    for problem in problems:
        rows += _rows(problem, names, options["repeats"], machine, threads)
    note = crossover(problems[-1], names, options["repeats"])
    if note:
        print(note)
    return rows


def title(problem: Problem, threads: int) -> str:
    rows = f"rows of {Path(problem.rows).name}" if problem.rows else f"density {100 * problem.density:g} %"
    on = f"{threads} thread{'s' * (threads > 1)}" if problem.device == "cpu" else problem.device
    ranks = f" {problem.loss}," if problem.kernel in ("loss", "step") else ""
    step = f" drift {problem.drift}," if problem.kernel == "step" else ""
    return (
        f"{problem.kernel}:{ranks}{step} {str(problem.dtype).removeprefix('torch.')}, {on}, "
        f"B={problem.batch} D={problem.dim}, {rows}, {problem.classes} classes"
    )


def _problem(options: Options, memory: int) -> Problem:
    names = ("kernel", "batch", "dim", "classes", "loss", "drift", "device", "density", "rows")
    return Problem(memory=memory, dtype=DTYPES[options["dtype"]], **{name: options[name] for name in names})


def _taking_part(options: Options, problem: Problem) -> list[str]:
    """Those of `--only` and `--update` that can; says which cannot, and why."""
    update, names = options["update"], []
    for name in options["only"]:
        if (name in ON_CUDA and problem.device == "cpu") or (problem.kernel == "step" and _other_update(name, update)):
            continue
        reason = why_not(name, problem)
        if reason is None:
            names.append(name)
        elif reason.startswith(("is not", "cannot")):
            print(f"left out: {name} {reason}")
    return names


def _other_update(name: str, update: str) -> bool:
    return name.startswith(OURS) and update == ("inplace" if name == DEFERRED else "deferred")


def _rows(problem: Problem, names: list[str], repeats: int, machine: Machine, threads: int) -> list[Row]:
    limit = 0.9 * available_megabytes() if problem.device == "cpu" else math.inf
    peaks = {name: peak_extra_megabytes(name, problem, threads, limit) for name in names}
    fitting = [name for name in names if peaks[name] is not None]
    torch.compiler.reset()  # it gives up on a function that it has compiled for eight shapes
    off = errors(problem, fitting)
    times = timed(fitting, problem, repeats, problem.cold_copies)
    pairs = weighted_pairs(problem)
    active = 100 * pairs / problem.memory if problem.kernel in ("loss", "step") else None
    base = next((times[name].ms for name in fitting if name.startswith(OURS)), None)
    rows = []
    for name in names:
        work, timing = work_of(problem, rewrites_bank(name, problem), pairs), times.get(name)
        row = _row(name, problem, threads) | (asdict(timing) if timing else dict.fromkeys(("ms", "ms_low", "ms_high")))
        row |= shares(work, bound_of(work, machine, problem, name), timing)
        row |= {"peak_mb": peaks[name], "error": off.get(name), "pairs": pairs, "active": active, "machine": machine}
        print(line(row, base), flush=True)
        rows.append(row)
    return rows


def _row(name: str, problem: Problem, threads: int) -> Row:
    row: Row = {"implementation": name, **asdict(problem), "dtype": str(problem.dtype).removeprefix("torch.")}
    if problem.rows:
        row |= {"rows": Path(problem.rows).name, "density": None}
    if problem.kernel not in ("loss", "step"):
        row["loss"] = None
    if problem.kernel != "step":
        row["drift"] = None
    return row | facts(threads)
