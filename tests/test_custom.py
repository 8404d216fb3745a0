"""A loss of the user's own: its value and gradients are those of autograd over all pairs at once."""

import copy

import numpy as np
import pytest
import state
import torch
import torch.nn.functional as F
from own_losses import KINDS, Hardest, Margins, Mixed, WithoutFalseNegatives, at_once, averaged
from torch import nn

import xbn_ext
from xbn_ext import (
    Contrastive,
    CrossBatchMemory,
    CustomLoss,
    InChunks,
    MultiSimilarity,
    SelectPairs,
    SmoothAP,
    SupCon,
    ops,
)

B, M, D = 12, 150, 7


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("renormalize", [True, False])
def test_against_a_memory(kind, renormalize, few_at_a_time):
    loss = kind()
    m = state.filled(M, D, 130, torch.float64, pending=True)
    z = F.normalize(torch.randn(B, D, dtype=torch.float64)).requires_grad_()
    labels, anchors, exclude = torch.randint(-3, 9, (B,)), torch.rand(B) < 0.8, torch.randint(0, 99, (B,))
    m.bank_ids.copy_(torch.randint(0, 99, (M,)))
    options = {"count": m.count, "scale": m.scale, "shift": m.shift, "anchors": anchors, "renormalize": renormalize}
    value, pairs = ops.memory_loss_and_pairs(
        z, labels, m.bank, m.bank_labels, loss, bank_ids=m.bank_ids, exclude=exclude, **options
    )
    value.backward()

    again, theirs = z.detach().clone().requires_grad_(), copy.deepcopy(loss)
    theirs.margins.grad = None
    rows = (m.bank * m.scale + m.shift)[: int(m.count)]
    rows = F.normalize(rows, eps=1e-6) if renormalize else rows
    same = labels[:, None] == m.bank_labels[: len(rows)]
    pair = anchors[:, None] & (exclude[:, None] != m.bank_ids[: len(rows)])
    expected = at_once(theirs, again @ rows.T, pair & same, pair & ~same, anchors)
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(z.grad, again.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss.margins.grad, theirs.margins.grad, rtol=1e-9, atol=1e-12)
    assert (pairs > 0).all() or (kind is WithoutFalseNegatives and not renormalize)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_with_few_positives(kind):
    """Then only their columns are looked at, of either side."""
    loss, M = kind(), 400
    z, bank = F.normalize(torch.randn(B, D, dtype=torch.float64)), torch.randn(M, D, dtype=torch.float64)
    z.requires_grad_()
    labels, bank_labels = torch.arange(B), torch.arange(M) % 190
    ops.memory_loss(z, labels, bank, bank_labels, loss).backward()
    again, theirs = z.detach().clone().requires_grad_(), copy.deepcopy(loss)
    theirs.margins.grad = None
    same, everyone = labels[:, None] == bank_labels, torch.ones(B, dtype=torch.bool)
    at_once(theirs, again @ F.normalize(bank).T, same, ~same, everyone).backward()
    torch.testing.assert_close(z.grad, again.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss.margins.grad, theirs.margins.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("renormalize", [True, False])
def test_of_a_batch_against_itself(kind, renormalize):
    loss = kind()
    z = torch.randn(B, D, dtype=torch.float64).requires_grad_()
    labels, ids, anchors = torch.randint(4, (B,)), torch.randint(-1, 9, (B,)), torch.rand(B) < 0.8
    ops.batch_loss(z, labels, loss, ids=ids, anchors=anchors, renormalize=renormalize).backward()
    again, theirs = z.detach().clone().requires_grad_(), copy.deepcopy(loss)
    theirs.margins.grad = None
    rows = F.normalize(again, eps=1e-6) if renormalize else again
    same = labels[:, None] == labels
    pair = anchors[:, None] & ~torch.eye(B, dtype=torch.bool) & ((ids[:, None] < 0) | (ids[:, None] != ids))
    at_once(theirs, again @ rows.T, pair & same, pair & ~same, anchors).backward()
    torch.testing.assert_close(z.grad, again.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss.margins.grad, theirs.margins.grad, rtol=1e-9, atol=1e-12)


class OwnContrastive(CustomLoss):
    def positive(self, s):
        return (0.9 - s).relu()

    def negative(self, s):
        return (s - 0.2).relu()


class OwnMultiSimilarity(CustomLoss):
    reduction = "logsumexp"

    def positive(self, s):
        return -2 * (s - 0.5)

    def negative(self, s):
        return 50 * (s - 0.5)

    def anchor(self, positives, negatives):
        return F.softplus(positives) / 2 + F.softplus(negatives) / 50


OPTIONS = [
    {}, {"update": "deferred", "enqueue": "before", "warmup_steps": 1}, {"memory_dtype": torch.float16},
    {"drift": "none", "batch_weight": 0.0},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "own, native", [(OwnContrastive, Contrastive(0.9, 0.2)), (OwnMultiSimilarity, MultiSimilarity())]
)
def test_a_memory_trains_as_with_the_native_loss(own, native, options, dtype):
    memories = [CrossBatchMemory(loss, D, 50, **options) for loss in (own(), native)]
    for step in range(5):
        x, labels = torch.randn(20, D, dtype=dtype), torch.randint(5, (20,))
        ids, mask = torch.randint(0, 30, (20,)), torch.rand(20) < 0.3
        if step == 2:
            x[0, 0] = torch.nan
        for memory in memories:
            memory.train(step != 3)
        leaves = [x.clone().requires_grad_() for _ in memories]
        values = [m(leaf, labels, ids=ids, enqueue_mask=mask) for m, leaf in zip(memories, leaves, strict=True)]
        for value in values:
            value.backward()
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-5, equal_nan=True)
        for (name, t), expected in zip(
            memories[0].named_state(), dict(memories[1].named_state()).values(), strict=True
        ):
            if name != "pairs" or "logsumexp" not in own.reduction:  # all of its pairs have a weight, also tiny ones
                torch.testing.assert_close(t, expected, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_options_that_are_none_are_named():
    z, labels = torch.randn(4, D), torch.arange(4)
    for function, tensors in ((ops.memory_loss, (z, labels, z, labels)), (ops.batch_loss, (z, labels))):
        with pytest.raises(RuntimeError, match="eps must be a number, got NoneType"):
            function(*tensors, SmoothAP(), eps=None)
        assert torch.equal(function(*tensors, SmoothAP(), eps=np.float32(1e-6)), function(*tensors, SmoothAP()))
        with pytest.raises(ValueError, match="renormalize must be True or False, got 'x'"):
            function(*tensors, SmoothAP(), renormalize="x")


@pytest.mark.long
def test_a_compiled_step_computes_it_outside_of_its_graphs():
    def train(compiled):
        torch.manual_seed(0)
        network, criterion = nn.Linear(10, D), CrossBatchMemory(Margins(), D, 50)
        step = lambda x, labels: criterion(network(x), labels)  # noqa: E731
        if compiled:
            step = torch.compile(step, backend="aot_eager")
        values = []
        for _ in range(3):
            value = step(torch.randn(B, 10), torch.randint(4, (B,)))
            value.backward()
            values += [value.detach(), *(p.grad.clone() for p in [*network.parameters(), *criterion.parameters()])]
        return values

    torch._dynamo.reset()
    torch.testing.assert_close(train(True), train(False))
    whole = torch.compile(CrossBatchMemory(Margins(), D, 50), fullgraph=True, backend="aot_eager")
    with pytest.raises(
        RuntimeError, match="a loss of your own is computed outside of graphs: compile without fullgraph"
    ):
        whole(torch.randn(B, D), torch.arange(B))


@pytest.mark.long
@pytest.mark.parametrize("loss", [Margins(), SelectPairs(SupCon(0.2), false_negative_margin=0.1)], ids=str)
def test_a_compiled_step_is_compiled_once(loss):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    criterion = CrossBatchMemory(loss, D, 19)
    step, graphs = torch.compile(lambda x, labels: criterion(x, labels), backend="eager"), []
    for _ in range(5):
        step(torch.randn(B, D, requires_grad=True), torch.arange(B) % 3).backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 1 and graphs == graphs[:1] * 5


def test_what_learns_is_a_parameter_of_the_memory():
    memory = CrossBatchMemory(Margins(), D, 50)
    assert [name for name, _ in memory.named_parameters()] == ["loss.margins"] and "loss.margins" in memory.state_dict()
    copied = copy.deepcopy(memory)
    copied.load_state_dict(memory.state_dict())
    x, labels = torch.randn(20, D), torch.randint(5, (20,))
    for step in range(2):
        memory(x + step, labels).backward()
    assert memory.loss.margins.grad.abs().min() > 0 and copied.loss.margins.grad is None
    assert repr(memory).startswith("CrossBatchMemory(\n  Margins, embedding_size=7") and memory.temperature is None
    with torch.no_grad():
        assert not memory(x, labels).requires_grad
    with pytest.raises(AttributeError, match="loss is chosen once"):
        memory.loss = Margins()


HEAD, SCALE = nn.Linear(3, 1), torch.ones((), requires_grad=True)
OUTSIDE = {
    "a parameter elsewhere": lambda: HEAD.bias[0],
    "made of one": lambda: HEAD(torch.ones(2, 3)).exp().mean(),
    "no parameter": lambda: SCALE,
}


@pytest.mark.parametrize("function", ["positive", "negative", "anchor"])
@pytest.mark.parametrize("outside", OUTSIDE.values(), ids=OUTSIDE)
def test_a_tensor_that_would_get_no_gradient_is_refused(outside, function):
    kind = type("Wrong", (OwnContrastive,), {function: lambda self, *of: sum(of) * outside()})
    memory, x, labels = CrossBatchMemory(kind(), D, 50), torch.randn(6, D), torch.arange(6) % 2
    with pytest.raises(TypeError, match=rf"loss: {function} depends on a tensor \[.*\] that requires a gradient"):
        memory(x, labels)
    assert int(memory.step) == 0 and int(memory.count) == 0
    with torch.no_grad():
        memory(x, labels)  # nothing learns


def test_a_parameter_that_is_made_of_others_learns():
    """As hypernetworks have them."""
    memory, scale = CrossBatchMemory(Margins(), D, 50), torch.ones((), requires_grad=True)
    x, labels = torch.randn(20, D), torch.randint(5, (20,))
    made = {"loss.margins": memory.loss.margins * scale}
    torch.func.functional_call(memory, made, (x, labels)).backward()
    memory.reset_queue()
    expected = memory.loss.margins.grad
    memory.loss.margins.grad = None
    memory(x, labels).backward()
    torch.testing.assert_close(memory.loss.margins.grad, expected)
    torch.testing.assert_close(scale.grad, (expected * memory.loss.margins).sum().float())


def test_no_rows_no_pairs():
    loss, z = Mixed(), torch.randn(B, D, requires_grad=True)
    labels = torch.zeros(B, dtype=torch.int64)
    value = xbn_ext.memory_loss(z, labels, torch.zeros(0, D), labels[:0], loss)
    value.backward()
    assert value == 0 and not z.grad.any()
    assert CrossBatchMemory(Hardest(), D, 50)(z[:0], labels[:0]) == 0


def test_what_is_wrong_is_named():
    def kind(**attributes):
        return type("Wrong", (OwnContrastive,), attributes)

    for attributes, message in (
        ({"reduction": "median"}, "reduction must be 'sum', 'mean', 'logsumexp' or 'max', got 'median'"),
        ({"average": "rows"}, "average must be 'anchors', 'pairs' or 'active pairs', got 'rows'"),
    ):
        with pytest.raises(ValueError, match=message):
            kind(**attributes)()
    x, labels = torch.randn(6, D), torch.arange(6) % 2
    for attributes, message in (
        ({"positive": lambda self, s: s.sum()}, r"must return torch.float32 \[2, 3\], got torch.float32 \[\]"),
        ({"negative": lambda self, s: s.double()}, r"must return torch.float32 \[2, 3\], got torch.float64 \[2, 3\]"),
        ({"negative": lambda self, s: None}, "got NoneType"),
        ({"anchor": lambda self, p, n: p.sum()}, r"anchor\(positives, negatives\) must return .* \[2\], got .* \[\]"),
        (
            {"anchor": lambda self, p, n: (p > n).long()},
            r"must return floating-point numbers \[2\], got torch.int64 \[2\]",
        ),
    ):
        memory = CrossBatchMemory(kind(**attributes)(), D, 50)
        before = copy.deepcopy(memory.state_dict())
        with pytest.raises(TypeError, match=message):
            memory(x, labels)
        assert all(torch.equal(t, before[name]) for name, t in memory.state_dict().items())
    with pytest.raises(NotImplementedError, match="a CustomLoss must have positive"):
        CrossBatchMemory(CustomLoss(), D, 50)(x, labels)
    with pytest.raises(TypeError, match="OwnContrastive is not called itself"):
        OwnContrastive()(x, labels)
    with pytest.raises(TypeError, match="step_: loss must be an xbn_ext loss"):
        ops.step_(xbn_ext.reference.Memory.empty(9, D, torch.float32), x, labels, OwnContrastive())


@pytest.mark.parametrize("kind", [*KINDS, averaged(Hardest, "pairs")], ids=lambda kind: kind.__name__)
def test_anchors_without_positives_or_without_negatives(kind):
    """Also all of a batch."""
    loss = kind()
    z, bank = F.normalize(torch.randn(B, D, dtype=torch.float64)), torch.randn(20, D, dtype=torch.float64)
    everyone = torch.ones(B, dtype=torch.bool)
    for labels, of_bank in ((torch.zeros(B), torch.ones(20)), (torch.ones(B), torch.ones(20))):
        its, theirs = (z.clone().requires_grad_() for _ in range(2))
        value = ops.memory_loss(its, labels.long(), bank, of_bank.long(), loss)
        same = labels[:, None] == of_bank
        expected = at_once(loss, theirs @ F.normalize(bank).T, same, ~same, everyone)
        torch.testing.assert_close(value, expected)
        grads = (torch.autograd.grad(v, t)[0] for v, t in ((value, its), (expected, theirs)))
        torch.testing.assert_close(*grads)


def test_what_has_no_derivative_raises():
    """A second one by what the first was not by, a forward-mode one by a parameter; the memory is left alone."""
    memory = CrossBatchMemory(Margins(), D, M)
    x, labels = torch.randn(B, D, requires_grad=True), torch.arange(B) % 3
    memory(x, labels)
    learned = memory.loss.margins
    for first, second in ((x, learned), (learned, x)):
        (grad,) = torch.autograd.grad(memory(x, labels), first, create_graph=True)
        with pytest.raises(RuntimeError, match="can be differentiated only once"):
            torch.autograd.grad(grad.sum(), second, allow_unused=True)
    before = {name: tensor.clone() for name, tensor in memory.named_state()}
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(learned.detach(), torch.ones_like(learned))
        for training in (True, False):
            memory.train(training)
            with pytest.raises(RuntimeError, match="no forward-mode derivative"):
                torch.func.functional_call(memory, {"loss.margins": dual}, (x.detach(), labels))
    torch.testing.assert_close(dict(memory.named_state()), before, rtol=0, atol=0, equal_nan=True)


def test_an_anchor_function_that_was_set_is_differentiated():
    z, labels = F.normalize(torch.randn(B, D, dtype=torch.float64)), torch.arange(B) % 3
    loss, same = OwnContrastive(), labels[:, None] == labels
    loss.anchor = lambda positives, negatives: (positives + negatives) ** 2
    its, theirs = (z.clone().requires_grad_() for _ in range(2))
    ops.memory_loss(its, labels, z, labels, loss).backward()
    at_once(loss, theirs @ z.T, same, ~same, torch.ones(B, dtype=torch.bool)).backward()
    torch.testing.assert_close(its.grad, theirs.grad)


class SetLater(OwnContrastive):
    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    "attributes, error, message",
    [
        ({"reduction": "median"}, ValueError, "reduction must be 'sum', .* got 'median'"),
        ({"reduction": ("sum", "mean", "max")}, ValueError, "reduction must be a word or two of them, .* got"),
        ({"reduction": None}, ValueError, "reduction must be a word or two of them, .* got None"),
        ({"average": "rows"}, ValueError, "average must be 'anchors', 'pairs' or 'active pairs', got 'rows'"),
        ({"needs_both": "no"}, ValueError, "needs_both must be True or False, got 'no'"),
        ({"first": "both"}, ValueError, "first must be 'positives' or 'negatives', got 'both'"),
        ({"negative": lambda s: s.sub_(0.2).relu()}, RuntimeError, "leaf Variable .* in-place operation"),
    ],
)
def test_what_was_set_later_raises_before_the_memory_moves(attributes, error, message):
    loss, x, labels = SetLater(**attributes), torch.randn(6, D, requires_grad=True), torch.arange(6) % 2
    memory = CrossBatchMemory(loss, D, 50)
    before = copy.deepcopy(memory.state_dict())
    with pytest.raises(error, match=message):
        memory(x, labels)
    assert all(torch.equal(t, before[name]) for name, t in memory.state_dict().items())
    with pytest.raises(error, match=message):
        ops.batch_loss(x, labels, loss)


class Scaled(CustomLoss):
    """Of many pairs the derivatives are large before they are averaged."""

    def __init__(self):
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-1.0))

    def positive(self, s):
        return F.softplus(-self.scale * s - self.bias)

    def negative(self, s):
        return F.softplus(self.scale * s + self.bias)


class InAll(nn.Module):
    """The same for `InChunks`."""

    def __init__(self):
        super().__init__()
        self.terms = Scaled()

    def forward(self, embeddings, labels, indices_tuple=None, ref_emb=None, ref_labels=None):
        s = embeddings @ ref_emb.T
        costs = torch.where(labels[:, None] == ref_labels, self.terms.positive(s), self.terms.negative(s))
        return costs.sum(), len(embeddings)


@pytest.mark.parametrize("bits", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [Scaled, lambda: InChunks(InAll())], ids=["CustomLoss", "InChunks"])
def test_parameters_of_16_bits_have_the_gradient_of_wide_ones(make, bits, few_at_a_time):
    z, bank = F.normalize(torch.randn(600, D)), F.normalize(torch.randn(900, D))
    labels, of_bank = torch.arange(600) % 9, torch.arange(900) % 9
    narrow, wide = make().to(bits), make()
    for loss in (narrow, wide):
        ops.memory_loss(z, labels, bank, of_bank, loss).backward()
    for its, expected in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert its.grad.dtype == bits
        torch.testing.assert_close(its.grad.float(), expected.grad, rtol=8 * torch.finfo(bits).eps, atol=0)
