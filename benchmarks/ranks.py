"""What a memory of many processes costs: a step of W of them, here, by gloo, and of one with the same whole batch; or,
with --plan, bytes and least time of a step by W, on a machine whose rates you give.

    python -m benchmarks.ranks --ranks 2
    python -m benchmarks.ranks --plan --flops 99e12 --bandwidth 3e12 --link 360e9 --latency 15e-6
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

import xbn_ext
from train.cores import cores

from . import machine
from .clock import Timer
from .comparisons import COMPARISONS
from .problem import Problem
from .roofline import Work, work_of
from .table import aligned

HOST = 6 * 8  # bytes that the hosts of two ranks tell each other
OF_ROW = 3 * 8  # label, id, mask
TOTALS = 7 * 8  # the sums over a rank's anchors
COLLECTIVES = 4  # the hosts' one, of the embeddings, of what goes with them, of the totals


def received(ranks: int, batch: int, dim: int, itemsize: int = 4, divides_batch: bool = False) -> int:
    """Bytes that a rank receives in a step: of each other `batch` rows, what goes with them, totals; and if the loss of
    the batch against itself is divided, too, its totals and a gradient of the rank's rows."""
    of_batch = TOTALS + 4 * batch * dim if divides_batch else 0
    return (ranks - 1) * (batch * (dim * itemsize + OF_ROW) + OF_ROW + HOST + TOTALS + of_batch)


def share(problem: Problem, ranks: int) -> Work:
    """What one of so many ranks cannot do without: its own `problem.batch` rows against the memory, and all else of a
    step for the whole batch."""
    pairs = problem.density * problem.memory
    whole = replace(problem, batch=ranks * problem.batch)
    step = work_of(replace(whole, kernel="step"), True, pairs)
    theirs, own = (work_of(replace(p, kernel="loss"), False, pairs) for p in (whole, problem))
    return Work(step.flop - theirs.flop + own.flop, step.bytes - theirs.bytes + own.bytes, True)


def plan(problem: Problem, ranks: list[int], rates: argparse.Namespace) -> list[str]:
    """Bytes and least times of a step by the number of ranks, each with `problem.batch` rows of the whole batch.

    A step is a rank's `share`, at so many FLOP/s and bytes/s. Besides it, the exchange: a latency for each collective,
    and what is received at the rate of a link.
    """
    table = [["W", "rows", "received MB", "exchange ms", "step ms", "memory GB"]]
    for W in ranks:
        work = share(problem, W)
        number = received(W, problem.batch, problem.dim)
        exchange = 0.0 if W == 1 else COLLECTIVES * rates.latency + number / rates.link
        step = max(work.flop / rates.flops, work.bytes / rates.bandwidth)
        memory = problem.memory * (problem.dim * problem.dtype.itemsize + 24)
        values = (1e-6 * number, 1e3 * exchange, 1e3 * step, 1e-9 * memory)
        table.append([str(W), f"{W * problem.batch:,}", *(f"{value:.4g}" for value in values)])
    return aligned(table)


def measure(problem: Problem, ranks: int, repeats: int, threads: int) -> list[dict[str, Any]]:
    """Milliseconds of a step: of W processes, of its first exchange, and of one process with the whole batch."""
    with tempfile.TemporaryDirectory() as folder:
        store, result = Path(folder, "store"), Path(folder, "result")
        spawn(_rank, (problem, ranks, repeats, threads, store, result), nprocs=ranks)
        rows: list[dict[str, Any]] = json.loads(result.read_text())
    return rows


def _rank(rank: int, problem: Problem, W: int, repeats: int, threads: int, store: Path, result: Path) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=W)
    batches = [replace(problem, batch=W * problem.batch).round(number) for number in range(4)]
    parts = [(x.tensor_split(W)[rank], labels.tensor_split(W)[rank]) for x, labels in batches]
    shared, alone = (_criterion(problem, group) for group in (dist.group.WORLD, None))
    ranks: Any = shared._ranks

    def step(criterion: xbn_ext.CrossBatchMemory, x: Tensor, labels: Tensor) -> None:
        criterion(x.requires_grad_(), labels).backward()
        x.grad = None

    def exchange(x: Tensor, labels: Tensor) -> None:
        ranks.gather(lambda: xbn_ext.distributed.Batch(x, labels), shared.step, True, dict)

    rows = []
    for what, memory, batch in (
        ("each ranks its own rows", 0, sys.maxsize),
        ("also against the batch", 0, 0),
        ("all rank all rows", sys.maxsize, sys.maxsize),
    ):
        xbn_ext.shared_step.LEAST_SAVED, xbn_ext.shared_batch_loss.LEAST_SAVED = memory, batch
        rows.append(_row(f"{W} processes, {what}", parts, repeats, lambda x, labels: step(shared, x, labels)))
    rows.append(_row(f"{W} processes, the first exchange alone", parts, repeats, exchange))
    dist.barrier()
    if rank == 0:  # the others are idle
        rows.append(_row("one process, whole batch", batches, repeats, lambda x, labels: step(alone, x, labels)))
        result.write_text(json.dumps(rows))
    dist.destroy_process_group()


def _criterion(problem: Problem, group: Any) -> xbn_ext.CrossBatchMemory:
    criterion = xbn_ext.CrossBatchMemory(
        problem.pair_loss, problem.dim, problem.memory, drift=problem.drift, process_group=group
    )
    rows, labels = problem.stored()
    criterion.fill_from([(rows, labels)] if group is None or dist.get_rank() == 0 else [])
    return criterion


def _row(name: str, batches: list[tuple[Tensor, Tensor]], repeats: int, call: Callable[..., None]) -> dict[str, Any]:
    in_turn = cycle(batches)
    timer = Timer([lambda: call(*next(in_turn))])
    timing = timer.timing(timer.run(repeats))
    return {"what": name, "ms": timing.ms, "ms_low": timing.ms_low, "ms_high": timing.ms_high}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ranks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", metavar="W", help="processes (2; of a plan 1 2 4 … 64)")
    parser.add_argument("--batch", type=int, default=64, help="rows of each process (%(default)s)")
    parser.add_argument("--memory", type=int, default=65536, help="rows of the memory (%(default)s)")
    parser.add_argument("--dim", type=int, default=512, help="dimension (%(default)s)")
    parser.add_argument("--loss", choices=list(COMPARISONS), default="contrastive", help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=31, help="timed steps (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there")
    parser.add_argument("--plan", action="store_true", help="measure nothing: compute, with these")
    for name, default, words in (
        ("flops", 99e12, "FLOP/s of the loss against the memory"),
        ("bandwidth", 3e12, "bytes/s of a process's main memory"),
        ("link", 360e9, "bytes/s that a process receives"),
        ("latency", 15e-6, "seconds of a collective"),
    ):
        parser.add_argument(f"--{name}", type=float, default=default, help=f"{words} (%(default)s)")
    args = parser.parse_args(arguments)
    problem = Problem(batch=args.batch, memory=args.memory, dim=args.dim, loss=args.loss)
    print(f"{args.batch} rows a process, memory {args.memory:,} x {args.dim}, {problem.loss}, {problem.drift}")
    if args.plan:
        print("\n".join(plan(problem, args.ranks or [2**k for k in range(7)], args)))
        return
    rows = []
    for W in args.ranks or [2]:
        threads = max(1, cores() // W)
        print(
            f"\n{W} processes of {threads} threads; a rank receives {received(W, args.batch, args.dim):,} bytes a step"
        )
        measured = measure(problem, W, args.repeats, threads)
        table = [
            [row["what"], f"{row['ms']:.3g} ms", f"{row['ms_low']:.3g} - {row['ms_high']:.3g}"] for row in measured
        ]
        print("\n".join(aligned([["", "median", "quartiles"], *table])))
        shape = {name: getattr(args, name) for name in ("loss", "batch", "memory", "dim")}
        rows += [{"ranks": W, **shape, **row, "machine": machine.named("cpu", threads)} for row in measured]
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
