"""A memory that is stored, copied, cast or reset has the same numbers later; a state that does not fit is refused."""

import copy
import io
import pickle

import pytest
import torch
from memory_cases import STATE, B, D, M, batches, train

from xbn_ext import Contrastive, CrossBatchMemory


@pytest.mark.parametrize("update", ["inplace", "deferred"])
def test_a_resumed_run_continues_bit_for_bit(update, device):
    options = {"drift": "axbn", "update": update, "warmup_steps": 2}
    data = list(batches(20, device=device))
    straight = CrossBatchMemory(Contrastive(), D, M, **options).to(device)
    expected = train(straight, data)
    for stop in (1, 7, 13):
        first = CrossBatchMemory(Contrastive(), D, M, **options).to(device)
        train(first, data[:stop])
        second = CrossBatchMemory(Contrastive(), D, M, **options).to(device)
        second.load_state_dict(first.state_dict())
        for (value, grad), (want, want_grad) in zip(train(second, data[stop:]), expected[stop:], strict=True):
            assert torch.equal(value, want) and torch.equal(grad, want_grad)
        for name, tensor in straight.state_dict().items():
            assert torch.equal(second.state_dict()[name], tensor), name


def test_all_state_is_in_the_state_dict():
    assert set(CrossBatchMemory(Contrastive(), D, M).state_dict()) == set(STATE)


@pytest.mark.parametrize("options", [{}, {"update": "deferred"}, {"memory_dtype": torch.bfloat16}], ids=str)
def test_copies_are_independent(options, device):
    """Taken in the middle of a full ring."""
    data = list(batches(8, device=device))
    original = CrossBatchMemory(Contrastive(neg_margin=0.2), D, M, **options).to(device)
    train(original, data[:5])
    assert original.count == M and original.head == 20
    file = io.BytesIO()
    torch.save(original, file)
    file.seek(0)
    copies = [
        copy.deepcopy(original),
        pickle.loads(pickle.dumps(original)),
        torch.load(file, weights_only=False),
        copy.deepcopy(original).to(torch.float16).to("cpu").to(device),
    ]
    expected = train(original, data[5:])
    for other in copies:
        assert int(other.step) == 5
        for (value, grad), (want, want_grad) in zip(train(other, data[5:]), expected, strict=True):
            assert torch.equal(value, want) and torch.equal(grad, want_grad)


def test_a_state_that_does_not_fit_is_refused_whole(device):
    trained, other = (CrossBatchMemory(Contrastive(), D, size).to(device) for size in (M, M + 1))
    train(trained, batches(3, device=device))
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"bank must be \[101, 16\].* memory_size=101"):
        other.load_state_dict(trained.state_dict())
    partial = {k: v for k, v in trained.state_dict().items() if k != "head"}
    with pytest.raises(RuntimeError, match="head"):
        other.load_state_dict(partial)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_half_keeps_the_state_exact(device):
    criterion = CrossBatchMemory(Contrastive(), D, M).to(device)
    train(criterion, batches(5, device=device))
    before = {k: v.clone() for k, v in criterion.state_dict().items()}
    criterion.half().double().bfloat16()
    for name, tensor in criterion.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])


def test_reset_queue_is_a_new_start(device):
    data = list(batches(6, device=device))
    criterion = CrossBatchMemory(Contrastive(), D, M, update="deferred").to(device)
    first = train(criterion, data)
    criterion.reset_queue()
    assert criterion.embedding_memory.shape == (0, D) and criterion.label_memory.shape == (0,)
    for (value, grad), (want, want_grad) in zip(train(criterion, data), first, strict=True):
        assert torch.equal(value, want) and torch.equal(grad, want_grad)


def test_a_checkpoint_is_not_rounded_in_silence():
    wide, narrow = (
        CrossBatchMemory(Contrastive(), D, M),
        CrossBatchMemory(Contrastive(), D, M, memory_dtype=torch.float16),
    )
    wide(torch.randn(B, D), torch.arange(B))
    with pytest.raises(RuntimeError, match=r"bank is torch\.float32 and would be rounded to torch\.float16; nothing"):
        narrow.load_state_dict(wide.state_dict())
    assert narrow.count == 0
    wide.load_state_dict(narrow.state_dict())
    assert wide.bank.dtype == torch.float32
