"""A temperature, a bias or a boundary that is learned: its gradient, its place in the memory, and what can't be."""

import copy
import pickle

import pytest
import torch
from loss_cases import problem

from xbn_ext import CrossBatchMemory, Margin, NTXent, SigLIP, SupCon, reference
from xbn_ext import ops as cpu_ops
from xbn_ext.losses.learned import at


@pytest.mark.parametrize("loss", [SupCon, NTXent])
def test_gradient_of_the_temperature(loss, width, ops, device, dtype):
    z, labels, bank, bank_labels = problem(70, 500, width, dtype, device)

    def run(function, z, bank, temperature):
        temperature = torch.tensor(temperature, dtype=z.dtype, device=device, requires_grad=True)
        z = z.clone().requires_grad_()
        value = function(z, labels, bank, bank_labels, loss(temperature))
        return [value.detach(), *torch.autograd.grad(value, (z, temperature))]

    results = run(ops.memory_loss, z, bank, 0.2)
    fixed = ops.memory_loss(z, labels, bank, bank_labels, loss(0.2))
    torch.testing.assert_close(results[0], fixed, rtol=1e-5, atol=0)
    for result, truth in zip(results, run(reference.memory_loss, z.double(), bank.double(), 0.2), strict=True):
        torch.testing.assert_close(result.double(), truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [SupCon, NTXent])
def test_a_learned_temperature_is_a_parameter_of_the_memory(loss):
    criterion = CrossBatchMemory(loss(torch.nn.Parameter(torch.tensor(0.5))), 8, 64)
    assert [name for name, _ in criterion.named_parameters()] == ["temperature"]
    for copied in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert copied.loss.temperature is copied.temperature is not criterion.temperature
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.05)
    step = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        optimizer.zero_grad()
        step(torch.randn(24, 8), torch.randint(5, (24,))).backward()
        optimizer.step()
    assert criterion.temperature != 0.5 and criterion.temperature.isfinite()
    criterion.fill_from([(torch.randn(24, 8), torch.randint(5, (24,)))])
    assert criterion.loss.temperature is criterion.temperature


@pytest.mark.parametrize("loss", [SupCon, NTXent])
def test_a_parameter_that_replaces_the_temperature_is_the_one_that_counts(loss):
    def memory(temperature):
        return CrossBatchMemory(loss(torch.nn.Parameter(torch.tensor(temperature))), 8, 64)

    x, labels = torch.randn(24, 8), torch.randint(5, (24,))
    other = memory(0.2)
    other(x, labels)
    state = copy.deepcopy(other.state_dict())
    expected = other(x, labels)
    assigned, emptied = memory(0.5), memory(0.5).to("meta").to_empty(device="cpu")
    assigned.load_state_dict(copy.deepcopy(state), assign=True)
    emptied.load_state_dict(state)
    for criterion in (assigned, emptied):
        assert criterion.loss.temperature is criterion.temperature
        value = criterion(x, labels)
        value.backward()
        assert torch.equal(value, expected) and criterion.temperature.grad != 0
    called = memory(0.5)
    called.load_state_dict(state | {"temperature": called.temperature.detach()})
    value = torch.func.functional_call(called, {"temperature": torch.tensor(0.2)}, (x, labels))
    assert torch.equal(value, expected)


def test_a_learned_temperature_that_is_no_parameter():
    with pytest.raises(ValueError, match=r"must be an nn\.Parameter to be learned"):
        CrossBatchMemory(SupCon(torch.tensor(0.0, requires_grad=True).exp()), 8, 64)
    with torch.autograd.forward_ad.dual_level():
        temperature = torch.autograd.forward_ad.make_dual(torch.tensor(1.0), torch.tensor(1.0))
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            cpu_ops.memory_loss(*problem(3, 4, 5, torch.float32), SupCon(temperature))
    learned = CrossBatchMemory(SupCon(torch.nn.Parameter(torch.tensor(0.5))), 8, 64)
    trained = CrossBatchMemory(SupCon(), 8, 64)
    trained(torch.randn(5, 8), torch.arange(5))
    with pytest.raises(RuntimeError, match="temperature"):
        learned.load_state_dict(trained.state_dict())
    assert torch.equal(learned.bank, trained.bank), "as everywhere in torch, what is known has been loaded by then"


def learned(kind, dtype, device, shape=()):
    """A loss, and what it learns."""
    own = [torch.full(shape, x, dtype=dtype, device=device).requires_grad_() for x in (0.3, -1.5, 0.45)]
    loss = SigLIP(*own[:2]) if kind == "siglip" else Margin(0.3, own[2])
    return loss, own[:2] if kind == "siglip" else own[2:]


@pytest.mark.parametrize("kind", ["siglip", "margin"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_gradient_of_an_offset(kind, renormalize, width, ops, device, dtype):
    z, labels, bank, bank_labels = problem(70, 500, width, dtype, device)
    anchors, options = torch.rand(70, device=device) < 0.8, {"renormalize": renormalize}

    def run(module, z, bank, shape):
        loss, own = learned(kind, z.dtype, device, shape)
        z = z.clone().requires_grad_()
        value = module.memory_loss(z, labels, bank, bank_labels, loss, anchors=anchors, **options)
        value = value + 2 * module.batch_loss(z, labels, loss, anchors=anchors, **options)
        return [value.detach(), *(g.reshape(-1) for g in torch.autograd.grad(value, (z, *own)))]

    truth = run(reference, z.double(), bank.double(), ())
    for shape in ((), (1,)):
        for result, true in zip(run(ops, z, bank, shape), truth, strict=True):
            tolerance = 1e-9 if dtype == torch.float64 else 1e-4
            largest = float(true.abs().max())
            torch.testing.assert_close(result.double(), true, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("kind", ["siglip", "margin"])
def test_a_memory_learns_an_offset(kind):
    loss, own = learned(kind, torch.float64, "cpu")
    names = [name for name in type(loss).may_be_learned]
    parameters = {name: torch.nn.Parameter(t.detach().clone()) for name, t in zip(names, own, strict=True)}
    memory = CrossBatchMemory(at(loss, **parameters), 12, 50, memory_dtype=torch.float64)
    truth = reference.Memory.empty(50, 12)
    assert [name for name, _ in memory.named_parameters()] == names
    optimizers = [torch.optim.SGD(parameters, lr=0.01) for parameters in (memory.parameters(), own)]
    for _ in range(4):
        x, labels = torch.randn(16, 12, dtype=torch.float64), torch.randint(6, (16,))
        expected = reference.step(truth, x, labels, loss)
        value = memory(x, labels)
        for optimizer, v in zip(optimizers, (value, expected), strict=True):
            optimizer.zero_grad()
            v.backward()
            optimizer.step()
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(list(memory.parameters()), own, check_dtype=False)
    memory.eval()
    with torch.no_grad():
        torch.testing.assert_close(memory(x, labels), CrossBatchMemory.__call__(copy.deepcopy(memory), x, labels))
    memory.reset_parameters()
    assert float(getattr(memory, names[-1]).detach()) == pytest.approx(-1.5 if kind == "siglip" else 0.45)


def test_one_op_has_no_gradient_for_an_offset():
    loss, _ = learned("margin", torch.float32, "cpu")
    memory = CrossBatchMemory(Margin(), 8, 50)
    with pytest.raises(TypeError, match="step_: this op has no gradient for a beta that is learned"):
        cpu_ops.step_(memory, torch.randn(4, 8), torch.arange(4), loss)
    with torch.no_grad():
        cpu_ops.step_(memory, torch.randn(4, 8), torch.arange(4), loss)


@pytest.mark.parametrize("kind", ["siglip", "margin"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_an_offset_that_is_not_finite_leaves_the_memory_alone(kind, number):
    loss, _ = learned(kind, torch.float32, "cpu")
    name = loss.offset
    for value in (torch.nn.Parameter(torch.tensor(0.1)), torch.tensor(0.1)):
        memory = CrossBatchMemory(
            at(loss, temperature=0.1, bias=value) if kind == "siglip" else at(loss, beta=value), 8
        )
        batch = torch.randn(6, 8), torch.arange(6) % 2
        memory(*batch)
        before = {name: tensor.clone() for name, tensor in memory.named_state()}
        value.data.fill_(number)
        with pytest.raises(ValueError, match=f"{name} must be a finite number, got {number}"):
            memory(*batch)
        torch.testing.assert_close(dict(memory.named_state()), before, rtol=0, atol=0, equal_nan=True)
    memory = CrossBatchMemory(at(memory.loss, **{name: torch.empty((), device="meta")}), 8)
    with pytest.raises(ValueError, match=f"{name} is on the meta device, which holds no values"):
        memory(*batch)


@pytest.mark.parametrize("first", ["x", "temperature", "bias"])
@pytest.mark.parametrize("second", ["x", "temperature", "bias"])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_no_second_derivative_is_left_out(first, second, weights):
    """Not even one by what the first was not by."""
    loss = SigLIP(torch.nn.Parameter(torch.tensor(0.2)), torch.nn.Parameter(torch.tensor(-1.0)))
    memory = CrossBatchMemory(loss, 8, 20, batch_weight=weights[0], memory_weight=weights[1])
    x, labels = torch.randn(6, 8, requires_grad=True), torch.arange(6) % 2
    memory(x, labels)
    by = {"x": x, **dict(memory.named_parameters())}
    (grad,) = torch.autograd.grad(memory(x, labels), by[first], create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated only once"):
        torch.autograd.grad(grad.sum(), by[second], allow_unused=True)


def test_an_offset_has_no_forward_mode_derivative():
    z, labels, bank, bank_labels = problem(4, 10, 3)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.tensor(-1.0), torch.tensor(1.0))
        for function, given in ((cpu_ops.memory_loss, (bank, bank_labels)), (cpu_ops.batch_loss, ())):
            for loss in (SigLIP(0.1, dual), Margin(0.1, dual)):
                with pytest.raises(RuntimeError, match="no forward-mode derivative"):
                    function(z, labels, *given, loss)
