"""Every loss in CrossBatchMemory: whole steps, deterministic, in 16 bits, and compiled."""

import pytest
import torch
from conftest import only
from loss_cases import each_kind_of_loss, every_loss, few_losses, problem

from xbn_ext import CrossBatchMemory, reference


@pytest.mark.singly
@each_kind_of_loss
def test_deterministic_algorithms_and_accumulated_gradients(loss, ops, device, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which torch asks for
    torch.use_deterministic_algorithms(True)
    try:
        z, *rest = problem(40, 300, 16, torch.float32, device)
        z.requires_grad_()
        ops.memory_loss(z, *rest, loss).backward()
        once = z.grad.clone()
        (0.5 * ops.memory_loss(z, *rest, loss)).backward()
        assert torch.equal(z.grad, once + 0.5 * once)
        criterion = CrossBatchMemory(loss, 16, 64).to(device)
        for _ in range(3):
            criterion(z, rest[0]).backward()
    finally:
        torch.use_deterministic_algorithms(False)


@each_kind_of_loss
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_16_bit_embeddings_and_autocast(loss, low):
    """Computed in float32 on the embeddings as they are; the gradient comes back in their dtype."""
    x, labels = torch.randn(24, 16), torch.randint(5, (24,))
    plain, narrow = CrossBatchMemory(loss, 16, 64), CrossBatchMemory(loss, 16, 64)
    for _ in range(3):
        rounded = x.to(low).requires_grad_()
        expected = plain(x.to(low).float(), labels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = narrow(rounded, labels)
        assert value.dtype == torch.float32 and torch.equal(value, expected)
        value.backward()
        assert rounded.grad.dtype == low


@pytest.mark.singly
@only(dtype="f64")  # over many steps no other agrees pair by pair
@every_loss
@pytest.mark.parametrize("update", ["inplace", "deferred"])
@pytest.mark.parametrize("enqueue", ["after", "before"])
def test_step_is_the_reference_step(loss, update, enqueue, ops, device, dtype):
    ours = CrossBatchMemory(loss, 12, 50, update=update, enqueue=enqueue, memory_dtype=torch.float64).to(device)
    truth = reference.Memory.empty(50, 12)
    centres = torch.randn(6, 12, dtype=torch.float64)
    for _ in range(6):
        labels = torch.randint(6, (16,))
        x = (centres[labels] + torch.randn(16, 12)).requires_grad_()
        (expected_grad,) = torch.autograd.grad(
            expected := reference.step(truth, x, labels, loss, update=update, enqueue=enqueue), x
        )
        y = x.detach().to(device).requires_grad_()
        value = ours(y, labels.to(device))
        value.backward()
        torch.testing.assert_close(value.cpu(), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(y.grad.cpu(), expected_grad, rtol=1e-8, atol=1e-10)


@few_losses
def test_compiles_without_a_break_and_trains_to_the_same_numbers(loss):
    def train(compiled):
        torch.manual_seed(0)
        network = torch.nn.Linear(10, 8)
        criterion = CrossBatchMemory(loss, 8, 64)
        step = lambda x, y: criterion(network(x), y)  # noqa: E731
        if compiled:
            step = torch.compile(step, fullgraph=True, backend="aot_eager")
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        values = []
        for _ in range(5):
            x, y = torch.randn(24, 10), torch.randint(5, (24,))
            value = step(x, y)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            values.append(value.detach())
        return torch.stack([*values, *(p.sum().detach() for p in network.parameters())])

    torch._dynamo.reset()
    torch.testing.assert_close(train(True), train(False), rtol=1e-5, atol=1e-6)


@each_kind_of_loss
def test_opcheck(loss):
    z, labels, bank, bank_labels = problem(5, 11, 7, torch.float32)
    args = (labels, bank, bank_labels, *[None] * 6, loss.kind, loss.parameters, True, 1e-6, True)
    torch.library.opcheck(torch.ops.xbn_ext.memory_loss.default, (z.requires_grad_(), *args))
