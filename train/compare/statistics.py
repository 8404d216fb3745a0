"""Means of a few seeds, and how sure they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
FEW = 3
"""Of two values Student's interval is 13 standard errors wide."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its confidence interval."""

    mean: float
    low: float
    high: float
    count: int
    """Seeds."""

    def __str__(self) -> str:
        """With the interval, where there are values enough for it to say anything."""
        return f"{self.mean:.2f} ± {(self.high - self.low) / 2:.2f}" if self.count >= FEW else f"{self.mean:.2f}"

    def above(self, other: Estimate) -> bool:
        """Whether the intervals do not overlap and this one is the higher."""
        return self.low > other.high


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of independent values, with Student's interval at ``CONFIDENCE``; of one value, the value alone.

    Raises:
        ValueError: there is no value.
    """
    if not len(values):
        raise ValueError("no values to take the mean of")
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return Estimate(mean, mean, mean, count)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * np.std(values, ddof=1) / np.sqrt(count))
    return Estimate(mean, mean - half, mean + half, count)


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """The mean of ours - theirs, seed by seed: both saw the same batches, so what a seed does to both cancels out."""
    return estimate([a - b for a, b in zip(ours, theirs, strict=True)])
