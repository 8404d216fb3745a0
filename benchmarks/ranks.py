"""What a memory of many processes costs: a step of W of them, here, by gloo, and of one with the same whole batch; or,
with --plan, bytes and least time of a step by W, on a machine whose rates you give. With --shards the memory is cut.

    python -m benchmarks.ranks --ranks 2
    python -m benchmarks.ranks --plan --shards 8 --flops 99e12 --bandwidth 3e12 --link 360e9 --latency 15e-6
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
from xbn_ext import shared_batch_loss
from xbn_ext.dtypes import is_narrow

from . import machine
from .clock import Timer
from .comparisons import COMPARISONS
from .problem import DTYPES, Problem
from .roofline import Work, work_of
from .table import aligned

HOST = 8 * 8  # bytes that the hosts of two ranks tell each other; nothing with a batch_size on GPUs
OF_ROW = 3 * 8  # label, id, mask
TOTALS = 7 * 8  # the sums over a rank's anchors
COLLECTIVES = 4  # the hosts' one, of the embeddings, of what goes with them, of the totals
OF_SLOT = 4 * 8  # the sums of an anchor
IN_COMMON = 2 * 8  # what a rank adds to what all anchors are given
OF_SHARD = 5 * 8  # of each dimension: what the stored rows add up to, and what changed


def received(
    ranks: int, batch: int, dim: int, itemsize: int = 4, shards: int = 1, loss: xbn_ext.PairLoss | None = None,
    divides_batch: bool = False,
) -> int:  # fmt: skip
    """Bytes that a rank receives in a step at most: of each other `batch` rows, what goes with them, totals; where the
    loss of the batch against itself is divided, too, its totals and a gradient of the rank's rows; of each other shard
    the own rows' sums, pass by pass, their gradient, what that is multiplied by, and the memory's sums."""
    loss = loss or xbn_ext.Contrastive()
    passes = loss.passes
    of_anchor = sum(map(len, passes)) * OF_SLOT + (len(passes) + 1) * 8 + dim * itemsize
    of_batch = TOTALS + 4 * batch * dim if divides_batch else 0
    of_loss = TOTALS + (IN_COMMON if loss.gives_in_common else 0)
    of_all = (ranks - 1) * (batch * (dim * itemsize + OF_ROW) + OF_ROW + HOST + of_loss + of_batch)
    return of_all + (shards - 1) * (batch * of_anchor + dim * OF_SHARD)


def collectives(shards: int, loss: xbn_ext.PairLoss, divides_batch: bool = False) -> int:
    """How many a step takes: of shards two more for each pass, one of the gradient, one of the memory's sums; two of a
    batch whose own loss is divided; one of what all anchors are given in common."""
    of_shards = 2 * len(loss.passes) + 2 if shards > 1 else 0
    return COLLECTIVES + of_shards + (2 if divides_batch else 0) + int(loss.gives_in_common)


def share(problem: Problem, ranks: int, shards: int = 1) -> Work:
    """What one of so many ranks cannot do without: the rows of all that share a memory with it, `problem.batch` of
    each, against its block of that; and all else of a step for the whole batch."""
    block = replace(problem, memory=-(-problem.memory // shards), batch=shards * problem.batch)
    pairs = block.density * block.memory
    whole = replace(block, batch=ranks * problem.batch)
    rewrites = not is_narrow(problem.dtype)  # a memory of 16 bits keeps its map pending
    step = work_of(replace(whole, kernel="step"), rewrites, pairs)
    theirs, own = (work_of(replace(p, kernel="loss"), False, pairs) for p in (whole, block))
    flop = step.flop - theirs.flop + own.flop
    if divides_batch(problem, ranks):
        flop -= 2 * (whole.batch - problem.batch) * whole.batch * problem.dim
    return Work(flop, step.bytes - theirs.bytes + own.bytes, rewrites)


def divides_batch(problem: Problem, ranks: int) -> bool:
    """Whether GPUs would divide the loss of the batch against itself."""
    whole = ranks * problem.batch
    if problem.pair_loss.gives_in_common:
        return False
    return shared_batch_loss.saved(whole, problem.batch, problem.dim) >= shared_batch_loss.LEAST_SAVED_ON_A_GPU


def plan(problem: Problem, ranks: list[int], rates: argparse.Namespace) -> list[str]:
    """Bytes and least times of a step by the number of ranks, each with `problem.batch` rows of the whole batch.

    A step is a rank's `share`, at so many FLOP/s and bytes/s. Besides it, the exchange: a latency for each collective,
    and what is received at the rate of a link. There are `rates.shards` of the memory, or one on each rank.
    """
    table = [["W", "shards", "rows", "received MB", "exchange ms", "step ms", "memory GB"]]
    for W in ranks:
        shards = min(W, rates.shards)
        work, loss, divides = share(problem, W, shards), problem.pair_loss, divides_batch(problem, W)
        number = received(W, problem.batch, problem.dim, shards=shards, loss=loss, divides_batch=divides)
        exchange = 0.0 if W == 1 else collectives(shards, loss, divides) * rates.latency + number / rates.link
        step = max(work.flop / rates.flops, work.bytes / rates.bandwidth)
        memory = -(-problem.memory // shards) * (problem.dim * problem.dtype.itemsize + 24)
        values = (1e-6 * number, 1e3 * exchange, 1e3 * step, 1e-9 * memory)
        table.append([str(W), str(shards), f"{W * problem.batch:,}", *(f"{value:.4g}" for value in values)])
    return aligned(table)


def measure(problem: Problem, ranks: int, shards: int, repeats: int, threads: int) -> list[dict[str, Any]]:
    """Milliseconds of a step: of W processes, with copies of the memory and, if there are several, with shards, of its
    first exchange, and of one process with the whole batch."""
    with tempfile.TemporaryDirectory() as folder:
        store, result = Path(folder, "store"), Path(folder, "result")
        spawn(_rank, (problem, ranks, shards, repeats, threads, store, result), nprocs=ranks)
        rows: list[dict[str, Any]] = json.loads(result.read_text())
    return rows


def _rank(
    rank: int, problem: Problem, W: int, shards: int, repeats: int, threads: int, store: Path, result: Path
) -> None:
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
    if shards > 1:
        cut = _criterion(problem, dist.group.WORLD, shards)
        rows.append(_row(f"{W} processes, {shards} shards", parts, repeats, lambda x, labels: step(cut, x, labels)))
    rows.append(_row(f"{W} processes, the first exchange alone", parts, repeats, exchange))
    dist.barrier()
    if rank == 0:  # the others are idle
        rows.append(_row("one process, whole batch", batches, repeats, lambda x, labels: step(alone, x, labels)))
        result.write_text(json.dumps(rows))
    dist.destroy_process_group()


def _criterion(problem: Problem, group: Any, shards: int = 1) -> xbn_ext.CrossBatchMemory:
    criterion = xbn_ext.CrossBatchMemory(
        problem.pair_loss, problem.dim, problem.memory, drift=problem.drift, process_group=group, shards=shards,
        memory_dtype=problem.dtype,
    )  # fmt: skip
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
    parser.add_argument("--shards", type=int, default=1, metavar="S", help="of the memory (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="rows of each process (%(default)s)")
    parser.add_argument("--memory", type=int, default=65536, help="rows of the memory (%(default)s)")
    parser.add_argument("--dim", type=int, default=512, help="dimension (%(default)s)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the memory (%(default)s)")
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
    its = {name: getattr(args, name) for name in ("batch", "memory", "dim", "loss")}
    problem = Problem(**its, dtype=DTYPES[args.dtype])
    of_memory = f"memory {args.memory:,} x {args.dim} {args.dtype}"
    print(f"{args.batch} rows a process, {of_memory}, {problem.loss}, {problem.drift}")
    if args.plan:
        print("\n".join(plan(problem, args.ranks or [2**k for k in range(7)], args)))
        return
    rows = []
    for W in args.ranks or [2]:
        threads = max(1, cores() // W)
        number = received(W, args.batch, args.dim, shards=args.shards, loss=problem.pair_loss)
        print(f"\n{W} processes of {threads} threads; a rank receives {number:,} bytes a step")
        measured = measure(problem, W, args.shards, args.repeats, threads)
        table = [
            [row["what"], f"{row['ms']:.3g} ms", f"{row['ms_low']:.3g} - {row['ms_high']:.3g}"] for row in measured
        ]
        print("\n".join(aligned([["", "median", "quartiles"], *table])))
        its |= {"ranks": W, "shards": args.shards, "dtype": args.dtype, "machine": machine.named("cpu", threads)}
        rows += [its | row for row in measured]
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
