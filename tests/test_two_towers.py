"""Two sides of a batch against each other and against a memory of either: as torch's autograd has it of all
similarities at once."""

import copy

import pytest
import torch
import torch.nn.functional as F
from elsewhere import Elsewhere
from loss_cases import LOSSES
from torch import nn

from xbn_ext import (
    Contrastive,
    CrossBatchMemory,
    CustomLoss,
    LabelSets,
    Margin,
    NTXent,
    SelectPairs,
    SigLIP,
    SupCon,
    Triplet,
    TwoTowers,
)
from xbn_ext.memory_options import OPTIONS as OF_A_MEMORY
from xbn_ext.reference.losses import pair_loss

B, D, M = 9, 7, 64
TAKEN = {name: loss for name, loss in LOSSES.items() if loss.passes}
OPTIONS = [
    {"drift": "none"}, {"drift": "xbn", "update": "deferred"}, {"ids": True}, {"warmup_steps": 2, "labels": False},
    {"ids": True, "labels": False, "drift": "ema"},
]  # fmt: skip


def batches(steps, ids, labels, dtype=torch.float64):
    for _ in range(steps):
        x, y = (torch.randn(B, D, dtype=dtype).requires_grad_() for _ in range(2))
        yield x, y, torch.randint(4, (B,)) if labels else None, torch.randint(-1, 12, (B,)) if ids else None


def direction(loss, anchors, keys, labels, ids, memory):
    """The loss of anchors against the rows of a memory, as they were ranked, and those of the batch."""
    rows, of_rows, its_ids = memory
    s = F.normalize(anchors) @ torch.cat((F.normalize(rows), F.normalize(keys))).T
    positive = labels[:, None] == torch.cat((of_rows, labels))
    pair = torch.ones_like(positive)
    if ids is not None:
        same = (ids[:, None] == torch.cat((its_ids, ids))) & (ids >= 0)[:, None]
        own = torch.cat((torch.zeros(len(ids), len(rows)), torch.eye(len(ids))), 1).bool()
        pair = ~same | own
    return pair_loss(loss, s, positive, pair)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("loss", TAKEN.values(), ids=TAKEN)
def test_loss_and_gradients(loss, options):
    options = dict(options)
    ids, labels = options.pop("ids", False), options.pop("labels", True)
    criterion = TwoTowers(loss, D, M, memory_dtype=torch.float64, **options)
    warm = options.get("warmup_steps", 0)
    labels_of = {}
    for step, (x, y, given, its) in enumerate(batches(5, ids, labels)):
        before = [int(memory.count) for memory in (criterion.first, criterion.second)]
        value = criterion(x, y, given, ids=its)
        value.backward()
        of_batch = torch.arange(B) + 1000 * step if given is None else given
        again = [t.detach().clone().requires_grad_() for t in (x, y)]
        expected = []
        for k, memory in enumerate((criterion.first, criterion.second)):
            n = 0 if step < warm else before[k]  # the memory is large: what was ranked lies where it lay
            rows = memory.embedding_memory[:n]
            stored = torch.cat([labels_of[i] for i in range(step)])[:n] if step else of_batch[:0]
            expected.append(
                direction(loss, again[1 - k], again[k], of_batch, its, (rows, stored, memory.id_memory[:n]))
            )
        (sum(expected) / 2).backward()
        labels_of[step] = of_batch
        torch.testing.assert_close(value, sum(expected).detach() / 2, rtol=1e-9, atol=1e-12)
        for t, other in zip((x, y), again, strict=True):
            torch.testing.assert_close(t.grad, other.grad, rtol=1e-7, atol=1e-11)
    assert int(criterion.first.count) == 5 * B


@pytest.mark.parametrize("drift", ["axbn", "none"])
def test_each_memory_is_that_of_its_side(drift):
    criterion = TwoTowers(SupCon(), D, 20, drift=drift)
    alone = [CrossBatchMemory(SupCon(), D, 20, drift=drift) for _ in range(2)]
    for x, y, labels, ids in batches(6, True, True, torch.float32):
        criterion(x, y, labels, ids=ids)
        for memory, side in zip(alone, (x, y), strict=True):
            memory(side.detach(), labels, ids=ids)
    for memory, other in zip((criterion.first, criterion.second), alone, strict=True):
        for name, t in memory.state_dict().items():
            if name not in ("pairs", "drift_stats"):
                assert torch.equal(t, other.state_dict()[name]), name


def learned(number):
    return nn.Parameter(torch.tensor(number, dtype=torch.float64))


@pytest.mark.parametrize(
    "make",
    [lambda: SupCon(learned(0.2)), lambda: NTXent(learned(0.3)), lambda: SigLIP(learned(0.5), learned(-1.0)),
     lambda: Margin(0.3, learned(0.4))],
    ids=["supcon", "ntxent", "siglip", "margin"],
)  # fmt: skip
def test_what_is_learned(make):
    criterion, theirs = TwoTowers(make(), D, M, drift="none", memory_dtype=torch.float64), make()
    labels_of = []
    for step, (x, y, labels, _) in enumerate(batches(3, False, True)):
        criterion.zero_grad()
        value = criterion(x, y, labels)
        value.backward()
        again = [t.detach().clone().requires_grad_() for t in (x, y)]
        n, stored = step * B, torch.cat([*labels_of, labels[:0]])
        expected = [
            direction(theirs, again[1 - k], again[k], labels, None, (memory.embedding_memory[:n], stored, None))
            for k, memory in enumerate((criterion.first, criterion.second))
        ]
        parameters = [getattr(theirs, name) for name in theirs.may_be_learned]
        parameters = [p for p in parameters if isinstance(p, nn.Parameter)]
        *grads, by_x, by_y = torch.autograd.grad(sum(expected) / 2, [*parameters, *again])
        torch.testing.assert_close(x.grad, by_x, rtol=1e-7, atol=1e-11)
        torch.testing.assert_close(y.grad, by_y, rtol=1e-7, atol=1e-11)
        own = dict(criterion.named_parameters())
        assert len(own) == len(grads)
        names = [name for name in theirs.may_be_learned if isinstance(getattr(theirs, name), nn.Parameter)]
        for name, grad in zip(names, grads, strict=True):
            torch.testing.assert_close(own[name].grad, grad, rtol=1e-7, atol=1e-11)
        labels_of.append(labels)


def test_it_is_clip_without_a_memory_yet():
    """And in evaluation only reads."""
    x, y = (torch.randn(B, D, requires_grad=True) for _ in range(2))
    logits = F.normalize(x) @ F.normalize(y).T / 0.07
    expected = (F.cross_entropy(logits, torch.arange(B)) + F.cross_entropy(logits.T, torch.arange(B))) / 2
    criterion = TwoTowers(SupCon(0.07), D, M)
    before = copy.deepcopy(criterion.state_dict())
    torch.testing.assert_close(criterion.eval()(x, y), expected)
    assert all(torch.equal(t, before[name]) for name, t in criterion.state_dict().items())
    torch.testing.assert_close(criterion.train()(x, y), expected)
    assert int(criterion.first.count) == int(criterion.second.count) == B
    criterion(x, y, ids=torch.arange(B))
    without, with_ids = (copy.deepcopy(criterion)(x, y, ids=ids) for ids in (None, torch.arange(B)))
    assert expected < with_ids < without  # without ids, the same things again are each other's negatives


def test_it_resumes_and_compiles():
    torch.manual_seed(1)
    eager, compiled = (TwoTowers(SupCon(nn.Parameter(torch.tensor(0.1))), D, 20) for _ in range(2))
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for x, y, labels, ids in batches(3, True, True, torch.float32):
        leaves = [t.detach().clone().requires_grad_() for t in (x, y)]
        values = eager(x, y, labels, ids=ids), step(*leaves, labels, ids=ids)
        torch.testing.assert_close(*values)
        for value in values:
            value.backward()
        for t, leaf in zip((x, y), leaves, strict=True):
            torch.testing.assert_close(t.grad, leaf.grad)
    again = TwoTowers(SupCon(nn.Parameter(torch.tensor(0.5))), D, 20)
    again.load_state_dict(eager.state_dict())
    assert torch.equal(again(x, y, labels), eager(x, y, labels))


def test_it_stays_on_the_cpu_where_there_is_no_float64():
    loss = SigLIP(nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(-1.0)))
    criterion = TwoTowers(loss, D, M)
    here = copy.deepcopy(criterion)
    x, y = torch.randn(B, D), torch.randn(B, D)
    expected = [here(x, y) for _ in range(2)]
    with Elsewhere("mps", float64=False) as there:
        criterion.to(there.device)
        for value in expected:
            found = criterion(x.to(there.device), y.to(there.device))
            assert found.device == there.device
            torch.testing.assert_close(found.detach().cpu(), value.detach())
        found.backward()
    assert {p.device.type for p in criterion.parameters()} == {"cpu"} and criterion.temperature.grad is not None


@pytest.mark.parametrize("side", [0, 1])
def test_a_row_that_is_not_finite_makes_the_loss_nan_and_stays_out(side):
    criterion = TwoTowers(SupCon(), D, M)
    x = [torch.randn(B, D), torch.randn(B, D)]
    x[side][2, 3] = torch.inf
    leaves = [t.requires_grad_() for t in x]
    value = criterion(*leaves)
    value.backward()
    assert value.isnan() and leaves[side].grad[2].isnan().all()
    counts = [int(criterion.first.count), int(criterion.second.count)]
    assert counts[side] == B - 1 and counts[1 - side] == B


def test_dtypes_and_no_rows(dtype):
    criterion = TwoTowers(Contrastive(), D, M)
    made = torch.randn(B, D)
    for x, y in (
        (made.bfloat16(), torch.randn(B, D).double()), (torch.randn(0, D), torch.randn(0, D)),
        (made.to(torch.float8_e4m3fn), made.half()), (made.to(torch.float8_e4m3fn), made.to(torch.float8_e5m2)),
    ):  # fmt: skip
        leaves = [x.requires_grad_(), y.requires_grad_()]
        criterion(*leaves).backward()
        assert [leaf.grad.dtype for leaf in leaves] == [x.dtype, y.dtype]
    assert criterion(torch.randn(3, D, dtype=dtype), torch.randn(3, D, dtype=dtype)).dtype == dtype


def test_what_is_wrong_is_named():
    with pytest.raises(TypeError, match="loss must be a pair loss of xbn_ext such as SupCon"):
        TwoTowers(CustomLoss(), D)
    with pytest.raises(ValueError, match="loss: of all triplets"):
        TwoTowers(Triplet(mining="all"), D)
    with pytest.raises(ValueError, match="memory_size must be an integer >= 1"):
        TwoTowers(SupCon(), D, 0)
    criterion = TwoTowers(SupCon(), D, M)
    x, y = torch.randn(B, D), torch.randn(B, D)
    before = copy.deepcopy(criterion.state_dict())
    for arguments, error, message in (
        ((x[:, 1:], y), ValueError, r"first must be \[B, embedding_size=7\], got \[9, 6\]"),
        ((x, y.long()), TypeError, "second must be a floating-point tensor"),
        ((x, y[1:]), ValueError, "second must have a row for each of first, 9, got 8"),
        ((x, y, torch.arange(3)), ValueError, r"labels must be \[B=9\]"),
        ((x.to("meta"), y), ValueError, "first is on meta, the memory on cpu"),
    ):
        with pytest.raises(error, match=message):
            criterion(*arguments)
    with pytest.raises(TypeError, match="ids must be"):
        criterion(x, y, ids=x[:, 0])
    with torch.inference_mode():
        untracked = torch.randn(B, D)
    with pytest.raises(RuntimeError, match="embeddings were made in inference mode"):
        criterion(x.requires_grad_(), untracked)
    assert all(torch.equal(t, before[name]) for name, t in criterion.state_dict().items())
    with pytest.raises(AttributeError, match="loss is chosen once and cannot be set: make another TwoTowers"):
        criterion.loss = Contrastive()
    with pytest.raises(RuntimeError, match="not called itself: call the TwoTowers"):
        criterion.first(x, torch.arange(B))
    assert str(criterion).startswith("TwoTowers(\n  SupCon(temperature=0.1)")


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("at_fault", ["first", "second"])
def test_both_memories_take_their_state_or_neither(at_fault, assign):
    """They would be at different steps."""
    ahead, behind = (torch.nn.ModuleDict({"loss": TwoTowers(SupCon(), D, M)}) for _ in range(2))
    for x, y, labels, _ in batches(2, False, True, torch.float32):
        ahead["loss"](x, y, labels)
    before, good = ({name: t.clone() for name, t in module.state_dict().items()} for module in (behind, ahead))
    bad = good | {f"loss.{at_fault}.count": torch.tensor(M + 1)}
    sound = "first" if at_fault == "second" else "second"
    with pytest.raises(RuntimeError, match=f"{at_fault}.count must be within") as raised:
        behind.load_state_dict(bad, assign=assign)
    its = f"loss.{sound}: the state of loss.{at_fault} is at fault; nothing of the state was loaded"
    assert its in str(raised.value)
    assert all(torch.equal(t, before[name]) for name, t in behind.state_dict().items())
    behind.load_state_dict(good, assign=assign)  # what was at fault then is forgotten
    assert all(torch.equal(t, good[name]) for name, t in behind.state_dict().items())


@pytest.mark.parametrize("assign", [False, True])
def test_hooks_of_the_memories_see_their_state_first(assign):
    """A sound state was refused; or one of the two was loaded."""

    def renamed(module, state, prefix, *_):
        for name in [name for name in state if name.startswith(prefix)]:
            state[name.replace("old_bank", "bank")] = state.pop(name)

    def spoilt(module, state, prefix, *_):
        state[f"{prefix}count"] = torch.tensor(M + 1)

    ahead, behind = TwoTowers(SupCon(), D, M), TwoTowers(SupCon(), D, M)
    for x, y, labels, _ in batches(2, False, True, torch.float32):
        ahead(x, y, labels)
    good = {name: t.clone() for name, t in ahead.state_dict().items()}
    before = {name: t.clone() for name, t in behind.state_dict().items()}
    old = {name.replace("bank", "old_bank"): t for name, t in good.items()}
    hook = behind.first.register_load_state_dict_pre_hook(renamed)
    with pytest.raises(RuntimeError, match="first: the state of second is at fault; nothing of the state was loaded"):
        behind.load_state_dict(old, assign=assign)
    assert all(torch.equal(t, before[name]) for name, t in behind.state_dict().items())
    other = behind.second.register_load_state_dict_pre_hook(renamed)
    behind.load_state_dict(old, assign=assign)
    assert all(torch.equal(t, good[name]) for name, t in behind.state_dict().items())
    hook.remove(), other.remove()
    behind = TwoTowers(SupCon(), D, M)
    behind.second.register_load_state_dict_pre_hook(spoilt)
    with pytest.raises(RuntimeError, match="first: the state of second is at fault; nothing of the state was loaded"):
        behind.load_state_dict(good, assign=assign)
    assert all(torch.equal(t, before[name]) for name, t in behind.state_dict().items())


def test_a_load_that_a_hook_ends_has_no_effect_on_the_next():
    def ends(module, state, prefix, *_):
        raise KeyboardInterrupt

    towers = TwoTowers(SupCon(), D, M)
    for x, y, labels, _ in batches(2, False, True, torch.float32):
        towers(x, y, labels)
    good = {name: t.clone() for name, t in towers.state_dict().items()}
    bad = good | {"first.count": torch.tensor(M + 1)}
    hook = towers.second.register_load_state_dict_pre_hook(ends)
    with pytest.raises(KeyboardInterrupt):
        towers.load_state_dict(bad)
    hook.remove()
    assert all(torch.equal(t, good[name]) for name, t in towers.state_dict().items())
    towers.second.load_state_dict({name.removeprefix("second."): t for name, t in good.items() if "second." in name})
    towers.load_state_dict(good)


def test_the_state_of_one_memory_is_not_loaded_alone():
    towers = TwoTowers(SupCon(), D, M)
    half = {name: t for name, t in towers.state_dict().items() if name.startswith("first.")}
    with pytest.raises(RuntimeError, match="first: the state of second is missing; nothing of the state was loaded"):
        towers.load_state_dict(half, strict=False)
    assert towers.load_state_dict({}, strict=False).missing_keys


@pytest.mark.parametrize("name", [*OF_A_MEMORY, "drift", "memory_size"])
def test_an_option_that_does_nothing_cannot_be_set(name):
    criterion = copy.deepcopy(TwoTowers(SupCon(), D, M))
    for memory in (criterion.first, criterion.second):
        value = getattr(memory, name)
        if name in ("update", "warmup_steps", "eps"):
            setattr(memory, name, value)
        else:
            with pytest.raises(AttributeError, match=f"^{name} .*cannot be set"):
                setattr(memory, name, value)
    with pytest.raises(AttributeError, match=f"^{name} .*(cannot be set|set it on first and second)"):
        setattr(criterion, name, value)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(default):
    relation = LabelSets([[0, 1], [1], [2]])
    modules = [
        TwoTowers(SupCon(), D, M),
        CrossBatchMemory(SelectPairs(SupCon(), relation), D, M),
        CrossBatchMemory(Contrastive(), D, M, normalize_embeddings=False),
    ]
    x, y, labels = torch.randn(B, D), torch.randn(B, D), torch.arange(B) % 3
    results = []
    for dtype in (torch.float32, default):
        torch.set_default_dtype(dtype)
        try:
            its = [copy.deepcopy(module) for module in modules]
            results.append([its[0](x, y, labels), its[1](x, labels), its[2](x, labels)])
        finally:
            torch.set_default_dtype(torch.float32)
    for first, second in zip(*results, strict=True):
        assert first.dtype == second.dtype == torch.float32 and torch.equal(first, second)


@pytest.mark.parametrize("name", ["labels", "ids"])
def test_labels_that_are_no_tensor_are_named(name):
    towers = TwoTowers(SupCon(), 4, 8)
    with pytest.raises(TypeError, match=f"^{name} must be an integer tensor, got list"):
        towers(torch.randn(2, 4), torch.randn(2, 4), **{name: [0, 1]})
    assert towers.first.count == 0


@pytest.mark.parametrize("name", ["labels", "ids"])
def test_labels_and_ids_of_a_memory_may_be_a_batch_s(name):
    """The memories had moved when the last op of the step refused them."""
    given, copied = (TwoTowers(SupCon(), 4, 8) for _ in range(2))
    for step in range(2):
        torch.manual_seed(step)
        x, y, numbers = torch.randn(4, 4), torch.randn(4, 4), torch.arange(4)
        assert given(x, y, numbers, ids=numbers) == copied(x, y, numbers, ids=numbers)
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    stored = getattr(given.second, f"bank_{name}")
    expected = copied(x, y, **{name: stored.clone()})
    assert given(x, y, **{name: stored}) == expected
    for own, other in ((given.first, copied.first), (given.second, copied.second)):
        for (state, tensor), (_, there) in zip(own.named_state(), other.named_state(), strict=True):
            assert torch.equal(tensor, there), state
