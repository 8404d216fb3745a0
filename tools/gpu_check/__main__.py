"""Command line: which stages run, in what order, and how long each may take."""

from __future__ import annotations

import argparse
import datetime
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.table import Row
from xbn_ext.options import WAYS

from . import build, counters, sanitizers
from .report import Report
from .run import ROOT, Runner, find_toolkit, run_worker

STAGES = ["truth", "timing", "counters", "baselines"]
SMALL_TRUTH = 60  # cases on a CPU


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description="Checks the kernels on a GPU.")
    parser.add_argument("--stages", default=",".join(STAGES), metavar="NAME,…", help=f"of {', '.join(STAGES)} (all)")
    parser.add_argument("--ways", default="", metavar="NAME,…", help="ways of the loss to time (all that there are)")
    parser.add_argument("--every-test", action="store_true", help="of the project's, not the usual selection")
    parser.add_argument("--seconds", type=float, default=290, help="after which no stage begins (290)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR",
                        help="where the JSON file goes (benchmarks/results)")  # fmt: skip
    parser.add_argument("--revision", default=None, help="of the sources, where git cannot tell")
    # Not for users: a dry run of what needs no GPU, and what this program starts itself with.
    for name in ("--device", "--worker", "--job", "--rows", "--sanitize"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.stages = [name for name in args.stages.split(",") if name]
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"--stages: no stage is called {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    args.ways = [name for name in args.ways.split(",") if name]
    if unknown := set(args.ways) - set(WAYS):
        parser.error(f"--ways: no way is called {', '.join(sorted(unknown))}; there are {', '.join(WAYS)}")
    if not 0 < args.seconds < math.inf:
        parser.error(f"--seconds {args.seconds:g}: must be more than 0, and finite")
    there = next(folder for folder in (args.out, *args.out.absolute().parents) if folder.exists())
    if not there.is_dir():
        parser.error(f"--out {args.out}: {there} exists and is not a folder")
    return args


def truth(runner: Runner, every: bool) -> None:
    """What times nothing runs side by side."""
    gpu = runner.device == "cuda"
    find_truth = partial(
        runner.work, "truth", ".truth:worker", correctness=True, limit=120, n=400 if gpu else SMALL_TRUTH
    )
    if not gpu:
        find_truth()
        return
    build.registers(runner)
    runner.together(
        find_truth,
        partial(build.tests, runner, every, limit=130),
        *(partial(sanitizers.sanitize, runner, tool, limit=100) for tool in sanitizers.CASES_OF),
    )


def timing(runner: Runner, report: Report, ways: list[str]) -> None:
    runner.work("timing", ".timing:worker", limit=120, groups=["loss", "bank", "step", "launches", "rules"], ways=ways,
                ceilings=report.ceilings)  # fmt: skip


def baselines(runner: Runner, report: Report) -> None:
    """Compiling comes last: it is slow and cannot be interrupted."""
    groups = ["loss of torch", "step of torch", *(["compile"] if runner.device == "cuda" else [])]
    runner.work("baselines", ".timing:worker", groups=groups, ceilings=report.ceilings)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.worker:
        run_worker(args.worker, args.job, args.rows)
        return 0
    if args.sanitize:
        sanitizers.drive(args.sanitize)
        return 0
    if args.count:
        counters.drive()
        return 0
    return check(args)


def check(args: argparse.Namespace) -> int:
    """Runs the stages and prints their tables last. Returns the exit code: 1 if anything was wrong, 2 without a GPU."""
    find_toolkit()
    report = Report(args.out, datetime.date.today().isoformat(), args.revision or revision())
    runner = Runner(args.device or "cuda", args.seconds, report.add)
    machine = runner.work("machine", ".device:worker", limit=60)
    facts: Row = next((row for row in machine.rows if "device" in row), {})
    if not facts:
        print(f"no GPU can be used: {machine.note}", file=sys.stderr)
        return 2
    report.describe(facts)
    if runner.device == "cuda" and build.library(runner, facts).status != "ok":
        return 1
    stages: dict[str, Callable[[], object]] = {
        "truth": partial(truth, runner, args.every_test),
        "timing": partial(timing, runner, report, args.ways),
        "counters": partial(counters.count, runner),
        "baselines": partial(baselines, runner, report),
    }
    for name in STAGES:
        if name in args.stages:
            stages[name]()
    print(report.table())
    wrong, skipped = report.wrong(), report.skipped()
    print(f"\n{report.file.name} written; " + (f"WRONG: {', '.join(wrong)}" if wrong else "nothing was found wrong"))
    if skipped:
        print(f"skipped, and so not checked: {', '.join(skipped)}")
    return 1 if wrong else 0


def revision() -> str | None:
    """Of the sources, with a + if they have been changed since; None where git cannot tell."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
