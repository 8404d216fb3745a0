"""Thousands of steps: rounding must not add up. float32, in place and deferred, against a float64 run."""

import pytest
import state
import torch
import torch.nn.functional as F
from conftest import only

from xbn_ext import Contrastive, CrossBatchMemory, ops, reference

pytestmark = pytest.mark.long
B, M, D = 16, 512, 24


def drifting_embeddings(steps):
    generator = torch.Generator().manual_seed(3)
    mean, log_std = torch.randn(D, generator=generator), torch.zeros(D)
    centres = torch.randn(40, D, generator=generator)
    for _ in range(steps):
        mean = mean + 0.02 * torch.randn(D, generator=generator)
        log_std = log_std + 0.01 * torch.randn(D, generator=generator)
        labels = torch.randint(40, (B,), generator=generator)
        x = mean + log_std.exp() * (centres[labels] + torch.randn(B, D, generator=generator))
        yield x, labels


def distance(rows, true_rows):
    """Largest distance between a stored direction and where it should be."""
    a, b = F.normalize(rows.double(), dim=1), F.normalize(true_rows.double(), dim=1)
    return float((a - b).norm(dim=1).max())


@only(compiled=True)
@pytest.mark.parametrize("steps", [3000])
@pytest.mark.parametrize("drift", ["xbn", "axbn"])
def test_float32_follows_float64(drift, steps, device):
    loss = Contrastive(neg_margin=0.4)
    options = {"drift": drift, "batch_weight": 0.0}
    truth = CrossBatchMemory(loss, D, M, memory_dtype=torch.float64, **options).to(device)
    runs = {
        update: CrossBatchMemory(loss, D, M, update=update, **options).to(device) for update in ("inplace", "deferred")
    }
    in_torch = state.to(reference.Memory.empty(M, D, torch.float32), device)
    value_error, row_error = (dict.fromkeys([*runs, "torch"], 0.0) for _ in range(2))

    with torch.no_grad():
        for t, (x, labels) in enumerate(drifting_embeddings(steps)):
            x, labels = x.to(device), labels.to(device)
            true_value = truth(x.double(), labels)
            values = {update: criterion(x, labels) for update, criterion in runs.items()}
            values["torch"] = reference.step(in_torch, x, labels, loss, **options)
            for name, value in values.items():
                value_error[name] = max(value_error[name], float((value - true_value).abs() / (1 + true_value)))
            if t % 100 < 99:
                continue
            true_rows = truth.embedding_memory
            row_error["torch"] = max(row_error["torch"], distance(in_torch.bank, true_rows))
            for update, criterion in runs.items():
                rows = criterion.embedding_memory
                row_error[update] = max(row_error[update], distance(rows, true_rows))
                mean, std = rows.double().mean(0), rows.double().std(0, correction=0)
                torch.testing.assert_close(mean, true_rows.mean(0), rtol=0, atol=5e-7)
                torch.testing.assert_close(std, true_rows.std(0, correction=0), rtol=2e-6, atol=0)

    for update in runs:
        assert value_error[update] <= 2 * value_error["torch"] + 2e-7, value_error
        assert row_error[update] <= 2 * row_error["torch"] + 2e-7, row_error
    # In place, a row is rounded again at every step of its life; deferred, only once.
    assert row_error["deferred"] <= row_error["inplace"], row_error


@pytest.mark.parametrize("steps", [1100])
def test_sums_that_follow_the_map(steps, ops, device):
    """On a GPU the sums are mapped as the rows are, and counted at every 1,024th step: what rounds each row is not in
    them, and must not add up to more than a random walk of so many steps."""
    m = state.to(reference.Memory.empty(64, D, torch.float32), device)
    largest = counted = 0.0
    for t, (x, labels) in enumerate(drifting_embeddings(steps)):
        with torch.no_grad():
            ops.step_(m, x.to(device), labels.to(device), Contrastive(neg_margin=0.4), normalize_embeddings=False)
        rows = m.bank[: int(m.count)].double()
        off = float((m.sums - reference.sums_of(rows)).abs().max() / reference.sums_of(rows).abs().max())
        largest = max(largest, off)
        if t == 1024:
            counted = off
    assert largest < 4 * 2.0**-25 * (1024 / 64) ** 0.5
    assert counted < 1e-13


@only(compiled=True)
@pytest.mark.parametrize("steps", [12_000])
@pytest.mark.parametrize("drift", ["axbn", "ema"])
def test_a_small_deferred_memory_outlives_its_map(drift, steps, device):
    """Rows enter a little wider than the biased std of a small batch, so the map shrinks at every step: without
    standardize_ the stored coordinates overflow and the memory stops taking rows."""
    loss = Contrastive(neg_margin=0.4)
    truth, deferred = (
        CrossBatchMemory(loss, 4, 64, drift=drift, batch_weight=0.0, update=update, memory_dtype=dtype).to(device)
        for update, dtype in (("inplace", torch.float64), ("deferred", torch.float32))
    )
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(16, device=device)
    smallest = torch.inf
    with torch.no_grad():
        for t in range(steps):
            x = torch.randn(16, 4, generator=generator).to(device) + 0.5
            deferred(x, labels)
            truth(x.double(), labels)
            assert deferred.head == truth.head, f"step {t}"
            smallest = min(smallest, float(deferred.scale.min()))
    assert distance(deferred.embedding_memory, truth.embedding_memory) < 1e-5
    assert smallest > 1e-3


@only(compiled=True)
@pytest.mark.parametrize("memory_dtype", state.NARROW_DTYPES, ids=str)
def test_a_16_bit_memory_is_rounded_once(memory_dtype, device):
    """Rows are rounded as they are stored, and then only when the bank is standardised again: errors do not add up."""
    options = {"batch_weight": 0.0, "drift": "axbn"}
    truth = CrossBatchMemory(Contrastive(neg_margin=0.4), D, M, memory_dtype=torch.float64, **options).to(device)
    narrow = CrossBatchMemory(Contrastive(neg_margin=0.4), D, M, memory_dtype=memory_dtype, **options).to(device)
    assert narrow.update == "deferred"
    errors = []
    with torch.no_grad():
        for t, (x, labels) in enumerate(drifting_embeddings(1200)):
            x, labels = x.to(device), labels.to(device)
            value, true_value = narrow(x, labels), truth(x.double(), labels)
            assert (value - true_value).abs() <= 4 * torch.finfo(memory_dtype).eps * (1 + true_value)
            if t % 100 == 99:
                errors.append(distance(narrow.embedding_memory, truth.embedding_memory))
    assert narrow.bank.dtype == memory_dtype
    assert max(errors) <= 4 * torch.finfo(memory_dtype).eps
    assert max(errors[6:]) <= 1.5 * max(errors[:6])


@only(compiled=True)
@pytest.mark.parametrize("steps", [24_414])
def test_sums_of_a_billion_rows(steps, device):
    """What each batch adds to the sums and takes away is rounded to what sums so large can hold: 6e-17 of them. That
    must not add up over as many rows as go into a memory between two recounts."""
    B, D, rows = 4096, 2, 10**9
    m = state.to(reference.Memory.empty(B, D, torch.float32), device)  # a block; the rest does not change
    m.bank.normal_(), m.count.fill_(B)
    rest = torch.tensor([0.3, 1.0], dtype=torch.float64, device=device)[:, None].expand(2, D) * (rows - B)
    m.sums.copy_(reference.sums_of(m.bank) + rest)
    z, labels = torch.empty(B, D, device=device), torch.zeros(B, dtype=torch.int64, device=device)
    for _ in range(steps):
        ops.enqueue_(m.bank, m.bank_labels, m.sums, m.head, m.count, z.normal_(), labels, None, m.scale, m.shift)
    off = m.sums - (reference.sums_of(m.bank) + rest)
    assert off.abs().max() / rows < 1e-12
