"""Pairs by a relation, label sets, weights of pairs, and negatives that look like positives: as the references have it
when they are given these pairs."""

import copy
import math
import pickle

import pytest
import state
import torch
import torch.nn.functional as F
from loss_cases import LOSSES, is_of_distance
from own_losses import KINDS, at_once
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

import xbn_ext
from xbn_ext import (
    Contrastive,
    CrossBatchMemory,
    CustomLoss,
    LabelSets,
    Margin,
    SelectPairs,
    SigLIP,
    SmoothAP,
    SupCon,
    ops,
)
from xbn_ext.reference.losses import pair_loss, pair_loss_and_pairs

B, M, D = 12, 150, 7
BOTH = [{}, {"false_negative_margin": 0.05}]


def near(a, b):
    """Positives, negatives, and pairs that are neither."""
    distance = (a % 11 - b % 11).abs()
    return distance < 2, distance > 3


def expected_pairs(s, positive, negative, margin):
    """Without the negatives that are too near, from all similarities."""
    if margin is None:
        return negative
    nearest = torch.where(positive, s, -torch.inf).amax(1, keepdim=True)
    has = positive.any(1, keepdim=True)
    return negative & ~(has & (s > nearest + margin))


def against_memory():
    """A memory, a batch, and what is told of them; their similarities and which pairs there are."""
    m = state.filled(M, D, 130, torch.float64, pending=True)
    z = F.normalize(torch.randn(B, D, dtype=torch.float64)).requires_grad_()
    labels, anchors, exclude = torch.randint(-3, 9, (B,)), torch.rand(B) < 0.8, torch.randint(0, 99, (B,))
    m.bank_ids.copy_(torch.randint(0, 99, (M,)))
    told = {"count": m.count, "scale": m.scale, "shift": m.shift, "anchors": anchors, "bank_ids": m.bank_ids}
    again = z.detach().clone().requires_grad_()
    s = again @ F.normalize((m.bank * m.scale + m.shift)[: int(m.count)], eps=1e-6).T
    pair = anchors[:, None] & (exclude[:, None] != m.bank_ids[: s.shape[1]])
    return m, z, labels, told | {"exclude": exclude}, again, s, pair


@pytest.mark.parametrize("options", BOTH, ids=str)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_relation_against_a_memory(loss, options, few_at_a_time):
    m, z, labels, told, again, s, pair = against_memory()
    selected = SelectPairs(loss, near, **options)
    value, pairs = ops.memory_loss_and_pairs(z, labels, m.bank, m.bank_labels, selected, **told)
    value.backward()
    positive, negative = near(labels[:, None], m.bank_labels[: s.shape[1]])
    negative = expected_pairs(s.detach(), positive & pair, negative & pair, options.get("false_negative_margin"))
    kept = pair & (positive | negative)
    expected, expected_counts = pair_loss_and_pairs(loss, s, positive, kept, told["anchors"])
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(z.grad, again.grad, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(pairs, expected_counts, rtol=1e-10, atol=1e-12)
    assert (pairs > 0).any()


@pytest.mark.parametrize("options", BOTH, ids=str)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("renormalize", [True, False])
def test_a_relation_in_a_batch(loss, options, renormalize):
    if is_of_distance(loss) and not renormalize:
        pytest.skip("a distance is that of rows of unit length")
    z = F.normalize(torch.randn(B, D, dtype=torch.float64))
    if not is_of_distance(loss):
        z = z * (0.5 + torch.rand(B, 1, dtype=torch.float64))
    z.requires_grad_()
    labels, ids, anchors = torch.randint(9, (B,)), torch.randint(-1, 9, (B,)), torch.rand(B) < 0.8
    selected = SelectPairs(loss, near, **options)
    value = ops.batch_loss(z, labels, selected, ids=ids, anchors=anchors, renormalize=renormalize)
    value.backward()
    again = z.detach().clone().requires_grad_()
    s = again @ (F.normalize(again, eps=1e-6) if renormalize else again).T
    pair = anchors[:, None] & ~torch.eye(B, dtype=torch.bool) & ((ids[:, None] < 0) | (ids[:, None] != ids))
    positive, negative = near(labels[:, None], labels)
    negative = expected_pairs(s.detach(), positive & pair, negative & pair, options.get("false_negative_margin"))
    expected = pair_loss(loss, s, positive, pair & (positive | negative), anchors)
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(z.grad, again.grad, rtol=1e-8, atol=1e-12)


def weighted(a, b):
    positive, negative = near(a, b)
    return positive, negative, ((a + 2 * b) % 5).float() / 2  # one in five is 0


class Weighted:
    """A loss with the terms of `loss` times weights, for `at_once`."""

    def __init__(self, loss, weight):
        self.loss, self.weight = loss, weight

    def __getattr__(self, name):
        return getattr(self.loss, name)

    def times(self, terms, reduction):
        weight = torch.where(self.weight == 0, 1.0, self.weight)
        return terms + weight.log() if reduction == "logsumexp" else terms * weight

    def positive(self, s, *given):
        return self.times(self.loss.positive(s, *given), self.loss.reductions[0])

    def negative(self, s, *given):
        return self.times(self.loss.negative(s, *given), self.loss.reductions[1])


@pytest.mark.parametrize("relation", [near, weighted], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_loss_of_ones_own_and_weights_of_its_terms(kind, relation, few_at_a_time):
    m, z, labels, told, again, s, pair = against_memory()
    selected = SelectPairs(kind(), relation)
    theirs = copy.deepcopy(selected.loss)
    value = ops.memory_loss(z, labels, m.bank, m.bank_labels, selected, **told)
    value.backward()
    positive, negative, weight = weighted(labels[:, None], m.bank_labels[: s.shape[1]])
    if relation is near:
        weight = torch.ones_like(weight)
    pair = pair & (weight != 0)
    expected = at_once(Weighted(theirs, weight.double()), s, pair & positive, pair & negative, told["anchors"])
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(z.grad, again.grad, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(selected.loss.margins.grad, theirs.margins.grad, rtol=1e-8, atol=1e-12)


class Sparse(CustomLoss):
    """Terms of 0, which do not count."""

    reduction, average = "logsumexp", "active pairs"

    def positive(self, s):
        return (0.5 - s).relu()

    def negative(self, s):
        return s.relu()

    def anchor(self, positives, negatives):
        return positives.nan_to_num(neginf=0) + negatives.nan_to_num(neginf=0)


def test_a_weight_that_is_0_in_float32_is_no_pair():
    """Its logarithm would be -inf, and an anchor with no other pair would get a NaN."""

    def far(a, b):
        return a == a + 0 * b, a != a + 0 * b, torch.exp(-300.0 * (a - b).abs().double())

    z = torch.randn(2, 8, requires_grad=True)
    criterion = CrossBatchMemory(SelectPairs(KINDS[1](), far), 8, 16)
    value = criterion(z, torch.tensor([0, 1]))
    (grad,) = torch.autograd.grad(value, z)
    assert value == 0 and not grad.any()


@pytest.mark.parametrize("weight", [1.0, 0.999, 2.0, 0.0])
def test_a_weight_makes_no_pair_active(weight):
    """What is divided by is the number of terms that are not 0; under a log-sum-exp weights are added to them."""
    z, bank = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[1, 0], [0.8, 0.6], [0.4, 0.9], [0.6, -0.8]]).double()
    labels, bank_labels = torch.tensor([0]), torch.tensor([0, 0, 0, 1])
    selected = SelectPairs(Sparse(), lambda a, b: (a == b, a != b, torch.full((len(a), b.shape[1]), weight).double()))
    value, pairs = ops.memory_loss_and_pairs(z, labels, bank, bank_labels, selected, renormalize=False)
    positive = torch.tensor([0.0, 0, 0.1]).exp().sum().mul(weight).log() if weight else torch.tensor(0.0)
    negative = 0.6 + math.log(weight) if weight else 0.0
    assert pairs.tolist() == ([1, 1] if weight else [0, 0])
    torch.testing.assert_close(value, ((positive + negative) / 2).double(), check_dtype=False, rtol=1e-6, atol=1e-7)


def learned(number):
    return nn.Parameter(torch.tensor(number, dtype=torch.float64))


LEARNED = {
    "supcon": lambda: SupCon(learned(0.2)),
    "dcl": lambda: xbn_ext.DCL(learned(0.3)),
    "ntxent": lambda: xbn_ext.NTXent(learned(0.3)),
    "siglip": lambda: SigLIP(learned(0.5), learned(-1.0)),
    "siglip's bias": lambda: SigLIP(0.5, learned(-1.0)),
    "margin": lambda: Margin(0.3, learned(0.4)),
}


@pytest.mark.parametrize("options", BOTH, ids=str)
@pytest.mark.parametrize("loss", LEARNED.values(), ids=LEARNED)
def test_what_is_learned(loss, options):
    m, z, labels, told, again, s, pair = against_memory()
    selected, theirs = SelectPairs(loss(), near, **options), loss()
    value = ops.memory_loss(z, labels, m.bank, m.bank_labels, selected, **told)
    value.backward()
    positive, negative = near(labels[:, None], m.bank_labels[: s.shape[1]])
    negative = expected_pairs(s.detach(), positive & pair, negative & pair, options.get("false_negative_margin"))
    expected = pair_loss(theirs, s, positive, pair & (positive | negative), told["anchors"])
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(z.grad, again.grad, rtol=1e-8, atol=1e-12)
    parameters = dict(selected.named_parameters())
    assert parameters.keys() == {
        name for name in theirs.may_be_learned if isinstance(getattr(theirs, name), nn.Parameter)
    }
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, getattr(theirs, name).grad, rtol=1e-8, atol=1e-12)


def test_what_is_learned_in_a_batch_with_a_row_that_is_none():
    """As with the native loss, which has the same pairs."""
    losses = [SigLIP(learned(0.5), learned(-1.0)), SelectPairs(SigLIP(learned(0.5), learned(-1.0)))]
    memories = [CrossBatchMemory(loss, D, 30) for loss in losses]
    for step in range(4):
        x, labels, mask = torch.randn(B, D, dtype=torch.float64), torch.randint(4, (B,)), torch.rand(B) < 0.3
        if step == 2:
            x[mask.nonzero()[0]] = torch.nan  # is a key
        leaves = [x.clone().requires_grad_() for _ in memories]
        for memory, leaf in zip(memories, leaves, strict=True):
            memory(leaf, labels, enqueue_mask=mask).backward()
        torch.testing.assert_close(*(leaf.grad for leaf in leaves), equal_nan=True, rtol=1e-9, atol=1e-12)
        for name in ("temperature", "bias"):
            native, own = getattr(memories[0], name).grad, getattr(memories[1].loss, name).grad
            torch.testing.assert_close(own, native, equal_nan=True, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{}, {"update": "deferred", "enqueue": "before"}, {"center_gradient": True}], ids=str
)
@pytest.mark.parametrize(
    "loss", [Contrastive(), SupCon(), Contrastive(distance="euclidean")], ids=lambda loss: loss.kind
)
def test_pairs_of_equal_labels_are_those_of_the_native_loss(loss, options, dtype):
    def equal(a, b):
        return a == b

    memories = [CrossBatchMemory(own, D, 50, **options) for own in (loss, SelectPairs(loss), SelectPairs(loss, equal))]
    for _ in range(4):
        x, labels, ids = torch.randn(20, D, dtype=dtype), torch.randint(5, (20,)), torch.randint(0, 30, (20,))
        leaves = [x.clone().requires_grad_() for _ in memories]
        values = [memory(leaf, labels, ids=ids) for memory, leaf in zip(memories, leaves, strict=True)]
        for value in values:
            value.backward()
        for value, leaf in zip(values[1:], leaves[1:], strict=True):
            torch.testing.assert_close(value, values[0])
            torch.testing.assert_close(leaf.grad, leaves[0].grad)


def test_label_sets_share_a_class():
    sets = [{0, 7}, {7}, set(), {2, 3, 0}, {3}, {0, 7}]
    lists = LabelSets([[7, 0, 7], [7], [], [2, 3, 0], (3,), [0, 7]])
    tensor = LabelSets(
        torch.tensor([[7, 0, 7], [7, -1, -5], [-1, -1, -1], [2, 3, 0], [-1, -1, 3], [7, -2, 0]]), jaccard=True
    )
    assert torch.equal(lists.table, tensor.table)
    a, b = torch.tensor([0, 1, 2, 3, 4, 5, -1, 6, -(2**63), 2**63 - 1]), torch.tensor([5, 4, 3, 2, 1, 0, 99, -1])
    positive, negative, weight = tensor(a[:, None], b[None])
    assert torch.equal(positive, ~negative) and torch.equal(lists(a[:, None], b[None]), positive)
    of = dict(enumerate(sets))
    for i, label in enumerate(a.tolist()):
        for j, other in enumerate(b.tolist()):
            one, two = of.get(label, set()), of.get(other, set())
            assert bool(positive[i, j]) == bool(one & two)
            assert weight[i, j] == (torch.tensor(len(one & two) / len(one | two)) if one & two else 1.0)
    assert str(lists) == "LabelSets(6 samples of up to 3 classes)" and "jaccard" in str(tensor)
    assert not LabelSets([])(a[:, None], b[None]).any() and not LabelSets([[], []])(a[:, None], b[None]).any()


def test_label_sets_train():
    """Two classes a sample; one label of these alone gives other pairs."""
    relation = LabelSets(torch.randint(0, 6, (40, 2)))
    criterion = CrossBatchMemory(SelectPairs(SupCon(), relation, false_negative_margin=0.2), D, 64, no_class=-1)
    one = CrossBatchMemory(SupCon(), D, 64, no_class=-1)
    for _ in range(5):
        x, samples = torch.randn(16, D, requires_grad=True), torch.randint(-1, 40, (16,))
        value = criterion(x, samples)
        value.backward()
        assert value.isfinite() and x.grad.isfinite().all()
        assert value != one(x.detach(), torch.where(samples < 0, -1, relation.table[samples, 0]))
    assert torch.equal(criterion.label_memory[:16], one.label_memory[:16]) is False
    assert "table" not in " ".join([*criterion.state_dict(), *dict(criterion.named_buffers())])
    emptied = copy.deepcopy(criterion).to_empty(device="cpu")
    emptied.reset_parameters()
    assert torch.equal(emptied.loss.relation.table, relation.table)
    copied = pickle.loads(pickle.dumps(criterion))
    assert torch.equal(copied.loss.relation.table, relation.table)
    again = copy.deepcopy(criterion)
    assert torch.equal(again(x, samples), criterion(x, samples))


def test_no_rows_no_pairs():
    criterion = CrossBatchMemory(SelectPairs(SupCon(), near, false_negative_margin=0.0), D, 20)
    x = torch.randn(0, D, requires_grad=True)
    criterion(x, torch.zeros(0, dtype=torch.int64)).backward()
    assert x.grad.shape == (0, D) and int(criterion.count) == 0


def test_what_is_wrong_is_named():
    with pytest.raises(TypeError, match="loss must be a pair loss of xbn_ext or a CustomLoss, got SmoothAP"):
        SelectPairs(SmoothAP())
    with pytest.raises(TypeError, match="loss must be a pair loss of xbn_ext or a CustomLoss, got SelectPairs"):
        SelectPairs(SelectPairs(SupCon()))
    with pytest.raises(TypeError, match="loss must be an xbn_ext loss"):
        SelectPairs(nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match="relation must be None or a function of labels, got 3"):
        SelectPairs(SupCon(), 3)
    with pytest.raises(ValueError, match="relation must have no parameters that learn"):
        SelectPairs(SupCon(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="false_negative_margin must be a finite number"):
        SelectPairs(SupCon(), false_negative_margin=float("nan"))
    with pytest.raises(ValueError, match='renormalize must be True with distance="euclidean"'):
        CrossBatchMemory(SelectPairs(Contrastive(distance="euclidean")), D, renormalize=False)
    criterion = CrossBatchMemory(SelectPairs(Contrastive(distance="euclidean")), D)
    with pytest.raises(ValueError, match='normalize_embeddings must be True with distance="euclidean"'):
        criterion.normalize_embeddings = False
    for wrong, error in (([[0.5]], ValueError), ([[-1]], ValueError), (7, TypeError), (torch.ones(2, 2), TypeError)):
        with pytest.raises(error, match="table"):
            LabelSets(wrong)
    with pytest.raises(ValueError, match=r"table must be \[N, k\], got \[3\]"):
        LabelSets(torch.arange(3))
    with pytest.raises(TypeError, match="table must be of a dtype that int64 holds"):
        LabelSets(torch.tensor([[2**63]], dtype=torch.uint64))
    with pytest.raises(ValueError, match="table is on the meta device"):
        LabelSets(torch.zeros(2, 2, dtype=torch.int64, device="meta"))
    with torch.device("meta"):
        assert LabelSets([[3]]).table.tolist() == [[3]]
    with pytest.raises(AttributeError, match="loss is chosen once and cannot be set: make another SelectPairs"):
        SelectPairs(SupCon()).loss = KINDS[0]()


def returning(*parts):
    return lambda a, b: parts if len(parts) != 1 else parts[0]


TRUE = torch.ones(B, B, dtype=torch.bool)
RELATIONS = {
    "no tensor": (returning(True), TypeError, r"relation: positives must be torch.bool \[12, 12\], got bool"),
    "no bool": (returning(TRUE.int()), TypeError, "relation: positives must be torch.bool .* got torch.int32"),
    "shape": (returning(TRUE, TRUE[:1]), TypeError, r"relation: negatives must be .* got torch.bool \[1, 12\]"),
    "both": (returning(TRUE, TRUE), ValueError, "a pair must not be positive and negative"),
    "four": (returning(TRUE, ~TRUE, TRUE.float(), TRUE), TypeError, "got 4 values"),
    "weights": (returning(TRUE, ~TRUE, TRUE.float()), TypeError, "weights need a CustomLoss, and the loss is SupCon"),
    "writes": (lambda a, b: a.div_(2, rounding_mode="floor") == b, TypeError, "it must not write the labels"),
    "elsewhere": (returning(TRUE.to("meta")), TypeError, "positives must be on cpu, as the labels are, got meta"),
    "weights elsewhere": (
        returning(TRUE, ~TRUE, TRUE.float().to("meta")),
        TypeError,
        "weights must be on cpu, as the labels are, got meta",
    ),
    "sparse": (returning(TRUE.to_sparse()), TypeError, "positives must be dense, got torch.sparse_coo"),
    "raises": (lambda a, b: torch.zeros(3)[a + 100 + b], IndexError, "out of bounds"),
}


@pytest.mark.parametrize("relation, error, message", RELATIONS.values(), ids=RELATIONS)
def test_a_relation_that_is_wrong_leaves_the_memory_as_it_was(relation, error, message):
    criterion = CrossBatchMemory(SelectPairs(SupCon(), near), D, 20)
    criterion(torch.randn(B, D), torch.arange(B))
    before = copy.deepcopy(criterion.state_dict())
    criterion.loss.relation = relation
    with pytest.raises(error, match=message):
        criterion(torch.randn(B, D), torch.arange(B))
    assert all(torch.equal(t, before[name]) for name, t in criterion.state_dict().items())


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), 1e300])
def test_a_weight_that_is_none_leaves_the_memory_as_it_was(weight):
    criterion = CrossBatchMemory(SelectPairs(KINDS[0](), returning(TRUE, ~TRUE, TRUE.double() * weight)), D, 20)
    with pytest.raises(ValueError, match="relation: weights must be finite in float32, and not negative"):
        criterion(torch.randn(B, D), torch.arange(B))
    assert int(criterion.count) == 0


def test_a_function_may_take_the_place_of_a_module():
    class Equal(nn.Module):
        def forward(self, a, b):
            return a == b

    loss = SelectPairs(SupCon(), Equal())
    loss.relation = near
    assert loss.relation is near and not list(loss.children())
    loss.relation = Equal()
    assert len(list(loss.children())) == 1
    loss.relation = None
    assert loss.relation is None and "relation=None" in str(loss)


class Exponential(nn.Module):
    def forward(self, x):
        return x.exp()

    def right_inverse(self, y):
        return y.log()


def test_a_parametrized_temperature_learns():
    """As with the native loss."""
    losses = SupCon(learned(0.3)), SelectPairs(SupCon(learned(0.3)))
    memories = [CrossBatchMemory(loss, D, 30) for loss in losses]
    for module in (memories[0], memories[1].loss):
        register_parametrization(module, "temperature", Exponential())
    for _ in range(3):
        x, labels = torch.randn(B, D, dtype=torch.float64), torch.randint(4, (B,))
        grads = []
        for memory in memories:
            memory.zero_grad()
            memory(x, labels).backward()
            grads.append([p.grad for p in memory.parameters()])
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_reset_parameters_gives_what_is_learned_its_first_value():
    loss = SelectPairs(SigLIP(learned(0.5), learned(-1.0)))
    with torch.no_grad():
        loss.temperature.fill_(9)
    loss.reset_parameters()
    assert loss.temperature.item() == 0.5 and loss.loss.temperature is loss.temperature


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("labels_too", [False, True])
def test_where_nothing_is_tracked(training, labels_too):
    """As Lightning validates."""
    writes = SelectPairs(SupCon(), lambda a, b: a.div_(2, rounding_mode="floor") == b)
    for select in (SelectPairs(SupCon(), false_negative_margin=0.1), SelectPairs(SupCon(), lambda a, b: a == b)):
        criterion = CrossBatchMemory(select, D, 32)
        x, labels = torch.randn(8, D), torch.arange(8) % 4
        criterion(x, labels)
        criterion.train(training)
        other = copy.deepcopy(criterion)
        with torch.no_grad():
            expected = other(x, labels)
        with torch.inference_mode():
            its = labels.clone() if labels_too else labels
            assert torch.equal(criterion(x, its), expected)
            with pytest.raises(TypeError, match="it must not write the labels"):
                CrossBatchMemory(writes, D, 32)(x, its)
