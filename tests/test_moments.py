"""ops.moments against the float64 reference."""

import pytest
import torch
from shapes import SIZES

from xbn_ext import reference
from xbn_ext.testing import assert_within_budget


def same(ops, x, mask=None):
    mean, std, rows = ops.moments(x, mask)
    true_mean, true_std, true_rows = reference.moments(x.double(), mask)
    assert mean.dtype == std.dtype == torch.float64 and rows.dtype == torch.int64
    assert rows == true_rows
    # Sums are float64 whatever the dtype of x, so the budget is float64's, in units of the values summed.
    largest = x[x.isfinite().all(1)].double().abs().max() if rows else 1
    assert (mean - true_mean).abs().max() <= 1e-13 * largest
    assert (std - true_std).abs().max() <= 1e-13 * largest
    return mean, std, rows


@pytest.mark.parametrize("B", SIZES)
@pytest.mark.parametrize("D", SIZES)
def test_ragged_shapes(B, D, ops, device, dtype):
    same(ops, torch.randn(B, D, dtype=dtype, device=device))


def test_mean_far_from_zero(ops, device):
    x = torch.randn(257, 65, dtype=torch.float64, device=device) + 1e8
    _, std, _ = ops.moments(x)
    assert_within_budget(std, x.var(0, correction=0).sqrt(), floor=1e9)  # 1e8 of 1e16 digits are spent on the mean
    assert (std - 1).abs().max() < 0.3


@pytest.mark.parametrize("B", [1, 64, 105, 700])
def test_a_constant_column_is_exact(B, ops, device, dtype):
    x = torch.tensor([0.7, 1.25, 1e6 + 0.1, -3e-5], dtype=dtype, device=device).expand(B, 4)
    mean, std, _ = ops.moments(x)
    assert torch.equal(mean, x[0].double()) and not std.any()


@pytest.mark.parametrize("far", [1e4, 1e8, 1e12])
def test_spread_far_from_zero(far, ops, device):
    """In float64 the numbers lie about 1e-16 * far apart; no more than that is lost."""
    x = 1e-3 * torch.randn(700, 5, dtype=torch.float64, device=device) + far
    _, std, _ = ops.moments(x)
    exact = (x - x[0]).var(0, correction=0).sqrt()  # the differences are exact
    torch.testing.assert_close(std, exact, rtol=1e-11, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_do_not_count(bad, implementation, ops, device, dtype):
    x = torch.randn(10, 7, dtype=dtype, device=device)
    expected = ops.moments(x[1:])
    x[0, 3] = bad
    for got, want in zip(ops.moments(x), expected, strict=True):
        if implementation.name == "cpu":
            assert torch.equal(got, want)
        else:  # without the row, others would be added up in another order
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_mask(ops, device, dtype):
    x = torch.randn(65, 63, dtype=dtype, device=device)
    mask = torch.rand(65, device=device) < 0.5
    _, _, rows = same(ops, x, mask)
    assert rows == mask.sum()


def test_no_rows(ops, device, dtype):
    for x, mask in [
        (torch.empty(0, 5, dtype=dtype, device=device), None),
        (torch.full((3, 5), torch.nan, dtype=dtype, device=device), None),
        (torch.randn(3, 5, dtype=dtype, device=device), torch.zeros(3, dtype=torch.bool, device=device)),
    ]:
        mean, std, rows = ops.moments(x, mask)
        assert rows == 0 and not mean.any() and not std.any()


def test_non_contiguous(ops, device, dtype):
    x = torch.randn(63, 130, dtype=dtype, device=device)
    same(ops, x[:, ::2])
    same(ops, x.T)
    same(ops, x, (torch.rand(126, device=device) < 0.5)[::2])


@pytest.mark.parametrize("D", [5, 12])
def test_more_rows_than_are_looked_at_at_once(D, ops, device, dtype):
    x = torch.randn(3000, D, dtype=dtype, device=device) + 100
    x[:1100, 1] = torch.nan  # all of the first that are looked at
    x[::7, 2] = torch.inf
    same(ops, x, torch.rand(3000, device=device) < 0.5)
