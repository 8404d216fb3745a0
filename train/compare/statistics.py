"""Means of a few seeds, and how sure they are."""

from __future__ import annotations

import math
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
        return f"{self.mean:.2f} ± {self.half:.2f}" if self.count >= FEW else f"{self.mean:.2f}"

    @property
    def half(self) -> float:
        """Of the interval."""
        return (self.high - self.low) / 2


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
    half = float(_quantile(CONFIDENCE, count) * np.std(values, ddof=1) / np.sqrt(count))
    return Estimate(mean, mean - half, mean + half, count)


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """The mean of ours - theirs, seed by seed: both saw the same batches, so what a seed does to both cancels out."""
    return estimate([a - b for a, b in zip(ours, theirs, strict=True)])


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Estimate | None:
    """The mean of ours over the mean of theirs, with Fieller's interval at ``CONFIDENCE``.

    It holds the values for which the mean of ours - value x theirs, seed by seed, does not differ significantly from 0.
    None if these are without bounds, as where the mean of theirs is not significantly different from 0.

    Source: E. C. Fieller, Some problems in interval estimation. Journal of the Royal Statistical Society B, 1954.
    """
    count = len(ours)
    if count < 2:
        return None
    a, b = float(np.mean(ours)), float(np.mean(theirs))
    (aa, ab), (_, bb) = (np.cov(ours, theirs) / count * _quantile(CONFIDENCE, count) ** 2).tolist()
    if b * b <= bb:
        return None
    middle = a * b - ab
    half = math.sqrt(max(0.0, middle**2 - (a * a - aa) * (b * b - bb)))  # 0 of proportional ones, except for rounding
    return Estimate(a / b, (middle - half) / (b * b - bb), (middle + half) / (b * b - bb), count)


def corrected(found: Estimate, comparisons: int) -> Estimate:
    """One of several estimates with a wider interval, after Bonferroni: all of them hold together at ``CONFIDENCE``.

    Raises:
        ValueError: it is of one value, which has no interval.
    """
    if found.count < 2:
        raise ValueError("one value has no interval")
    wide = _quantile(1 - (1 - CONFIDENCE) / comparisons, found.count)
    half = found.half * wide / _quantile(CONFIDENCE, found.count)
    return Estimate(found.mean, found.mean - half, found.mean + half, found.count)


def _quantile(confidence: float, count: int) -> float:
    """Half of Student's interval of the mean of ``count`` values, in standard errors."""
    return float(stats.t.ppf((1 + confidence) / 2, count - 1))
