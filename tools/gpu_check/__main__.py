"""Command line: which parts run, and in which order what comes in each."""

from __future__ import annotations

import argparse
import datetime
import sys
from functools import partial
from pathlib import Path

import torch

from . import build, counters, sanitizers
from .report import Report
from .run import ROOT, Row, Runner, Section, find_toolkit, run_worker

SMALL_TRUTH = 60  # cases on a CPU
START = 10  # seconds until a process has imported torch and made a context


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description="Checks the kernels on a GPU.")
    parser.add_argument("--part", choices=["A", "B", "C", "all"], default="all",
                        help="A: build, truth, sanitizers; B: timings; C: hardware counters (all)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR",
                        help="where the JSON file goes (benchmarks/results)")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=9.5, help="longest time for a part (9.5)")
    # Not for users: a dry run of what needs no GPU, and what this program starts itself with.
    for name in ("--device", "--worker", "--job", "--rows", "--sanitize", "--profile"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def part_a(runner: Runner, facts: Row) -> None:
    """What times nothing runs side by side once the library is built."""
    gpu = runner.device == "cuda"
    runner.work("ceilings", ".device:ceilings", limit=60)
    if gpu:
        if build.build(runner, facts["capability"]).status != "ok":
            return
        build.registers(runner)
    n = 400 if gpu else SMALL_TRUTH
    find_truth = partial(runner.work, "truth", ".truth:worker", correctness=True, limit=240, n=n)
    if not gpu:
        find_truth()
        return
    runner.together(
        find_truth,
        partial(build.tests, runner, "tests", build.TESTS, limit=300),
        partial(build.tests, runner, "long tests", build.LONG_TESTS, limit=240),
        *(partial(sanitizers.sanitize, runner, tool, limit=200) for tool in sanitizers.CASES_OF),
    )


def have_library(runner: Runner, facts: Row) -> bool:
    """Builds it where part A has not."""
    if runner.device == "cpu" or build.is_built(runner):
        return True
    return build.build(runner, facts["capability"]).status == "ok"


def part_b(runner: Runner, facts: Row, report: Report) -> None:
    """Compiling comes last: it is slow and cannot be interrupted."""
    if not have_library(runner, facts):
        return
    if not {"copy", "fp32", "tf32"} <= report.ceilings.keys():
        runner.work("ceilings", ".device:ceilings", limit=60)
    ceilings = report.ceilings
    shares = {"loss": 0.35, "step": 0.35, "bank": 0.1, "crossover": 0.1, "compile": 1.0}  # of the time that is left
    left = runner.left()
    for group, share in shares.items():
        if group == "compile" and runner.device == "cpu":
            continue  # minutes
        limit = START + share * left
        runner.work(group, ".timing:worker", limit=limit, group=group, ceilings=ceilings)


def part_c(runner: Runner, facts: Row) -> None:
    if not have_library(runner, facts):
        return
    for name in counters.PROFILES:
        counters.profile(runner, name)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.worker:
        run_worker(args.worker, args.job, args.rows)
        return 0
    if args.sanitize:
        sanitizers.drive(args.sanitize)
        return 0
    if args.profile:
        counters.drive(args.profile)
        return 0
    return check(["A", "B", "C"] if args.part == "all" else [args.part], args.device or "cuda", args.minutes, args.out)


def check(parts: list[str], device: str, minutes: float, out: Path) -> int:
    """Runs the parts and prints their tables last. Returns the exit code: 1 if anything was wrong."""
    find_toolkit()
    facts = read_facts(device)
    if facts is None:
        return 2
    report = Report(out, facts, datetime.date.today().isoformat())
    for part in parts:
        report.begin(part)
        runner = Runner(device, minutes, partial(report.add, part))
        if part == "A":
            part_a(runner, facts)
        elif part == "B":
            part_b(runner, facts, report)
        else:
            part_c(runner, facts)
    for part in parts:
        print(report.table(part))
    wrong, skipped = report.wrong(parts), report.skipped(parts)
    print(f"\n{report.file.name} written; " + (f"WRONG: {', '.join(wrong)}" if wrong else "nothing was found wrong"))
    if skipped:
        print(f"skipped, and so not checked: {', '.join(skipped)}")
    return 1 if wrong else 0


def read_facts(device: str) -> Row | None:
    """What the machine is; None, with a line that says why, where nothing can be checked."""
    if device == "cuda" and not torch.cuda.is_available():
        why = (
            "this torch is a CPU build" if torch.version.cuda is None else "torch finds none, or its driver is too old"
        )
        print(f"no GPU can be used: {why}", file=sys.stderr)
        return None
    sections: list[Section] = []
    Runner(device, 2, sections.append).work("machine", ".device:facts")
    facts = sections[0].rows[0] if sections[0].rows else {}
    if "device" not in facts:
        print(f"no GPU can be used: {sections[0].note}", file=sys.stderr)
        return None
    return {name: value for name, value in facts.items() if name != "index"}


if __name__ == "__main__":
    sys.exit(main())
