"""ops.memory_sums and ops.settle_sums: a memory in parts has the loss and the gradient of the whole."""

from itertools import pairwise

import pytest
import torch
from loss_cases import LOSSES, problem, run_with_pairs
from parts import loss_of_parts

from xbn_ext import Contrastive, Triplet, reference
from xbn_ext.dtypes import MEMORY_DTYPES
from xbn_ext.reference.parts import program

IN_PARTS = {name: loss for name, loss in LOSSES.items() if loss.passes} | {
    "mean": Contrastive(0.9, 0.2),
    "mean_squared": Contrastive(0.2, 1.5, distance="squared_euclidean"),
    "triplet_squared": Triplet(0.3, distance="squared_euclidean"),
}


def cut(n, bank, bank_labels, bank_ids):
    """Into n parts: one is longer, some may be empty."""
    M = len(bank)
    bounds = [0, *(max(0, k * M // n - 3) for k in range(1, n)), M]
    return [(bank[a:b], bank_labels[a:b], {"bank_ids": bank_ids[a:b]}) for a, b in pairwise(bounds)]


def assert_close(found, expected, dtype):
    tolerance = 1e-10 if dtype == torch.float64 else 2e-3
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("name", IN_PARTS)
@pytest.mark.parametrize("shape", [(5, 300, 33), (65, 1037, 16), (3, 2, 7)])
def test_a_memory_in_parts(n, name, shape, ops, device, dtype):
    B, M, D = shape
    loss = IN_PARTS[name]
    z, labels, bank, bank_labels = problem(B, M, D, dtype, device, classes=4)
    ids, exclude = (torch.arange(k, device=device) % 11 for k in (M, B))
    anchors = torch.arange(B, device=device) % 3 != 1
    truth = [t.double() if t.is_floating_point() else t for t in (z, labels, bank, bank_labels)]
    expected = run_with_pairs(reference, *truth, loss, anchors=anchors, bank_ids=ids, exclude=exclude)
    found = loss_of_parts(ops, z, labels, cut(n, bank, bank_labels, ids), loss, anchors, exclude=exclude)
    assert_close(found, expected, dtype)


@pytest.mark.parametrize("name", IN_PARTS)
def test_the_reference_in_parts(name):
    loss = IN_PARTS[name]
    assert [tuple(slots) for slots in map(sorted, program(loss))] == list(loss.passes)
    z, labels, bank, bank_labels = problem(30, 200, 12, classes=4)
    z[3, 0] = torch.inf
    exclude = torch.arange(30)
    expected = run_with_pairs(
        reference, z, labels, bank, bank_labels, loss, bank_ids=torch.arange(200), exclude=exclude
    )
    for n in (1, 4):
        found = loss_of_parts(reference, z, labels, cut(n, bank, bank_labels, torch.arange(200)), loss, exclude=exclude)
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("memory_dtype", MEMORY_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["supcon", "mined", "triplet", "mean"])
def test_what_rows_stand_for_and_how_many_there_are(memory_dtype, name, ops, device, dtype):
    loss = IN_PARTS[name]
    z, labels, bank, bank_labels = problem(20, 90, 12, dtype, device, classes=4)
    bank = bank.to(memory_dtype)
    scale, shift = (torch.rand(12, dtype=torch.float64, device=device) for _ in range(2))
    seen = {"scale": scale + 0.5, "shift": shift, "renormalize": name != "triplet", "eps": 1e-3}
    truth = [t.double() if t.is_floating_point() else t for t in (z, labels, bank[:70], bank_labels[:70])]
    expected = run_with_pairs(reference, *truth, loss, **seen)
    count = torch.tensor(30, device=device)  # of the second part: its other 20 rows do not exist
    parts = [(bank[:40], bank_labels[:40], {}), (bank[40:], bank_labels[40:], {"count": count})]
    assert_close(loss_of_parts(ops, z, labels, parts, loss, **seen), expected, dtype)


def test_an_empty_batch_an_empty_part_and_no_gradient(ops, device, dtype):
    z, labels, bank, bank_labels = problem(6, 30, 5, dtype, device, classes=3)
    for loss in IN_PARTS.values():
        sums, grads = ops.memory_sums(z[:0], labels[:0], bank, bank_labels, loss)
        assert sums.shape == (2, 0, 4) and grads.shape == (2, 0, 5)
        given, scale, totals = ops.settle_sums(sums[None], loss, len(loss.passes))
        assert given.shape == (0,) and scale.shape == (1, 2, 0) and not totals.any()
        sums, grads = ops.memory_sums(z, labels, bank, bank_labels, loss, need_grad=False)
        assert grads.shape == (2, 0, 5)
        assert torch.equal(sums, ops.memory_sums(z, labels, bank, bank_labels, loss)[0])
        nothing, no_grads = ops.memory_sums(z, labels, bank[:0], bank_labels[:0], loss)
        assert not nothing[..., 2].any() and not no_grads.any()


@pytest.mark.parametrize("name", IN_PARTS)
def test_an_anchor_of_one_class_that_is_not_finite(name, ops, device, dtype):
    z, labels, bank, bank_labels = problem(6, 30, 5, dtype, device, classes=1)
    z[2, 1] = torch.nan
    value = reference.memory_loss(z, labels, bank, bank_labels, IN_PARTS[name])
    for of_parts in (ops, reference):
        parts = cut(3, bank, bank_labels, torch.arange(30, device=device))
        found, *_ = loss_of_parts(of_parts, z, labels, parts, IN_PARTS[name], exclude=torch.full_like(labels, -1))
        assert found.isnan() == value.isnan()


def test_an_anchor_that_is_not_finite(ops, device, dtype):
    z, labels, bank, bank_labels = problem(6, 30, 5, dtype, device, classes=3)
    z[2, 1] = torch.nan
    for loss in IN_PARTS.values():
        value, grad, _ = loss_of_parts(
            ops,
            z,
            labels,
            cut(3, bank, bank_labels, torch.arange(30, device=device)),
            loss,
            exclude=torch.full_like(labels, -1),
        )
        assert value.isnan() and grad[2].isnan().all()
        assert grad[torch.arange(6, device=device) != 2].isfinite().all()
