"""ops.track_ against the reference, and what the filters must do whatever the reference says."""

import math

import pytest
import state
import torch

from xbn_ext import reference

FILTERS = {
    "xbn": (math.inf, 1.0, None),
    "axbn": (1e-2, 1.0, None),
    "adaptive": (None, 2.0, None),
    "exact": (0.0, 1.0, None),
    "ema": (0.0, 1.0, 0.1),
}


def track(module, m, x, filter, mask=None):
    """Returns the gaps before and after, and the gain."""
    stats = m.sums.new_zeros(3)
    module.track_(
        m.target_mean, m.target_std, m.variance, m.scale, m.shift, x, mask, m.sums, m.count, *filter, 1e-6, stats,
        m.innovation,
    )  # fmt: skip
    return stats


@pytest.mark.parametrize("filter", FILTERS.values(), ids=FILTERS.keys())
@pytest.mark.parametrize("count", [0, 1, 5, 40])
@pytest.mark.parametrize("D", [1, 7, 65])
def test_against_reference(filter, count, D, ops, device, dtype):
    ours = state.to(state.filled(40, D, count, dtype, pending=True), device)
    truth = state.clone(ours)
    for B in (16, 2, 1, 16, 0, 64):
        x = torch.randn(B, D, dtype=dtype, device=device)
        mask = torch.rand(B, device=device) < 0.8 if B == 64 else None
        stats, true_stats = track(ops, ours, x, filter, mask), track(reference, truth, x, filter, mask)
        torch.testing.assert_close(stats, true_stats, rtol=1e-9, atol=1e-9, equal_nan=True)
        state.assert_same_state(ours, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("filter", FILTERS.values(), ids=FILTERS.keys())
def test_first_batch_is_taken_over(filter, ops, device):
    m = state.to(state.filled(40, 7, 40), device)
    x = torch.randn(64, 7, device=device)
    track(ops, m, x, filter)
    mean, std, _ = ops.moments(x)
    torch.testing.assert_close(m.target_mean, mean)
    torch.testing.assert_close(m.target_std, std)


def test_gaps_are_distances_of_the_rows(ops, device):
    m = state.to(state.filled(40, 7, 40, torch.float64, pending=True), device)
    x = torch.randn(64, 7, device=device) * 3 + 1

    def distance():
        rows = m.bank * m.scale + m.shift
        return ((rows.mean(0) - x.mean(0)).square() + (rows.std(0, False) - x.std(0, False)).square()).sum().sqrt()

    before = distance()
    *gaps, gain = track(ops, m, x, FILTERS["ema"])
    torch.testing.assert_close(torch.stack(gaps), torch.stack([before, distance()]), rtol=1e-5, atol=1e-5)
    assert gaps[1] < 1e-5 and gain == 1, "the first batch is taken over"
    x = x + 1
    *gaps, gain = track(ops, m, x, FILTERS["ema"])
    torch.testing.assert_close(gaps[1], 0.9 * gaps[0], rtol=1e-5, atol=1e-5)
    assert gain == 0.1
    *gaps, gain = track(ops, m, x[:1], FILTERS["ema"])
    assert all(gap.isnan() for gap in gaps) and gain == 0, "one row measures nothing"
    m.count.zero_()
    *gaps, gain = track(ops, m, x, FILTERS["ema"])
    assert all(gap.isnan() for gap in gaps) and gain == 0.1


def test_bank_gets_the_moments_of_the_batch(ops, device):
    m = state.to(state.filled(100, 65, 100, torch.float64, pending=True), device)
    x = torch.randn(64, 65, device=device) * 3 + 1
    track(ops, m, x, FILTERS["xbn"])
    rows = m.bank * m.scale + m.shift
    mean, std, _ = ops.moments(x)
    torch.testing.assert_close(rows.mean(0), mean)
    torch.testing.assert_close(rows.std(0, correction=0), std)


@pytest.mark.parametrize("ratio, steady", [(1e-3, 0.031), (1e-2, 0.095), (0.1, 0.27), (1.0, 0.62)])
def test_steady_gain(ratio, steady, ops, device):
    m = state.to(state.filled(10, 3, 10), device)
    for _ in range(500):
        track(ops, m, torch.randn(8, 3, device=device), (ratio, 1.0, None))
    before = m.target_mean.clone()
    x = torch.randn(8, 3, device=device)
    track(ops, m, x, (ratio, 1.0, None))
    gain = (m.target_mean - before) / (x.double().mean(0) - before)
    assert gain.tolist() == pytest.approx([steady] * 3, abs=0.005)


def gains_of(ops, device, means, filter=FILTERS["adaptive"], seed=0):
    """The gain of each step and the squared error of the filtered mean after it, for batches around these means."""
    generator = torch.Generator().manual_seed(seed)
    m = state.to(state.filled(10, 32, 10), device)
    gains, errors = [], []
    for mean in means:
        x = torch.randn(16, 32, generator=generator).to(device) + mean
        gains.append(float(track(ops, m, x, filter)[2]))
        errors.append(float((m.target_mean - mean).square().sum()))
    return gains, errors


def test_an_adaptive_gain_falls_while_moments_stay(ops, device):
    gains, errors = gains_of(ops, device, [0.0] * 200)
    assert gains[0] == 1 and gains[1] > 0.99 and max(gains[100:]) < 0.35, gains
    assert min(gains) == pytest.approx(0.1), "and no further"
    fixed = gains_of(ops, device, [0.0] * 200, (1.0, 1.0, None))[1]
    assert sum(errors[100:]) < 0.5 * sum(fixed[100:]), "it averages over more batches than a gain of 0.62"


def test_an_adaptive_gain_stays_high_while_moments_run(ops, device):
    means = [0.3 * t for t in range(200)]
    gains, errors = gains_of(ops, device, means)
    assert min(gains[100:]) > 0.6, gains
    slow = gains_of(ops, device, means, (0.1, 1.0, None))[1]
    assert sum(errors[100:]) < 0.5 * sum(slow[100:]), "it lags less than a gain of 0.27"


def test_an_adaptive_gain_rises_within_two_steps_of_a_jump(ops, device):
    gains, _ = gains_of(ops, device, [0.0] * 200 + [2.0] * 10)
    assert gains[202] > gains[200] + 0.05 and max(gains[200:]) > gains[200] + 0.2, gains[198:]


def test_the_best_gain_leaves_innovations_white():
    """Of a random walk, the gain that adapts settles near the one of the Kalman filter that knows the noises."""
    generator = torch.Generator().manual_seed(0)
    noise = 1 / 16
    for ratio, best in ((0.1, 0.27), (1.0, 0.62)):
        steps = torch.randn(1500, 32, generator=generator) * (ratio * noise) ** 0.5
        gains, _ = gains_of(reference, "cpu", steps.cumsum(0))
        assert sum(gains[500:]) / 1000 == pytest.approx(best, abs=0.1)


def test_a_batch_that_measures_nothing_changes_nothing(ops, device):
    m = state.to(state.filled(10, 3, 10), device)
    before = state.clone(m)
    for x in (torch.randn(1, 3, device=device), torch.full((8, 3), torch.nan, device=device)):
        track(ops, m, x, FILTERS["axbn"])
    state.assert_same_state(m, before)  # the variance is infinite before and after


def test_dead_dimensions_keep_their_scale(ops, device):
    m = state.to(state.filled(10, 3, 10), device)
    m.bank[:, 0] = 0.25
    m.sums.copy_(reference.sums_of(m.bank))
    x = torch.randn(8, 3, device=device)
    x[:, 1] = 0.5
    track(ops, m, x, FILTERS["xbn"])
    assert m.scale[0] == 1 and m.scale[1] == 1 and m.scale[2] != 1
    torch.testing.assert_close((m.bank * m.scale + m.shift).mean(0), x.double().mean(0), check_dtype=False)


@pytest.mark.parametrize("count", [1, 3, 10, 1000])
def test_a_constant_dimension_far_from_zero_is_dead(count, ops, device):
    """The variance from its sums is rounding, in proportion to the mean: taken for a spread it would wreck the map."""
    m = state.to(state.filled(1000, 7, count), device)
    m.bank[:, 0], m.bank[:, 1] = 61.7, -1e4 / 3
    m.sums.copy_(reference.sums_of(m.bank[:count]))
    truth = state.clone(m)
    x = torch.randn(16, 7, device=device)
    track(ops, m, x, FILTERS["xbn"])
    track(reference, truth, x, FILTERS["xbn"])
    state.assert_same_state(m, truth)
    assert m.scale[0] == 1 and m.scale[1] == 1 and (m.scale.abs() < 100).all()


def test_a_map_that_mirrors(ops, device):
    ours = state.to(state.filled(40, 7, 40, pending=True), device)
    ours.scale.neg_()
    truth = state.clone(ours)
    x = torch.randn(16, 7, device=device)
    track(ops, ours, x, FILTERS["xbn"])
    track(reference, truth, x, FILTERS["xbn"])
    state.assert_same_state(ours, truth)
    assert (ours.scale < 0).all()
