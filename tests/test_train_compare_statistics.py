"""The statistics of a study: intervals, differences and ratios by definition, and what is called significant."""

from __future__ import annotations

import numpy as np
import pytest

from train.compare import drift, report, statistics
from train.config import Config

pytestmark = pytest.mark.usefixtures("one_thread")


def test_an_interval_is_students() -> None:
    found = statistics.estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445105 * np.sqrt(2.5) / np.sqrt(5)  # Student's t for four degrees of freedom, from a table
    assert found.mean == 3 and found.count == 5
    assert np.allclose([found.low, found.high], [3 - half, 3 + half])
    assert str(found) == "3.00 ± 1.96"


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = [
        found.low <= 7 <= found.high
        for found in (statistics.estimate(rng.normal(7, 2, 5).tolist()) for _ in range(4000))
    ]
    assert 0.94 < np.mean(held) < 0.96


def test_what_a_seed_does_to_both_cancels_out() -> None:
    found = statistics.difference([11.0, 21.0, 31.5], [10.0, 20.0, 30.0])
    assert found.mean == pytest.approx(3.5 / 3) and found.high - found.low < 2
    assert str(statistics.estimate([4.0])) == "4.00"
    with pytest.raises(ValueError, match="no values"):
        statistics.estimate([])


def test_a_corrected_interval_is_bonferronis() -> None:
    found = statistics.estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert statistics.corrected(found, 1).half == pytest.approx(found.half)
    half = 4.604094871 * np.sqrt(2.5) / np.sqrt(5)  # Student's t at 1 - 0.05 / 5, two-sided, from a table
    assert statistics.corrected(found, 5).half == pytest.approx(half)
    with pytest.raises(ValueError, match="one value has no interval"):
        statistics.corrected(statistics.estimate([1.0]), 2)


def test_the_interval_of_a_ratio_is_fiellers() -> None:
    """By its definition: at its ends the difference of ours and so much of theirs is just not significant."""
    ours, theirs = [2.0, 2.6, 3.1, 2.2, 2.9], [3.9, 4.4, 5.2, 3.5, 4.6]
    found = statistics.ratio(ours, theirs)
    assert found is not None and found.mean == pytest.approx(np.mean(ours) / np.mean(theirs))
    assert found.low < found.mean < found.high
    for end in (found.low, found.high):
        gap = statistics.difference(ours, [end * value for value in theirs])
        assert abs(gap.mean) == pytest.approx(gap.half)
    assert statistics.ratio(ours, ours) == statistics.Estimate(1.0, 1.0, 1.0, 5)
    for seed in range(2000):  # of proportional ones the interval is a point, whatever is rounded on the way
        some = np.random.default_rng(seed).normal(1, 0.3, 3)
        for factor in (1.0, 0.7):
            same = statistics.ratio((factor * some).tolist(), some.tolist())
            assert same is None or (same.high - same.low < 1e-3 and same.mean == pytest.approx(factor))
    assert statistics.ratio(ours, [1.0, -1.2, 0.9, -1.1, 0.8]) is None, "what is divided by might be 0"
    assert statistics.ratio([1.0], [2.0]) is None
    assert report.percent(statistics.Estimate(0.5, 0.25, 0.9, 5)) == "50 % (25 to 90)" and report.percent(None) == "-"


@pytest.mark.long
def test_the_interval_of_a_ratio_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = []
    for _ in range(4000):
        shared, own, their = rng.normal(0, 0.5, (3, 5))
        found = statistics.ratio((1.5 + shared + own).tolist(), (2 + shared + their).tolist())
        held.append(found is None or found.low <= 0.75 <= found.high)
    assert 0.94 < np.mean(held) < 0.96


@pytest.mark.long
def test_seldom_is_one_of_many_differences_of_nothing_called_significant() -> None:
    rng = np.random.default_rng(0)
    studies = [[report.judgement(statistics.estimate(rng.normal(0, 1, 5).tolist()), 12) for _ in range(12)]
               for _ in range(1000)]  # fmt: skip
    wrong = np.mean([any(sentence.startswith("significantly") for sentence in study) for study in studies])
    assert 0.02 < wrong < 0.06


def test_a_difference_is_judged_seed_by_seed() -> None:
    ours, theirs = [11.1, 21.0, 30.9, 41.0], [10.0, 20.0, 30.0, 40.0]
    assert statistics.estimate(ours).low < statistics.estimate(theirs).high, "each alone they overlap by far"
    gap = statistics.difference(ours, theirs)
    assert report.judgement(gap, 12).startswith("significantly different, higher; seed by seed +1.00 ± 0.13 points, ")
    gap = statistics.difference(theirs, ours)
    assert report.judgement(gap, 12).startswith("significantly different, lower; seed by seed -1.00 ± 0.13 points, ")
    barely = statistics.difference([1.2, 0.9, 0.6, 1.3], [0.0, 0.0, 0.0, 0.0])
    assert report.judgement(barely, 1).startswith("significantly") and barely.low > 0
    assert (
        report.judgement(barely, 12) == "no significant difference; seed by seed +1.00 ± 0.50 points, corrected ± 1.26"
    )
    assert report.judgement(statistics.estimate([1.0]), 12) == "+1.00 points; one seed shows no more"


def test_staleness_is_of_the_phase_and_age_asked_for() -> None:
    config = Config(steps=100, memory_size=640, batch_size=64)  # a row lives for 10 steps
    points = [
        {"step": step, "age": age, "uncorrected": 0.2, "in_memory": 0.05 if step > 50 and age > 5 else 0.3}
        for step in (10, 50, 51, 100)
        for age in (5, 6)
    ]
    found = drift.staleness([{"drift": points}, {"drift": points}], config, (0.5, 1.0), (0.5, 1.0))
    assert found is not None and found.in_memory.mean == pytest.approx(0.05) and found.removed == pytest.approx(75)
    assert drift.staleness([{"drift": points}], config, (0.0, 0.05), (0.0, 1.0)) is None
    of_steps = Config(steps=100, memory_size=640, batch_size=64, accumulate=3)  # four steps, as ages are
    old = [{"step": 60, "age": age, "uncorrected": 0.1 * age, "in_memory": 0.0} for age in (1, 2, 3, 4)]
    thirds = [drift.staleness([{"drift": old}], of_steps, (0.4, 1.0), age) for age in drift.AGES.values()]
    assert [t and t.uncorrected.mean for t in thirds] == pytest.approx([0.1, 0.2, 0.35])
    assert drift.staleness([{"drift": points}], config, (0.5, 1.0), (0.5, 1.0), drift.SHARED) is None, (
        "of an earlier version"
    )
    shared = [point | {"shared_uncorrected": 0.1, "shared_in_memory": 0.01} for point in points]
    found = drift.staleness([{"drift": shared}] * 2, config, (0.5, 1.0), (0.5, 1.0), drift.SHARED)
    assert found is not None and found.in_memory.mean == pytest.approx(0.01) and found.removed == pytest.approx(90)
