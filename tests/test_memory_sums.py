"""ops.memory_sums and ops.settle_sums: a memory in parts has the loss and the gradient of the whole."""

from itertools import pairwise

import pytest
import torch
from loss_cases import LOSSES, problem, run_with_pairs
from parts import loss_of_parts

from xbn_ext import Contrastive, reference
from xbn_ext.reference.parts import program

IN_PARTS = {name: loss for name, loss in LOSSES.items() if loss.passes} | {"mean": Contrastive(0.9, 0.2)}


def cut(n, bank, bank_labels, bank_ids):
    """Into n parts, of which one is short and one may be empty."""
    M = len(bank)
    bounds = [0, *(max(0, k * M // n - 3) for k in range(1, n)), M]
    return [(bank[a:b], bank_labels[a:b], bank_ids[a:b]) for a, b in pairwise(bounds)]


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
    tolerance = 1e-10 if dtype == torch.float64 else 1e-3
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


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
