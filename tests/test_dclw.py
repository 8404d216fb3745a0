"""The weighted decoupled contrastive loss, as its formula has it."""

import pytest
import torch
import torch.nn.functional as F
from loss_cases import problem

from xbn_ext import DCL, DCLW, CrossBatchMemory, reference

B, D = 12, 7


def test_the_formula(ops, device, dtype):
    """From all similarities: the mean is over the positives of all anchors that have negatives."""
    loss = DCLW(0.3, 0.2)
    z, labels, bank, bank_labels = problem(B, 150, D, dtype, device, classes=6)
    labels[0] = 99  # has no positives
    s = z @ F.normalize(bank).T
    positive = labels[:, None] == bank_labels
    scale = (s / loss.sigma).exp()
    weight = 2 - scale / scale[positive].mean()
    push = (s / loss.temperature).masked_fill(positive, -torch.inf).logsumexp(1)[:, None]
    truth = (push - weight * s / loss.temperature)[positive].mean()
    torch.testing.assert_close(ops.memory_loss(z, labels, bank, bank_labels, loss), truth)
    counted = (ops.memory_loss_and_pairs(z, labels, bank, bank_labels, it)[1] for it in (loss, DCL()))
    assert torch.equal(*counted)


def test_one_positive_each_is_the_papers(ops, device, dtype):
    """Two views, each other's positives: the mean is over the batch."""
    a, b = (F.normalize(torch.randn(B, D, dtype=dtype, device=device)) for _ in range(2))
    s = a @ b.T
    own, numbers = s.diagonal(), torch.arange(B, device=device)
    weight = 2 - B * (own / 0.5).softmax(0)
    others = s.masked_fill(torch.eye(B, dtype=torch.bool, device=device), -torch.inf)
    truth = ((others / 0.1).logsumexp(1) - weight * own / 0.1).mean()
    torch.testing.assert_close(ops.memory_loss(a, numbers, b, numbers, DCLW()), truth)


def test_an_anchor_that_is_not_finite_changes_no_other_gradient(ops, device, dtype):
    z, labels, bank, bank_labels = problem(B, 150, D, dtype, device, classes=6)
    some = torch.arange(B, device=device) != 3
    grads = []
    for bad, anchors in ((True, None), (False, some)):
        x = z.clone()
        x[3, 2] = torch.nan if bad else 0
        x.requires_grad_()
        value, pairs = ops.memory_loss_and_pairs(x, labels, bank, bank_labels, DCLW(), anchors=anchors)
        value.backward()
        assert value.isnan() == bad
        number = pairs[0] * (B if anchors is None else B - 1)
        grads.append((x.grad * number)[some])
        assert x.grad[3].isnan().all() == bad
    rounding = 32 * torch.finfo(dtype).eps
    torch.testing.assert_close(*grads, rtol=rounding, atol=rounding * float(grads[0].abs().max()))


def test_an_anchor_without_negatives_has_no_weight_however_large(ops, device, dtype):
    """Rows are not of unit length, and its exponents far beyond those of the mean."""
    z, labels, bank, bank_labels = problem(3, 9, D, dtype, device, classes=1)
    labels[0] = bank_labels[:4] = 5
    exclude, ids = torch.tensor([-1, 7, 7], device=device), 100 + torch.arange(9, device=device)
    ids[:4] = 7  # the negatives of the second and the third anchor
    bank[:4] *= 1e-3
    z[1:] *= 1e4
    x = z.requires_grad_()
    given = {"exclude": exclude, "bank_ids": ids, "renormalize": False}
    value = ops.memory_loss(x, labels, bank, bank_labels, DCLW(0.1, 0.01), **given)
    value.backward()
    assert value.isfinite() and x.grad.isfinite().all() and x.grad[0].any() and not x.grad[1:].any()


def test_of_a_batch_its_rows_are_ranked_together(ops, device, dtype):
    z, labels, *_ = problem(B, 1, D, dtype, device, classes=4)
    with pytest.raises(RuntimeError, match="batch_sums: dclw weighs pairs by a mean over all anchors"):
        ops.batch_sums(z @ z.T, labels, DCLW())
    torch.testing.assert_close(ops.batch_loss(z, labels, DCLW()), reference.batch_loss(z, labels, DCLW()))


def test_a_memory_trains_with_it(dtype):
    criterion = CrossBatchMemory(DCLW(), D, 50)
    for _ in range(4):
        x, labels = torch.randn(20, D, dtype=dtype, requires_grad=True), torch.randint(5, (20,))
        criterion(x, labels, ids=torch.randint(0, 30, (20,))).backward()
        assert x.grad.isfinite().all() and x.grad.any()
    x = torch.randn(20, D, requires_grad=True)
    value = criterion(x, torch.arange(20) + 100)  # no positives
    value.backward()
    assert value == 0 and not x.grad.any()
