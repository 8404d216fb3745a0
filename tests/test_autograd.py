"""What autograd may do with a criterion: recomputing it is refused, a backward that needs what has been overwritten
raises, and nothing that the loss itself needs in backward is written."""

import pytest
import torch
from op_calls import ARGUMENTS, WRITING, written_by
from torch import nn
from torch.utils.checkpoint import checkpoint

from xbn_ext import Contrastive, CrossBatchMemory, SmoothAP, SupCon, ops

B, D, M = 8, 16, 32
REFUSED = "called during a backward pass, as activation checkpointing does"


def labels():
    return torch.arange(B) % 4


def checkpointed(use_reentrant, compiled, backend="aot_eager", **options):
    """One step of a network and a criterion, both recomputed in backward."""
    torch._dynamo.reset()
    network = nn.Linear(D, D)
    criterion = CrossBatchMemory(Contrastive(neg_margin=0.2), D, M, **options)

    def step(x):
        return criterion(network(x), labels())

    if compiled == "inside":
        step = torch.compile(step, backend=backend, fullgraph=True)

    def recomputed(x):
        return checkpoint(step, x, use_reentrant=use_reentrant)

    if compiled == "around":
        recomputed = torch.compile(recomputed, backend=backend)
    recomputed(torch.randn(B, D, requires_grad=True)).backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputed_criterion_raises(use_reentrant):
    with pytest.raises(RuntimeError, match=REFUSED):
        checkpointed(use_reentrant, compiled=None)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_loss_whose_backward_runs_in_forward_is_not_recomputed_there(use_reentrant):
    """Else the step would end with the memory moved and nothing stored."""
    criterion = CrossBatchMemory(SmoothAP(), D, M)
    criterion(torch.randn(2 * B, D), torch.arange(2 * B) % 4)
    value = checkpoint(criterion, torch.randn(B, D, requires_grad=True), labels(), use_reentrant=use_reentrant)
    assert int(criterion.count) == 3 * B
    with pytest.raises(RuntimeError, match=REFUSED):
        value.backward()


@pytest.mark.parametrize(
    "options",
    [
        {},
        *(
            pytest.param(options, marks=pytest.mark.long)
            for options in (
                {"update": "deferred"}, {"warmup_steps": 1}, {"enqueue": "before"}, {"drift": "none"},
                {"batch_weight": 0.0},
            )
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_recomputed_and_compiled_criterion_raises(options):
    for compiled in ("inside", "around"):
        with pytest.raises(RuntimeError, match=REFUSED):
            checkpointed(False, compiled, **options)


@pytest.mark.long
@pytest.mark.parametrize("compiled", ["inside", "around"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_inductor_keeps_the_check(compiled, use_reentrant):
    with pytest.raises(RuntimeError, match=REFUSED):
        checkpointed(use_reentrant, compiled, backend="inductor")


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("at_first", [True, False], ids=["train", "eval"])
def test_evaluation_is_no_way_round(use_reentrant, at_first):
    """A memory that has moved since the first call, in another mode, would rank another loss."""
    network = nn.Linear(D, D)
    criterion = CrossBatchMemory(Contrastive(neg_margin=0.2), D, M).train(at_first)
    x = torch.randn(B, D, requires_grad=True)
    value = checkpoint(lambda x: criterion(network(x), labels()), x, use_reentrant=use_reentrant)
    criterion.train(not at_first)
    with pytest.raises(RuntimeError, match=REFUSED):
        value.backward()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_temperature_that_learns_is_reason_enough(compiled):
    """Of embeddings that learn nothing."""
    torch._dynamo.reset()
    criterion = CrossBatchMemory(SupCon(nn.Parameter(torch.tensor(0.2))), D, M)
    step = torch.compile(criterion, backend="aot_eager") if compiled else criterion
    value = checkpoint(lambda x: step(x, labels()), torch.randn(B, D), use_reentrant=False)
    criterion.eval()
    with pytest.raises(RuntimeError, match=REFUSED):
        value.backward()


def test_a_criterion_without_gradient_may_be_called_in_backward():
    """As a hook that only logs does."""
    criterion = CrossBatchMemory(Contrastive(neg_margin=0.2), D, M).eval()
    x, seen = torch.randn(B, D, requires_grad=True), []
    x.register_hook(lambda grad: seen.append(criterion(grad.detach(), labels())))
    x.square().sum().backward()
    assert len(seen) == 1


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", [{}, {"update": "deferred"}, {"drift": "none"}], ids=str)
def test_a_backward_that_needs_the_overwritten_memory_raises(options, compiled):
    torch._dynamo.reset()
    criterion = CrossBatchMemory(Contrastive(neg_margin=0.2), D, B, **options)
    step = torch.compile(criterion, backend="aot_eager", fullgraph=True) if compiled else criterion
    step(torch.randn(B, D), labels())
    z = torch.randn(B, D, requires_grad=True)
    regulariser = (z @ criterion.bank.T).square().sum()
    step(torch.randn(B, D), labels())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        regulariser.backward()


def test_versions_grow_of_the_whole_state():
    criterion = CrossBatchMemory(Contrastive(), D, M)
    before = {name: tensor._version for name, tensor in criterion.named_state()}
    assert set(before) == set(written_by("step_"))
    criterion(torch.randn(B, D), labels())
    assert all(tensor._version > before[name] for name, tensor in criterion.named_state())


@pytest.mark.parametrize("op", [op for op in WRITING if op != "step_"])
def test_versions_grow_of_what_is_written_and_of_nothing_else(op):
    arguments = ARGUMENTS[op]()
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    before = {name: tensor._version for name, tensor in tensors.items()}
    if "loss" in arguments:  # as the function in `ops` takes it
        del arguments["parameters"], arguments["need_grad"]
        arguments["loss"] = Contrastive()
    getattr(ops, op)(**arguments)
    assert [name for name, tensor in tensors.items() if tensor._version > before[name]] == written_by(op)


@pytest.mark.parametrize("compute", ["forward mode", "torch.func", "of the temperature", "vmap over ids", "vmap"])
def test_what_has_no_derivative_leaves_the_memory_alone(compute):
    criterion = CrossBatchMemory(SupCon(nn.Parameter(torch.tensor(0.2))), D, M)
    criterion(torch.randn(B, D), labels())
    before = {name: tensor.clone() for name, tensor in criterion.named_state()}
    if compute == "forward mode":
        with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
            criterion(torch.autograd.forward_ad.make_dual(torch.randn(B, D), torch.ones(B, D)), labels())
    else:
        x, y, t = torch.randn(B, D), labels(), torch.tensor(0.2)
        with pytest.raises(RuntimeError, match=r"cannot be transformed by torch\.func"):
            if compute == "torch.func":
                torch.func.grad(lambda x: criterion(x, y))(x)
            elif compute == "of the temperature":
                torch.func.grad(lambda t: torch.func.functional_call(criterion, {"temperature": t}, (x, y)))(t)
            elif compute == "vmap over ids":
                torch.func.vmap(lambda ids: criterion(x, y, ids=ids))(torch.arange(2 * B).view(2, B))
            else:
                torch.func.vmap(lambda s: criterion(x, y) * s)(torch.arange(3.0))
    torch.testing.assert_close(dict(criterion.named_state()), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("centred", [False, True])
def test_evaluation_without_grad_may_be_transformed(centred):
    criterion = CrossBatchMemory(SupCon(nn.Parameter(torch.tensor(0.2))), D, M, center_gradient=centred)
    criterion(torch.randn(B, D), labels())
    criterion.eval()
    x = torch.randn(3, B, D)
    with torch.no_grad():
        values = torch.func.vmap(lambda x: criterion(x, labels()))(x)
        torch.testing.assert_close(values, torch.stack([criterion(one, labels()) for one in x]))
    with pytest.raises(RuntimeError, match=r"call it in eval\(\) and under no_grad"):
        torch.func.vmap(lambda x: criterion(x, labels()))(x)


def test_the_memory_may_be_filled_before_backward():
    """Nothing that the loss has saved is written: neither a learned temperature nor the rows."""
    temperature = nn.Parameter(torch.tensor(0.1))
    criterion = CrossBatchMemory(SupCon(temperature), D, M)
    x = torch.randn(B, D)
    gradients = []
    for fills in (False, True):
        criterion.reset_queue()
        z = x.clone().requires_grad_()
        value = criterion(z, labels())
        if fills:
            criterion.fill_from([(torch.randn(B, D), labels())])
        gradients.append(torch.autograd.grad(value, (z, temperature)))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "loss_of",
    [
        lambda z: CrossBatchMemory(SupCon(), D, M)(z, labels()),
        lambda z: CrossBatchMemory(SupCon(), D, M, enqueue="before", batch_weight=0.0)(z, labels()),
        lambda z: CrossBatchMemory(SupCon(), D, M, memory_weight=0.0)(z, labels()),
        lambda z: ops.memory_loss(z, labels(), torch.eye(B, D), labels(), SupCon(nn.Parameter(torch.tensor(0.2)))),
        lambda z: ops.batch_loss(z, labels(), SupCon(nn.Parameter(torch.tensor(0.2)))),
    ],
    ids=["both", "memory", "batch", "memory_loss", "batch_loss"],
)
def test_a_loss_may_be_divided_in_place(loss_of, compiled):
    """As in `loss /= steps`, to accumulate gradients. One that autograd takes for a view refused."""
    torch._dynamo.reset()
    step = torch.compile(loss_of, backend="aot_eager") if compiled else loss_of
    x = torch.randn(B, D)
    gradients = []
    for in_place in (False, True):
        z = x.clone().requires_grad_()
        value = step(z)
        if in_place:
            value /= 4
        else:
            value = value / 4
        gradients += torch.autograd.grad(value, z)
    assert gradients[0].any() and torch.equal(*gradients)


@pytest.mark.parametrize("temperature", [0.1, nn.Parameter(torch.tensor(0.1))], ids=["fixed", "learned"])
def test_gradients_in_batches(temperature):
    criterion = CrossBatchMemory(SupCon(temperature), D, M)
    criterion(torch.randn(B, D), labels())
    x, upstream = torch.randn(B, D, requires_grad=True), torch.randn(3)
    loss = criterion(x, labels())
    (grads,) = torch.autograd.grad(loss, x, upstream, is_grads_batched=True, retain_graph=True)
    for grad, one in zip(grads, upstream, strict=True):
        torch.testing.assert_close(grad, *torch.autograd.grad(loss, x, one, retain_graph=True))
