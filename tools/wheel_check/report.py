"""How the checks ended: a line for each, the table of all, and what none has shown."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .run import Failed, Unavailable
from .wheel import Wheel

SECOND_PYTHON = "a second version of Python"
CUDA_BUILD = "a CUDA build of torch"
CPU_BUILD = "a CPU build of torch"
GPU = "a GPU"


@dataclass(frozen=True)
class Outcome:
    """A line of the table."""

    what: str
    detail: str
    result: str = "ok"
    """Or "FAILED", or "UNAVAILABLE"."""
    report: dict[str, str] | None = None
    """What `inside.py` printed, if that is what ran."""


def attempt(what: str, check: Callable[[], Outcome]) -> Outcome:
    """Runs a check, and prints what it is about and how it ended."""
    print(f"{what} ... ", end="", flush=True)
    try:
        outcome = check()
        print(f"{outcome.result}: {outcome.what}, {outcome.detail}", flush=True)
    except (Failed, Unavailable) as error:
        lines = str(error).splitlines()
        reason = next((line for line in reversed(lines) if re.match(r"\w+: ", line)), lines[-1])
        outcome = Outcome(what, reason, "FAILED" if isinstance(error, Failed) else "UNAVAILABLE")
        print(outcome.result, *lines, sep="\n    ", flush=True)
    return outcome


def parts_not_covered(outcomes: Sequence[Outcome]) -> list[str]:
    """The parts of the claim that no environment has shown to hold."""
    reports = [outcome.report for outcome in outcomes if outcome.report is not None]
    shown = {
        SECOND_PYTHON: len({report["python"].rpartition(".")[0] for report in reports}) > 1,
        CUDA_BUILD: any(report["cuda"] for report in reports),
        CPU_BUILD: any(not report["cuda"] for report in reports),
        GPU: any(report["kernels"].startswith("ran") for report in reports),
    }
    return [part for part, is_shown in shown.items() if not is_shown]


def print_table(outcomes: Sequence[Outcome], wheel: Wheel) -> None:
    """Prints the outcomes, one a line, in columns."""
    what, result = max(len(o.what) for o in outcomes), max(len(o.result) for o in outcomes)
    print(f"\n{wheel.path.name}")
    for o in outcomes:
        print(f"  {o.what:{what}}  {o.result:{result}}  {o.detail}")
