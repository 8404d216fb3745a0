"""ops.batch_sums: a batch against itself, in parts of its anchors, has the loss and the gradient of the whole."""

from itertools import pairwise

import pytest
import torch
from loss_cases import FEW, LOSSES, each_of, problem, run

from xbn_ext import Contrastive, reference

ALL = {name: loss for name, loss in LOSSES.items() if not loss.gives_in_common} | {"mean": Contrastive(0.9, 0.2)}
every_loss, each_kind_of_loss = each_of(ALL, long=()), each_of(ALL)
few_losses = each_of(ALL, long=ALL.keys() - FEW)


def loss_of_parts(module, dots, labels, loss, n, ids=None, anchors=None):
    """Loss, derivative by dots, and totals, of n parts: one is longer, some may be empty."""
    B = len(dots)
    bounds = [0, *(max(0, k * B // n - 3) for k in range(1, n)), B]
    parts = [
        module.batch_sums(dots[a:b], labels, loss, first=a, ids=ids, anchors=None if anchors is None else anchors[a:b])
        for a, b in pairwise(bounds)
    ]
    totals, grad = sum(of_part for of_part, _ in parts), torch.cat([grad for _, grad in parts])
    average = 1 / totals[2:4].clamp(min=1)
    by_group = isinstance(loss, Contrastive) and loss.reduction != "mean"
    of_pair = torch.where(labels[:, None] == labels, average[1 if by_group else 0], average[0])
    return (average * totals[:2]).sum(), of_pair.to(grad.dtype) * grad, totals


def options_of(B, device):
    return {"ids": torch.arange(B, device=device) % 31 - 3, "anchors": torch.arange(B, device=device) % 3 != 1}


def assert_close(found, expected, dtype):
    tolerance = 1e-10 if dtype == torch.float64 else 2e-3
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@every_loss
@pytest.mark.parametrize("B", [1, 2, 17, 70])
def test_a_batch_in_parts(B, loss, n, ops, device, dtype):
    z, labels, _, _ = problem(B, 1, 9, dtype, device, classes=4)
    dots = z @ z.T
    for options in ({}, options_of(B, device)):
        expected = loss_of_parts(reference, dots.double(), labels, loss, 1, **options)
        for got, wanted in zip(loss_of_parts(ops, dots, labels, loss, n, **options), expected, strict=True):
            assert_close(got, wanted, dtype)


@every_loss
def test_the_reference_in_parts(loss):
    z, labels, _, _ = problem(40, 1, 6, classes=4)
    for options in ({}, options_of(40, "cpu")):
        expected, grad = run(reference.batch_loss, z, labels, loss, renormalize=False, **options)
        for n in (1, 3):
            value, by_dots, _ = loss_of_parts(reference, z @ z.T, labels, loss, n, **options)
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close((by_dots + by_dots.T) @ z, grad, rtol=1e-10, atol=1e-12)


@few_losses
def test_a_large_batch(loss, ops, device):
    """Several tiles of rows; and many thresholds."""
    z, labels, _, _ = problem(700, 1, 8, torch.float64, device, classes=3)
    expected, grad = run(reference.batch_loss, z, labels, loss, renormalize=False)
    value, by_dots, _ = loss_of_parts(ops, z @ z.T, labels, loss, 2)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close((by_dots + by_dots.T) @ z, grad, rtol=1e-10, atol=1e-10)


@each_kind_of_loss
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_anchor_that_is_not_finite(bad, loss, ops, device, dtype):
    z, labels, _, _ = problem(20, 1, 6, dtype, device, classes=2)
    dots = z @ z.T
    dots[7, 7] = bad  # no other row sees it
    value, grad, totals = loss_of_parts(ops, dots, labels, loss, 3)
    assert value.isnan() and grad[7].isnan().all()
    assert grad[torch.arange(20, device=device) != 7].isfinite().all() and totals[2:5].isfinite().all()
    anchors = torch.arange(20, device=device) != 7
    value, grad, _ = loss_of_parts(ops, dots, labels, loss, 3, anchors=anchors)
    assert value.isfinite() and grad[7].isnan().all() and grad[anchors].isfinite().all()


@each_kind_of_loss
def test_a_row_that_is_not_finite(loss, ops, device, dtype):
    """As batch_loss has it."""
    z, labels, _, _ = problem(20, 1, 6, dtype, device, classes=2)
    z[7, 2] = torch.nan
    value, by_dots, _ = loss_of_parts(ops, z @ z.T, labels, loss, 3)
    assert value.isnan() and ((by_dots + by_dots.T) @ z).isnan().all()


@pytest.mark.singly
@each_kind_of_loss
def test_an_empty_part_and_an_empty_batch(loss, ops, device, dtype):
    labels = torch.arange(5, device=device) % 2
    for B in (5, 0):
        dots = torch.zeros(0, B, dtype=dtype, device=device)
        totals, grad = ops.batch_sums(dots, labels[:B], loss, first=B)
        assert totals.shape == (7,) and totals.dtype == torch.float64 and not totals.any() and grad.shape == (0, B)


@pytest.mark.singly
@each_kind_of_loss
def test_without_a_gradient(loss, ops, device, dtype):
    z, labels, _, _ = problem(33, 1, 7, dtype, device, classes=3)
    dots = (z @ z.T)[5:21]
    totals, grad = ops.batch_sums(dots, labels, loss, first=5, need_grad=False)
    assert grad.shape == (0, 33) and torch.equal(totals, ops.batch_sums(dots, labels, loss, first=5)[0])
