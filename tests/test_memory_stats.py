"""CrossBatchMemory.stats(): every number is of the last step, and what the step did not measure is NaN."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_cases import each_kind_of_loss
from memory_cases import B, D, M, batches, train

from xbn_ext import Contrastive, CrossBatchMemory


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_without_a_memory_loss_has_no_pairs(compiled):
    """What stats() says is of the last step."""
    torch._dynamo.reset()
    criterion = CrossBatchMemory(Contrastive(neg_margin=0.2), D, M)
    step = torch.compile(criterion, backend="aot_eager", fullgraph=True) if compiled else criterion
    seen = []
    for weight, (x, labels) in zip((1, 1, 0, 1), batches(4), strict=True):
        criterion.memory_weight = weight
        step(x, labels)
        seen.append(float(criterion.stats()["positives"]))
    assert seen[0] == 0 and seen[1] > 0 and np.isnan(seen[2]) and seen[3] > 0


def test_a_batch_that_measures_nothing_gains_nothing(device):
    criterion = CrossBatchMemory(Contrastive(), D, M).to(device)
    train(criterion, batches(3, device=device))
    assert criterion.stats()["gain"] > 0.5
    x, labels = next(batches(1, size=1, device=device))
    mean = criterion.target_mean.clone()
    criterion(x, labels)
    assert criterion.stats()["gain"] == 0 and torch.equal(criterion.target_mean, mean)


@pytest.mark.parametrize("drift", ["none", "xbn", "axbn", "ema"])
@pytest.mark.parametrize("update", ["inplace", "deferred"])
def test_stats(drift, update, device):
    loss = Contrastive(neg_margin=0.2)
    criterion = CrossBatchMemory(loss, D, M, drift=drift, update=update).to(device)
    stats = criterion.stats()
    assert stats.pop("fill") == 0 and all(number.isnan() for number in stats.values())
    for x, labels in batches(3, device=device):
        z = F.normalize(x, dim=1)
        rows, bank_labels = criterion.embedding_memory, criterion.label_memory
        criterion(x, labels)
        stats = criterion.stats()
        assert all(number.dim() == 0 and number.device == x.device for number in stats.values())
        if not len(rows):
            continue
        moved = rows
        if drift != "none":
            mean, std = criterion.target_moments
            moved = (rows - rows.mean(0)) / rows.std(0, correction=0) * std + mean
        else:
            assert stats["gain"].isnan()
        gaps = [
            ((r.mean(0) - z.mean(0)).square() + (r.std(0, False) - z.std(0, False)).square()).sum().sqrt()
            for r in (rows.double(), moved)
        ]
        torch.testing.assert_close(
            torch.stack(gaps).float(),
            torch.stack([stats["gap_before"], stats["gap_after"]]).float(),
            rtol=1e-3,
            atol=1e-5,
        )
        s, positive = z.double() @ F.normalize(moved.double(), dim=1).T, labels[:, None] == bank_labels
        torch.testing.assert_close(stats["positives"], (positive & (s < 1)).sum() / torch.tensor(float(B)).double())
        torch.testing.assert_close(stats["negatives"], (~positive & (s > 0.2)).sum() / torch.tensor(float(B)).double())
    gains = {"xbn": 1.0, "ema": 0.1, "axbn": 0.999}  # axbn: after a first step of 1, and one that says nothing yet
    if drift != "none":
        assert float(stats["gain"]) == pytest.approx(gains[drift])
    assert float(stats["fill"]) == pytest.approx(3 * B / M) and stats["age"] == 2
    criterion.eval()(x, labels)
    torch.testing.assert_close(criterion.stats(), stats, equal_nan=True)
    criterion.reset_queue()
    stats = criterion.stats()
    assert stats.pop("fill") == 0 and all(number.isnan() for number in stats.values())


def test_stats_are_not_of_the_default_dtype(device):
    criterion = CrossBatchMemory(Contrastive(), D, M).to(device)
    for x, labels in batches(2, device=device):
        criterion(x, labels)
    criterion.step += 100_000  # more than float16 holds
    expected = criterion.stats()
    torch.set_default_dtype(torch.float16)
    try:
        stats = criterion.stats()
    finally:
        torch.set_default_dtype(torch.float32)
    assert stats["age"] == expected["age"] == 100_001.5 and stats["fill"] == expected["fill"]


@each_kind_of_loss
@pytest.mark.parametrize("labels", [[5, 6], [0, 0], [0, 6]], ids=["negatives", "positives", "both"])
def test_rows_that_contribute_nothing_are_not_counted(labels, loss, ops, device, dtype):
    """An anchor without positives, or without negatives, has no gradient by most losses: none of its rows counts."""
    bank, bank_labels = torch.randn(6, 4, dtype=dtype, device=device), torch.tensor([0, 0, 0, 1, 1, 1], device=device)
    if labels == [0, 0]:
        bank_labels[:] = 0
    z = F.normalize(torch.randn(2, 4, dtype=dtype, device=device), dim=1).requires_grad_()
    value, pairs = ops.memory_loss_and_pairs(z, torch.tensor(labels, device=device), bank, bank_labels, loss)
    (grad,) = torch.autograd.grad(value, z)
    assert bool(grad.any()) == bool(pairs.any())
