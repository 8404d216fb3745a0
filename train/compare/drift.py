"""How much of the staleness of a memory a method removes, judged by embedding its rows again (train/drift.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..config import Config
from ..drift import lifetime
from .statistics import Estimate, estimate
from .work import Result

PHASES = {"first fifth": (0.0, 0.2), "second fifth": (0.2, 0.4), "rest": (0.4, 1.0)}
"""Parts of a training; drift falls with the learning rate."""
AGES = {"youngest third": (0.0, 1 / 3), "middle third": (1 / 3, 2 / 3), "oldest third": (2 / 3, 1.0)}
"""Of the time that a row stays in the memory."""


WHOLE = ("uncorrected", "in_memory")
"""Names in a run's history: the distance of the row as it was stored, and as it is in the memory."""
SHARED = ("shared_uncorrected", "shared_in_memory")
"""The parts of these distances that rows of one batch have in common."""


@dataclass(frozen=True)
class Staleness:
    """Cosine distances to where today's network would put a row; means over probes, intervals over seeds."""

    uncorrected: Estimate
    """Of the row as it was stored, which is what a plain memory has."""
    in_memory: Estimate
    """Of the row as it is in the memory."""

    @property
    def removed(self) -> float | None:
        """The part of the staleness that is gone, in percent; negative if it has grown, None where there was none.

        The shared part is a difference of two means, and may be below 0.
        """
        return 100 * (1 - self.in_memory.mean / self.uncorrected.mean) if self.uncorrected.mean > 0 else None


def staleness(
    results: Sequence[Result],
    config: Config,
    phase: tuple[float, float],
    age: tuple[float, float],
    names: tuple[str, str] = WHOLE,
) -> Staleness | None:
    """Of the runs of some seeds, rows of these ages in this phase, or the part SHARED of it; None where nothing was
    measured."""
    steps = lifetime(config.memory_size, config.batch_size, config.accumulate)
    seeds = []
    for result in results:
        points = [
            [point[name] for name in names]
            for point in result["drift"]
            if phase[0] * config.steps < point["step"] <= phase[1] * config.steps
            and age[0] * steps < point["age"] <= age[1] * steps
            # The names are not in a run of an earlier version; what breaks down leaves numbers that are not finite.
            and all(math.isfinite(point.get(name, math.nan)) for name in names)
        ]
        if points:
            seeds.append(np.mean(points, axis=0))
    if not seeds:
        return None
    uncorrected, in_memory = np.array(seeds).T.tolist()
    return Staleness(estimate(uncorrected), estimate(in_memory))
