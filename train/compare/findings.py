"""What a study has found: the results of its runs, as its report and pictures ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .plan import SCORE, Chosen, Effects, Plan, Row, Run
from .statistics import Estimate, estimate
from .work import Result


@dataclass(frozen=True)
class Findings:
    """What a study has found."""

    plan: Plan
    command: str
    results: dict[str, Result]
    """By name of the run."""
    chosen: Chosen
    machine: str

    def of(self, runs: Sequence[Run]) -> list[Result]:
        """The results of some runs."""
        return [self.results[run.name] for run in runs]

    def tested(self) -> dict[str, dict[str, list[Run]]]:
        """The runs on the test classes, by method: at each method's learning rate, where these differ, and at one for
        all."""
        own, common = self.plan.final(self.chosen), self.plan.common(self.chosen)
        return {"common": common} if own == common else {"own": own, "common": common}

    def effects(self) -> Effects:
        """One setting at a time away from the chosen ones, also those that only one method has, if it has several
        values."""
        found = self.plan.effects(self.chosen) | self.plan.own(self.chosen)
        return {name: rows for name, rows in found.items() if len(values_of(rows)) > 1}

    def recalls(self) -> list[str]:
        """Those that runs on this data have; of runs that all broke down, "recall@1"."""
        scored = next((result["scores"] for result in self.results.values() if result["scores"]), {"recall@1": 0.0})
        return sorted((name for name in scored if name.startswith("recall@")), key=lambda name: int(name[7:]))

    def scores(self, runs: Sequence[Run], name: str = SCORE) -> list[float]:
        """One score of each run."""
        return [score(result, name) for result in self.of(runs)]

    def estimate(self, runs: Sequence[Run], name: str = SCORE) -> Estimate:
        """A score over the seeds of one setting."""
        return estimate(self.scores(runs, name))

    def broken(self, runs: Sequence[Run]) -> int:
        """How many of some runs broke down in training."""
        return sum(result["scores"] is None for result in self.of(runs))

    def mark(self, runs: Sequence[Run]) -> str:
        """What is to be said of a number that is made of these runs, if some of them broke down."""
        count = self.broken(runs)
        return f" ({count} of {len(runs)} broke down)" if count else ""

    def cell(self, runs: Sequence[Run], name: str = SCORE) -> str:
        """A score over the seeds of one setting, for a table."""
        return f"{self.estimate(runs, name)}{self.mark(runs)}"


def values_of(rows: Sequence[Row]) -> list[float | None]:
    """Each value once, ascending; the first is what is estimated."""
    return sorted({value for _, value, _ in rows}, key=lambda value: (value is not None, value or 0.0))


def in_words(value: float | None) -> str:
    """A value, for a table and a picture."""
    return "estimated" if value is None else f"{value:g}"


def score(result: Result, name: str = SCORE) -> float:
    """A score of a run in percent: 0 if its training broke down."""
    return float(result["scores"][name]) if result["scores"] else 0.0
