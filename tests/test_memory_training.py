"""What a training loop expects of CrossBatchMemory: warm-up, evaluation, gradients that add up, steps that compile."""

import shutil

import pytest
import state
import torch
from conftest import only
from memory_cases import OF_EACH_WAY, B, D, M, batches, memory_of, train
from torch import nn

from xbn_ext import Contrastive, CrossBatchMemory, SupCon, reference


@pytest.mark.parametrize("update", ["inplace", "deferred"])
@pytest.mark.parametrize("enqueue", ["after", "before"])
def test_accumulated_gradients(update, enqueue, device):
    """The memory may move on between a loss and its backward."""
    network = torch.nn.Linear(D, D).to(device)
    gradients = []
    for at_once in (True, False):
        criterion = CrossBatchMemory(Contrastive(neg_margin=0.2), D, M, update=update, enqueue=enqueue).to(device)
        network.zero_grad()
        losses = []
        for x, labels in batches(4, device=device):
            losses.append(criterion(network(x), labels) / 4)
            if not at_once:
                losses.pop().backward()
        if at_once:
            torch.stack(losses).sum().backward()
        gradients.append(network.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_the_pending_map_counts_whatever_the_update(device):
    deferred = CrossBatchMemory(Contrastive(neg_margin=0.2), D, M, update="deferred").to(device)
    train(deferred, batches(9, device=device))
    inplace = CrossBatchMemory(Contrastive(neg_margin=0.2), D, M).to(device)
    inplace.load_state_dict(deferred.state_dict())
    x, labels = next(batches(1, device=device))
    assert torch.equal(deferred.eval()(x, labels), inplace.eval()(x, labels))
    a, b = train(deferred.train(), batches(3, device=device)), train(inplace.train(), batches(3, device=device))
    for (value, grad), (want, want_grad) in zip(a, b, strict=True):
        torch.testing.assert_close(value, want)
        torch.testing.assert_close(grad, want_grad)


def test_autocast_changes_nothing(device):
    plain, cast = (CrossBatchMemory(Contrastive(), D, M).to(device) for _ in range(2))
    for x, labels in batches(4, device=device):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            value = cast(x, labels)
        assert torch.equal(value, plain(x, labels))


def test_eval_mode_only_reads(device):
    criterion = CrossBatchMemory(Contrastive(neg_margin=0.1), D, M, enqueue="before").to(device)
    train(criterion, batches(5, device=device))
    criterion.eval()
    before = {k: v.clone() for k, v in criterion.state_dict().items()}
    x, labels = next(batches(1, device=device))
    assert criterion(x, labels) > 0
    assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())


def test_warm_up_fills_but_does_not_count(device):
    data = list(batches(6, device=device))
    batch_only = train(CrossBatchMemory(Contrastive(), D, M, memory_weight=0.0).to(device), data)
    criterion = CrossBatchMemory(Contrastive(), D, M, warmup_steps=4).to(device)
    warming = train(criterion, data)
    for t, ((value, _), (want, _)) in enumerate(zip(warming, batch_only, strict=True)):
        assert torch.equal(value, want) == (t < 4)
    assert criterion.count == M


@pytest.mark.parametrize("drift", ["xbn", "axbn", "ema"])
@pytest.mark.parametrize("update", ["inplace", "deferred"])
def test_the_memory_has_the_target_moments(drift, update, device):
    criterion = CrossBatchMemory(
        Contrastive(), D, 21 * B, drift=drift, update=update, normalize_embeddings=False, memory_dtype=torch.float64
    ).to(device)
    train(criterion, batches(20, device=device))
    x, labels = next(batches(1, device=device))
    criterion(x + 1, labels)
    mean, std = criterion.target_moments
    rows = criterion.embedding_memory[: 20 * B]  # without those of this batch, which came after the move
    torch.testing.assert_close(rows.mean(0), mean)
    torch.testing.assert_close(rows.std(0, correction=0), std)
    if drift == "xbn":
        torch.testing.assert_close(mean, (x + 1).double().mean(0))


@pytest.mark.parametrize("dynamic", [True, None])
def test_compiled_numbers_may_change(dynamic):
    """The compiler does not take `eps` for a constant."""
    torch._dynamo.reset()
    criterion = CrossBatchMemory(SupCon(nn.Parameter(torch.tensor(0.1))), D, M, center_gradient=True)
    fast = torch.compile(criterion, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for eps in (1e-6, 1e-3):
        criterion.eps = eps
        x, labels = torch.randn(6, D) / 100, torch.arange(6) % 3
        fast(x, labels).backward()
        criterion.eval()
        torch.testing.assert_close(fast(x, labels), criterion(x, labels))
        criterion.train()


@only(compiled=True)  # the emulated ops have no fake kernels
@pytest.mark.parametrize("backend", ["inductor", pytest.param("aot_eager", marks=pytest.mark.long)])
@pytest.mark.parametrize("enqueue", ["after", pytest.param("before", marks=pytest.mark.long)])
def test_fullgraph_compile(enqueue, backend, device):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("no compiler")
    torch._dynamo.reset()
    loss, options = Contrastive(neg_margin=0.2), {"warmup_steps": 2, "enqueue": enqueue}
    plain, compiled = (CrossBatchMemory(loss, D, M, **options).to(device) for _ in range(2))
    fast = torch.compile(compiled, fullgraph=True, backend=backend)
    for x, labels in batches(5, device=device):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        call = {"ids": torch.randint(-2, 30, (B,), device=device), "enqueue_mask": labels % 3 == 0}
        value, want = fast(a, labels, **call), plain(b, labels, **call)
        value.backward(), want.backward()
        torch.testing.assert_close(value, want)
        torch.testing.assert_close(a.grad, b.grad)
    state.assert_same_state(memory_of(compiled), memory_of(plain), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(compiled.stats(), plain.stats())
    assert all(number.isfinite() for number in plain.stats().values())


@pytest.mark.parametrize("way", ["one op", "a learned temperature"])
def test_a_centred_gradient_compiles(way):
    torch._dynamo.reset()
    plain, compiled = (CrossBatchMemory(OF_EACH_WAY[way](), D, M, center_gradient=True) for _ in range(2))
    fast = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for x, labels in batches(3):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        value, want = fast(a, labels), plain(b, labels)
        value.backward(), want.backward()
        torch.testing.assert_close(value, want)
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.singly
@pytest.mark.parametrize("drift", ["axbn", *(pytest.param(drift, marks=pytest.mark.long) for drift in ("xbn", "ema"))])
@pytest.mark.parametrize("memory_dtype", state.NARROW_DTYPES, ids=str)
def test_a_16_bit_memory_stores_a_dimension_that_lives_again(memory_dtype, drift, device):
    """As a unit of a ReLU that was 0 for long: the rows in which it is not are stored like the others."""
    criterion = CrossBatchMemory(Contrastive(), D, M, drift=drift, memory_dtype=memory_dtype).to(device)
    for t, (x, labels) in enumerate(batches(220, size=8, device=device)):
        x = x.abs()
        if 10 <= t < 200:
            x[:, 0] = 0
        criterion(x, labels)
        assert (criterion.age_memory == 1).sum() == len(x), t
    _, std = reference.bank_moments(criterion.sums, criterion.count)
    assert criterion.scale[0] * std[0] > 0.01
