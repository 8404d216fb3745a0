"""A study from its command line to its report."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from .. import allowed, lock, loop, place, ranks, run, terminal
from .. import arguments as of_run
from ..about import folder_path
from ..config import ConfigError
from ..cores import cores
from ..data import DataError, split
from ..program import FAILED, STOPPED, called
from . import report
from .findings import Findings, score
from .plan import CENTRED, STUDIED, TEST, VALIDATION, Plan, Run, uncentred, unique
from .work import WorkerLost, Workers, Workshop

DESCRIPTION = """Train with each method under one budget, and say what it does, with error bars. Arguments that are not
listed here are those of a run, and hold for every run. If a study is stopped or killed, the same command
continues it."""
RECIPE = "emoji-small"
RUNS = "runs"
"""The folder of the runs, in --out."""
MOST_SEEDS = 1000
BY_DEFAULT = ("batch", "xbm", "xbn", "axbn", f"xbm{CENTRED}", f"axbn{CENTRED}")
"""Not the oracle: its runs take many times as long as the others."""
OWN = {"--method", "--seed", "--resume", "--overwrite"}
"""Arguments of a run that say what a study decides itself."""


NOT_SHARED = (
    "torchrun has started several processes, and a study starts its own, one for each run (--jobs): start it without "
    "torchrun"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    terminal.prepare()
    if ranks.expected() > 1:
        if ranks.is_first():
            terminal.complain("compare", NOT_SHARED)
        return FAILED
    out, plan, workshop = parse(arguments)
    command = f"{called('compare')} {shlex.join(arguments)}"
    try:
        with lock.alone(out), run.stop_signals() as asked_to_stop, Workers(workshop, asked_to_stop) as workers:
            started = time.monotonic()
            results = workers.carry_out(plan.map(), "1 of 3: learning rate, memory size")

            def mean_score(runs: Sequence[Run]) -> float:
                return float(np.mean([score(results[r.name]) for r in runs]))

            chosen = plan.choose_lr(mean_score)
            results |= workers.carry_out(unique(plan.own(chosen)), "2 of 3: noise, momentum")
            chosen = plan.choose_own(chosen, mean_score)
            final = [
                r for tested in (plan.final(chosen), plan.common(chosen)) for runs in tested.values() for r in runs
            ]
            rest = [*final, *unique(plan.effects(chosen))]
            results |= workers.carry_out(rest, "3 of 3: test classes, other settings")
            findings = Findings(plan, command, results, chosen, report.machine(workshop))
            report.write(out, findings)
            seconds = time.monotonic() - started
            terminal.say(f"{len(findings.results)} runs, {seconds:.0f} s just now; the report is in {out}")
    except (ConfigError, DataError) as error:
        terminal.complain("compare", error)
        return FAILED
    except WorkerLost as error:
        terminal.complain("compare", error)
        return 1
    except (loop.Interrupted, KeyboardInterrupt):
        terminal.note("stopped; the same command continues from here")
        return STOPPED
    return 0


def parse(arguments: Sequence[str]) -> tuple[Path, Plan, Workshop]:
    """Where results go, what is compared, and how; exits with a usage message that names the argument at fault."""
    parser = argparse.ArgumentParser(called("compare"), description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--methods", type=_methods, default=BY_DEFAULT, metavar="A,B,...",
                        help=f"of {', '.join(STUDIED)}; those of a name with {CENTRED} are with --center-gradient, "
                        f"the others without (default: {','.join(BY_DEFAULT)})")  # fmt: skip
    parser.add_argument(
        "--seeds", type=_up_to(MOST_SEEDS), default=5, metavar="N", help="of the final runs (default: 5)"
    )
    parser.add_argument("--map-seeds", type=_up_to(MOST_SEEDS), default=2, metavar="N",
                        help="of the runs that settings are chosen from (default: 2)")  # fmt: skip
    lists = {
        "--lrs": (float, (3e-4, 1e-3, 3e-3, 1e-2), "learning rates to choose from"),
        "--memory-sizes": (int, (512, 4096, 8192), "memory sizes to show"),
        "--batch-sizes": (int, (16, 32, 64), "batch sizes to show"),
        "--warmups": (int, (0, 300), "steps before the memory takes part, to show"),
        "--noises": (float, (1e-2, 1e-1, 1.0), "axbn: process over measurement noise, to show"),
        "--momenta": (float, (0.1, 0.3), "ema: weights of the newest batch, to choose from"),
    }
    for name, (kind, default, text) in lists.items():
        words = ",".join(f"{value:g}" for value in default)
        parser.add_argument(
            name, type=_list_of(kind), default=default, metavar="X,Y,...", help=f"{text} (default: {words})"
        )
    parser.add_argument("--out", type=folder_path, default=Path("runs/compare"), metavar="DIR",
                        help="folder for the report and the runs (default: runs/compare)")  # fmt: skip
    parser.add_argument("--jobs", type=_up_to(allowed.WORKERS_OF_A_CORE * cores()), default=cores(), metavar="N",
                        help=f"runs at a time (default: {cores()}, one for each core)")  # fmt: skip
    given, others = parser.parse_known_args(arguments)
    said = {word.partition("=")[0] for word in others}
    if "--config" in said:
        parser.error("argument --config: a study decides some settings itself; give the others as arguments")
    if said & {"--center-gradient", "--no-center-gradient"}:
        parser.error("argument --center-gradient: a study has methods with and without it: see --methods")
    for name in OWN & said:
        parser.error(f"argument {name}: a study has its own; delete its --out to start again")
    base = of_run.parse(["--recipe", RECIPE, *others], allow_abbrev=False)  # nor those of OWN, shortened
    if base.wandb is not None:
        parser.error("argument --wandb: a study keeps no logs of its runs; leave it out")
    if base.validation_share:
        parser.error("argument --validation-share: a study holds out training classes of its own; leave it out")
    if base.test_of != split.CLASSES:
        parser.error("argument --test-of: a study tests on classes that are not trained on; leave it out")
    if base.test_share == 0:
        parser.error("argument --test-share: 0 leaves nothing to compare methods on; choose more")
    memory_sizes = tuple(sorted({*given.memory_sizes, base.memory_size}))  # learning rates are chosen at the base's
    plan = Plan(
        base, given.methods, given.seeds, given.map_seeds, given.lrs, memory_sizes, given.batch_sizes, given.warmups,
        given.noises, given.momenta,
    )  # fmt: skip
    try:
        plan.check()
        for folder in (given.out, given.out / RUNS):
            place.check_place(base, folder)
            place.require_writable(folder)
        _require_free(given.out)
        device = run.device_of(base)
        largest = "oracle" if "oracle" in map(uncentred, given.methods) else base.method
        run.require_memory(replace(base, memory_size=max(memory_sizes), method=largest), device)
    except ConfigError as error:
        parser.error(str(error))
    threads = base.threads or max(1, cores() // given.jobs)
    return given.out, plan, Workshop(given.out / RUNS, given.jobs, threads, str(device), max(given.batch_sizes))


def _require_free(out: Path) -> None:
    """Raise ConfigError if ``out``, where there is no study, has files that its report would replace."""
    there = [name for name in report.WRITTEN if os.path.lexists(out / name)]
    results = [found for part in (VALIDATION, TEST) for found in (out / RUNS).glob(f"{part}-*.json")]
    if there and not results:  # a study has some before it has a report
        raise ConfigError(
            f"--out {out}: there is no study in it, and a new one would replace {', '.join(there)}: choose another, or "
            "move what you need"
        )


def _up_to(most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text) if text.strip().isdecimal() else 0
        if not 1 <= value <= most:
            raise argparse.ArgumentTypeError(f"{text}: must be a whole number between 1 and {most}")
        return value

    return read


def _methods(text: str) -> tuple[str, ...]:
    methods = tuple(text.split(","))
    unknown = [method for method in methods if method not in STUDIED]
    if unknown or len(set(methods)) < len(methods):
        raise argparse.ArgumentTypeError(f"{text}: must be different ones of {', '.join(STUDIED)}")
    return methods


def _list_of(kind: type[int] | type[float]) -> Callable[[str], tuple[float, ...]]:
    def read(text: str) -> tuple[float, ...]:
        try:
            return tuple(sorted({kind(word) for word in text.split(",")}))
        except ValueError:
            words = "whole numbers" if kind is int else "numbers"
            raise argparse.ArgumentTypeError(f"{text}: must be {words} with commas between them") from None

    return read
