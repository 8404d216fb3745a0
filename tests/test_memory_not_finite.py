"""Rows that are not finite are not stored, their gradient shows them, and other rows do as if they were not there."""

import pytest
import state
import torch
from memory_cases import OF_EACH_WAY, B, D, M, batches, memory_of, train

from xbn_ext import Contrastive, CrossBatchMemory, reference


@pytest.mark.parametrize("make", OF_EACH_WAY.values(), ids=OF_EACH_WAY)
@pytest.mark.parametrize("centred", [True, False], ids=["centred", "plain"])
def test_a_key_that_is_not_finite_is_as_if_it_were_not_there(make, centred, device):
    """It is not stored, and in no pair: loss and gradients are those of the others, also of what is learned."""
    *stored, (x, labels) = batches(4, torch.float64, device=device)
    mask = torch.arange(len(x), device=device) % 2 == 1
    results = []
    for there in (True, False):
        criterion = CrossBatchMemory(
            make(), D, M, memory_dtype=torch.float64, batch_weight=0.0, center_gradient=centred
        ).to(device)
        for rows, their_labels in stored:
            criterion(rows, their_labels)
        criterion.zero_grad()
        rows = torch.arange(len(x), device=device)
        given = x.clone()
        given[3] = torch.nan
        rows = rows if there else rows[rows != 3]
        given = given[rows].requires_grad_()
        value = criterion(given, labels[rows], enqueue_mask=mask[rows])
        value.backward()
        results.append([value.detach(), given.grad[~mask[rows]], [p.grad for p in criterion.parameters()]])
    assert results[0][0].isfinite()
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("make", OF_EACH_WAY.values(), ids=OF_EACH_WAY)
def test_a_row_that_is_not_finite_teaches_nothing_while_the_memory_takes_no_part(make, device):
    criterion = CrossBatchMemory(make(), D, M, batch_weight=0.0, warmup_steps=2).to(device)
    x = torch.randn(B, D, device=device)
    x[1, 1] = torch.inf
    value = criterion(x.requires_grad_(), torch.arange(B, device=device) % 3)
    value.backward()
    assert value == 0 and all(p.grad is None or (p.grad == 0).all() for p in criterion.parameters())


@pytest.mark.parametrize("make", [make for name, make in OF_EACH_WAY.items() if "learned" in name])
@pytest.mark.parametrize("batch_weight", [0.0, 1.0])
def test_a_loss_that_is_not_finite_has_no_finite_gradient_of_what_is_learned(make, batch_weight, device):
    """So a gradient scaler skips the step, also that of an optimizer that has nothing else."""
    criterion = CrossBatchMemory(make(), D, M, memory_dtype=torch.float64, batch_weight=batch_weight).to(device)
    for x, labels in batches(4, torch.float64, device=device):
        criterion(x, labels)
    x, labels = x.clone(), labels.clone()
    x[1, 1] = torch.nan
    value = criterion(x.requires_grad_(), labels)
    value.backward()
    assert value.isnan() and all(p.grad.isnan() for p in criterion.parameters())


@pytest.mark.parametrize("update", ["inplace", "deferred"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_never_count(bad, update, device):
    clean, dirty = (CrossBatchMemory(Contrastive(neg_margin=0.2), D, M, update=update).to(device) for _ in range(2))
    for x, labels in batches(10, device=device):
        value = clean(x, labels)
        spoilt, spoilt_labels = torch.cat([x, x[:2]]), torch.cat([labels, labels[:2]])
        spoilt[B:, 3] = bad
        assert value.isfinite() and dirty(spoilt, spoilt_labels).isnan()
        state.assert_same_state(memory_of(dirty), memory_of(clean), rtol=0, atol=0)
    x, labels = next(batches(1, device=device))
    assert torch.equal(clean(x, labels), dirty(x, labels))


def test_a_gradient_scaler_skips_the_step(device):
    network = torch.nn.Linear(D, D).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type)
    criterion = CrossBatchMemory(Contrastive(neg_margin=0.2), D, M).to(device)
    weights = network.weight.detach().clone()
    x, labels = next(batches(1, device=device))
    x[0, 0] = torch.inf
    scaler.scale(criterion(network(x), labels)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(network.weight, weights) and scaler.get_scale() < 65536
    assert criterion.bank.isfinite().all() and criterion.count == B - 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_gradient_of_a_row_that_is_not_finite_is_nan(bad, device):
    """A gradient scaler sees gradients only, also where neither normalisation nor the batch loss spreads the NaN."""
    criterion = CrossBatchMemory(Contrastive(neg_margin=0.2), D, M, normalize_embeddings=False, batch_weight=0.0)
    criterion.to(device)
    train(criterion, batches(3, device=device))
    x, labels = next(batches(1, device=device))
    x[2, 3] = bad
    x.requires_grad_()
    value = criterion(x, labels)
    value.backward()
    finite = torch.arange(B, device=device) != 2
    assert value.isnan() and x.grad[2].isnan().all() and x.grad[finite].isfinite().all()


@pytest.mark.parametrize("weights", [{"batch_weight": 0.0}, {"memory_weight": 0.0}], ids=str)
def test_a_weight_of_zero_hides_a_nan(weights, device):
    """A loss that does not count is not computed, in the specification as in the module."""
    criterion = CrossBatchMemory(Contrastive(), D, M, **weights).to(device)
    memory = state.to(reference.Memory.empty(M, D), device)
    for t, (x, labels) in enumerate(batches(2, torch.float64, device=device)):
        x[0, 0] = torch.nan
        value = criterion(x, labels)
        torch.testing.assert_close(value, reference.step(memory, x, labels, Contrastive(), **weights), equal_nan=True)
        assert value.isnan() == (t > 0 or "memory_weight" in weights), "an empty memory has no pairs"


def test_a_nan_while_warming_up(device):
    """No pairs, so a loss of 0, and still no gradient for a scaler to take."""
    options = {"batch_weight": 0.0, "warmup_steps": 2}
    criterion = CrossBatchMemory(Contrastive(), D, M, **options).to(device)
    memory = state.to(reference.Memory.empty(M, D), device)
    for x, labels in batches(3, torch.float64, device=device):
        x[0, 0] = torch.nan
        ours, truth = x.clone().requires_grad_(), x.clone().requires_grad_()
        value, true_value = (
            criterion(ours, labels),
            reference.step(memory, truth, labels, Contrastive(), **options),
        )
        value.backward(), true_value.backward()
        torch.testing.assert_close(value, true_value, equal_nan=True)
        torch.testing.assert_close(ours.grad, truth.grad, equal_nan=True)
        assert ours.grad[0].isnan().all() and ours.grad[1:].isfinite().all()
