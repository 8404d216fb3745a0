"""CrossBatchMemory.fill_from: the memory holds the rows of its batches, in any dtype, or stays as it was."""

import pytest
import state
import torch
import torch.nn.functional as F
from memory_cases import D, M, batches, train

from xbn_ext import Contrastive, CrossBatchMemory, reference
from xbn_ext.dtypes import MEMORY_DTYPES


def test_what_is_no_batches_is_named():
    with pytest.raises(TypeError, match="batches must be iterable, got NoneType"):
        CrossBatchMemory(Contrastive(), D, M).fill_from(None)


@pytest.mark.parametrize("update", ["inplace", "deferred"])
def test_fill_from(update, device):
    data = list(batches(3, device=device))
    criterion = CrossBatchMemory(Contrastive(), D, M, update=update).to(device)
    train(criterion, data)
    criterion.fill_from(data)
    rows = F.normalize(torch.cat([x for x, _ in data]), dim=1)
    torch.testing.assert_close(criterion.embedding_memory, rows)
    assert torch.equal(criterion.label_memory, torch.cat([y for _, y in data]))
    mean, std = criterion.target_moments
    torch.testing.assert_close(mean.float(), rows.mean(0))
    torch.testing.assert_close(std.float(), rows.std(0, correction=0))
    assert criterion.step == 3 and criterion.variance == 0
    assert all(criterion.stats()[name].isnan() for name in ("positives", "gap_before", "gain")), "of what was replaced"
    before = {k: v.clone() for k, v in criterion.state_dict().items()}
    with pytest.raises(ValueError, match="embeddings must be"):
        criterion.fill_from([data[0], (data[0][0][:, 1:], data[0][1])])
    assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())
    for odd, message in {
        (data[0][0],): "got a tuple of 1",
        (*data[0], data[0][1], 1): "got a tuple of 4",
        "ab": "got a str",
    }.items():
        with pytest.raises(ValueError, match=f"batches must yield .*embeddings, labels, ids.*, {message}"):
            criterion.fill_from([data[0], odd])
    assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())
    criterion.fill_from([[criterion.embedding_memory, criterion.label_memory]])  # lists, as a DataLoader has them
    torch.testing.assert_close(criterion.embedding_memory, rows)
    train(criterion, data)
    assert criterion.count == M


@pytest.mark.parametrize("memory_dtype", state.NARROW_DTYPES, ids=str)
def test_a_16_bit_memory_is_filled_with_standardised_rows(memory_dtype, device):
    criterion = CrossBatchMemory(Contrastive(), D, M, memory_dtype=memory_dtype, normalize_embeddings=False).to(device)
    x = (1e5 + 100 * torch.randn(M, D)).to(device)
    criterion.fill_from([(x, torch.arange(M, device=device))])
    assert criterion.count == M
    off = (criterion.embedding_memory - x).abs().max() / 100
    assert off <= 4 * torch.finfo(memory_dtype).eps


@pytest.mark.parametrize("memory_dtype", state.NARROW_DTYPES, ids=str)
def test_a_16_bit_memory_is_filled_whatever_the_first_batch(memory_dtype, device):
    """In the first batch a dimension hardly varies, as after a ReLU: other batches do not fit that spread."""
    criterion = CrossBatchMemory(Contrastive(), D, 3 * M, memory_dtype=memory_dtype).to(device)
    first, second = torch.nn.functional.normalize(torch.rand(2, M, D, device=device), dim=-1)
    first[:, 0] *= 1e-5
    labels = torch.arange(M, device=device)
    criterion.fill_from([(first, labels), (second, labels)])
    rows = torch.nn.functional.normalize(torch.cat([first, second]), dim=1)
    assert criterion.count == 2 * M
    assert (criterion.embedding_memory - rows).abs().max() <= 2 * torch.finfo(memory_dtype).eps
    torch.testing.assert_close(criterion.sums, reference.sums_of(criterion.bank[: 2 * M]), rtol=1e-12, atol=1e-12)
    mean, std = reference.bank_moments(criterion.sums, criterion.count)
    assert mean.abs().max() < 0.01 and (std - 1).abs().max() < 0.01


@pytest.mark.parametrize("batch_dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("memory_dtype", MEMORY_DTYPES, ids=str)
def test_a_memory_that_follows_no_drift_is_filled_with_the_rows(memory_dtype, batch_dtype, device):
    """As a step stores them; no map is left pending, no moments are a target."""
    filled, stepped = (
        CrossBatchMemory(Contrastive(), D, M, drift="none", memory_dtype=memory_dtype).to(device) for _ in range(2)
    )
    x, labels = next(batches(1, torch.float64, device=device))
    x[0] *= 1e300 if batch_dtype == torch.float64 else 1  # of finite length, in float64 only
    x = x.to(batch_dtype)
    filled.fill_from([(x, labels)])
    stepped(x, labels)
    assert filled.count == len(x)
    assert torch.equal(filled.bank, stepped.bank)
    for name in ("scale", "shift", "target_mean", "target_std", "variance"):
        assert torch.equal(getattr(filled, name), getattr(stepped, name)), name
