"""The triplet loss, above all the one of all triplets: it is what going through the triplets one by one finds."""

import pytest
import torch
from loss_cases import problem, run, run_with_pairs
from state import NARROW_DTYPES

from xbn_ext import Triplet, reference


@pytest.mark.parametrize("loss", [Triplet(), Triplet(mining="all")], ids=lambda loss: loss.mining)
def test_triplets_of_infinite_similarities_touch_no_row(loss, ops, device, dtype):
    """Overflow: -inf exceeds nothing, so there is no hardest row to gather."""
    largest = torch.finfo(dtype).max
    z = torch.full((3, 2), largest, dtype=dtype, device=device)
    bank = torch.full((4, 2), -1.0, dtype=dtype, device=device) * 8
    labels, bank_labels = torch.zeros(3, dtype=torch.int64, device=device), torch.tensor([0, 1, 0, 1], device=device)
    value, grad = run(ops.memory_loss, z, labels, bank, bank_labels, loss, renormalize=False)
    assert not value.isfinite() or value == 0
    assert not grad.any()


def assert_same_as_reference(ops, z, labels, bank, bank_labels, loss, **options):
    """Where an anchor has millions of triplets, some are always close to none: one more or less hardly matters then."""
    ours = run(ops.memory_loss, z, labels, bank, bank_labels, loss, **options)
    truth = run(reference.memory_loss, z.double(), labels, bank.double(), bank_labels, loss, **options)
    rtol = 1e-5 if z.dtype == torch.float32 else 1e-11
    for value, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(value.double(), true, rtol=rtol, atol=rtol * float(true.abs().max()))


@pytest.mark.long
@pytest.mark.parametrize("loss", [Triplet(0.2, mining="all")], ids=["triplet_all"])
def test_more_positives_than_are_held_at_a_time(loss, ops, implementation, device, dtype):
    """Of 2100 and 1900 rows of a class, or 8200 and 800, in up to three rounds."""
    if implementation.name in ("emu", "plain") and dtype == torch.float64:
        pytest.skip("20 s; float32 goes the same way")
    B, M, rare = (1000, 4000, 1900) if implementation.name in ("cpu", "plain") else (1024, 9000, 800)
    z, labels, bank, bank_labels = problem(B, M, 4, dtype, device, classes=2)
    labels.copy_(torch.arange(B) % 2), bank_labels.copy_((torch.randperm(M) < rare).long())
    options = {"exclude": torch.randint(-1, M, (B,)).to(device), "anchors": torch.rand(B).to(device) < 0.6}
    count = torch.tensor(M - 100, device=device)
    assert_same_as_reference(ops, z, labels, bank, bank_labels, loss, count=count, **options)


@pytest.mark.parametrize("loss", [Triplet(0.2, mining="all")], ids=["triplet_all"])
@pytest.mark.parametrize("of_class", [20, 31, 32, 33, 34, 130, 300])
def test_few_and_many_positives(loss, of_class, ops, device, dtype):
    """Up to 32 are compared one by one on the CPU, more of them by bisection."""
    z, labels, bank, bank_labels = problem(70, 600, 16, dtype, device)
    bank_labels[torch.randperm(600)[:of_class]] = 50
    labels[3:20] = 50
    assert_same_as_reference(ops, z, labels, bank, bank_labels, loss)
    bank[100:200] = bank[200:300]  # equal similarities
    assert_same_as_reference(ops, z, labels, bank, bank_labels, loss)


def one_by_one(z, labels, bank, bank_labels, margin, count, bank_ids, exclude, anchors):
    """Value, gradient and pairs from all triplets `[B, positive, negative]`."""
    s = reference.similarity(z, bank[:count].to(z.dtype), renormalize=False)
    pair = anchors[:, None] & ((exclude[:, None] == -1) | (exclude[:, None] != bank_ids[:count]))
    positive = labels[:, None] == bank_labels[:count]
    cost = s[:, None, :] - s[:, :, None] + margin
    paying = (pair & positive)[:, :, None] & (pair & ~positive)[:, None, :] & ~(cost <= 0)
    value = torch.where(paying, cost, 0.0).sum() / paying.sum().clamp(min=1)
    (grad,) = torch.autograd.grad(value, z)
    pairs = torch.stack([paying.any(2).sum(), paying.any(1).sum()]).double() / anchors.sum().clamp(min=1)
    return value.detach(), grad, pairs


@pytest.mark.parametrize("loss", [Triplet(mining="all")], ids=["triplet_all"])
@pytest.mark.parametrize("margin", [0.0, 0.25, -0.5, -10.0, 50.0, 1e6])
@pytest.mark.parametrize("classes", [1, 2, 20, 200])
@pytest.mark.parametrize("nan", [True, False], ids=["nan", "finite"])
def test_all_triplets_are_what_going_through_them_finds(loss, margin, classes, nan, ops, device, dtype):
    """On numbers whose products and sums are exact: many similarities are equal, or just the margin apart."""
    loss = Triplet(margin, mining="all")
    for memory_dtype in (dtype, *NARROW_DTYPES):
        B, M, D = torch.randint(1, 100, (3,)).tolist()
        z, bank = (torch.randint(-3, 4, (n, D), device=device) / 4 for n in (B, M))
        if nan:
            z[torch.randint(B, ())] = torch.nan
        labels, bank_labels = (torch.randint(classes, (n,), device=device) for n in (B, M))
        options = {
            "count": torch.tensor(M - M // 8, device=device),
            "bank_ids": torch.randint(-3, 20, (M,), device=device),
            "exclude": torch.randint(-1, 20, (B,), device=device),
            "anchors": torch.rand(B, device=device) < 0.7,
        }
        z = z.to(dtype).requires_grad_()
        tensors = (z, labels, bank.to(memory_dtype), bank_labels)
        *truth, true_pairs = one_by_one(*tensors, margin, **options)
        for module in (ops, reference):
            *result, pairs = run_with_pairs(module, *tensors, loss, renormalize=False, **options)
            torch.testing.assert_close(pairs, true_pairs)
            rtol = 1e-5 if dtype == torch.float32 else 1e-12
            torch.testing.assert_close(result[0], truth[0], rtol=rtol, atol=rtol, equal_nan=True)
            if truth[0].isfinite():
                rows = z.isfinite().all(1)
                atol = rtol * max(1.0, float(truth[1][rows].abs().sum()))
                torch.testing.assert_close(result[1][rows], truth[1][rows], rtol=rtol, atol=atol)


@pytest.mark.parametrize("loss", [Triplet(0.2, mining="all")], ids=["triplet_all"])
@pytest.mark.parametrize("classes", [1, 2, 20])
@pytest.mark.parametrize("of", ["positive", "negative", "neither"])
def test_a_bank_row_that_is_not_finite_makes_the_loss_nan(loss, classes, of, ops, device, dtype):
    z, labels, bank, bank_labels = problem(70, 500, 16, dtype, device, classes=classes)
    labels.fill_(0)
    bank_labels[7] = 0 if of == "positive" else 1 if classes > 1 else 0
    if of == "neither":
        labels.fill_(30)
    bank[7, 3] = torch.nan
    value, _ = run(ops.memory_loss, z, labels, bank, bank_labels, loss)
    assert value.isnan() == reference.memory_loss(z, labels, bank, bank_labels, loss).isnan()
    assert value.isnan() == (of != "neither" and classes > 1)


@pytest.mark.parametrize("their_label", [0, 30], ids=["only positives", "only negatives"])
def test_an_anchor_without_a_triplet_gets_nothing_from_rows_that_are_not_finite(their_label, ops, device, dtype):
    z, labels, bank, bank_labels = problem(70, 500, 16, dtype, device)
    bank.fill_(torch.nan)
    value, grad = run(ops.memory_loss, z, labels.fill_(0), bank, bank_labels.fill_(their_label), Triplet(0.2))
    assert value == 0 and not grad.any()
