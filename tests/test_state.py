"""The memory's state is in `state_dict()` and not among the buffers: it is made, moved, copied, replaced and emptied
whole."""

import copy

import pytest
import torch
import torch.nn.utils.parametrize
from criteria import B, D, M, Net, Subclass, assert_state, state_of, train
from torch import nn

from xbn_ext import Contrastive, CrossBatchMemory, CustomLoss, SelectPairs, SigLIP, SupCon, TwoTowers


def test_there_are_no_buffers():
    criterion = CrossBatchMemory(Contrastive(), D, M)
    assert not list(criterion.buffers()) and not list(criterion.parameters())
    assert [name for name, _ in Subclass(Contrastive(), D, M).named_buffers()] == ["cache", "weights"]


@pytest.mark.parametrize("loss", [Contrastive(), SupCon(nn.Parameter(torch.tensor([0.3])))], ids=["plain", "learned"])
def test_made_on_meta_and_reset(loss):
    """What launchers do: to_empty(), then reset_parameters() of every module that has it."""
    with torch.device("meta"):
        net = Net(copy.deepcopy(loss))
    net.to("meta")  # the temperature
    assert net(torch.randn(B, D, device="meta"), torch.arange(B, device="meta")).is_meta
    net.to_empty(device="cpu")
    for tensor in (*net.parameters(), *(tensor for _, tensor in net.criterion.named_state())):
        tensor.data.fill_(77)
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    expected = CrossBatchMemory(loss, D, M).state_dict()
    assert_state(net.criterion, expected)
    assert torch.isnan(net.criterion.stats()["gain"])
    train(net)


def test_a_temperature_that_never_had_a_value_becomes_the_default():
    criterion = CrossBatchMemory(SupCon(nn.Parameter(torch.empty(1, device="meta"))), D, M).to_empty(device="cpu")
    criterion.reset_parameters()
    assert criterion.temperature.item() == pytest.approx(SupCon().temperature)


class Weighted(CustomLoss):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def positive(self, s):
        return self.weight * (1 - s)

    def negative(self, s):
        return s.relu()


class WeightedAndReset(Weighted):
    def reset_parameters(self):
        nn.init.constant_(self.weight, 3.0)


def test_a_loss_of_ones_own_resets_what_it_learns_itself():
    for loss, expected in ((Weighted(), 9), (WeightedAndReset(), 3)):
        criterion = CrossBatchMemory(loss, D, M)
        nn.init.constant_(loss.weight, 9.0)
        criterion.reset_parameters()
        assert loss.weight == 9, "which a user may have loaded: only the loss knows"
        for module in criterion.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        assert loss.weight == expected


def test_a_parametrized_temperature_is_reset():
    class Exponential(nn.Module):
        def forward(self, logarithm):
            return logarithm.exp()

        def right_inverse(self, value):
            return value.log()

    criterion = CrossBatchMemory(SupCon(nn.Parameter(torch.tensor(0.3))), D, M)
    torch.nn.utils.parametrize.register_parametrization(criterion, "temperature", Exponential())
    with torch.no_grad():
        criterion.parametrizations.temperature.original.zero_()
    assert criterion.temperature.item() == 1
    criterion.reset_parameters()
    assert criterion.temperature.item() == pytest.approx(0.3)


def test_a_temperature_that_cannot_be_reset_leaves_the_memory():
    half = nn.Module()
    half.forward = lambda t: t / 2
    criterion = train(CrossBatchMemory(SupCon(nn.Parameter(torch.tensor(0.2))), D, M))
    nn.utils.parametrize.register_parametrization(criterion, "temperature", half)
    before = state_of(criterion)
    with pytest.raises(RuntimeError, match="right_inverse"):
        criterion.reset_parameters()
    assert_state(criterion, before)


def test_a_memory_on_meta_says_so():
    criterion, trained = CrossBatchMemory(Contrastive(), D, M).to("meta"), train(CrossBatchMemory(Contrastive(), D, M))
    with pytest.raises(RuntimeError, match="fill_from: the memory is on the meta device"):
        criterion.fill_from([(torch.randn(B, D), torch.arange(B))])
    with pytest.raises(RuntimeError, match="on the meta device: load with assign=True, or call to_empty"):
        criterion.load_state_dict(trained.state_dict())
    criterion.load_state_dict(trained.state_dict(), assign=True)
    assert_state(criterion, state_of(trained))
    assert criterion.stats()["gap_before"].isnan() and criterion.stats()["fill"] > 0
    train(criterion)


class Own(CustomLoss):
    def positive(self, s):
        return 1 - s

    def negative(self, s):
        return s.relu()


@pytest.mark.parametrize(
    "made", [CrossBatchMemory, TwoTowers, lambda loss, *of: CrossBatchMemory(SelectPairs(loss), *of)]
)
def test_what_is_learned_keeps_its_dtype(made):
    criterion = made(SupCon(nn.Parameter(torch.tensor(0.07))), D, M)
    for cast in (criterion.half, criterion.double, lambda: criterion.to(torch.bfloat16)):
        [parameter] = cast().parameters()
        assert parameter.dtype == torch.float32 and parameter == torch.tensor(0.07)


@pytest.mark.parametrize(
    "loss", [Contrastive(), Own(), SupCon(nn.Parameter(torch.tensor(0.1)))], ids=["native", "own", "learned"]
)
@pytest.mark.parametrize("change", [copy.deepcopy, lambda c: c._apply(torch.clone)])
def test_what_is_copied_or_moved_where_nothing_is_tracked(loss, change):
    """It can be written outside, whichever way the loss goes; a temperature from there cannot be learned."""
    criterion = train(CrossBatchMemory(loss, D, M, center_gradient=True))
    with torch.inference_mode():
        criterion = change(criterion)
    if not any(p.is_inference() for p in criterion.parameters()):
        train(criterion)
        return
    before = copy.deepcopy(criterion.state_dict())
    with pytest.raises(RuntimeError, match="a parameter of the loss was made in inference mode"):
        train(criterion)
    assert_state(criterion, before)


@pytest.mark.long
@pytest.mark.parametrize(
    ("drift", "rows"),
    [
        ("axbn", 1),
        pytest.param("none", B, marks=pytest.mark.long),
        pytest.param("none", 1, marks=pytest.mark.long),
        pytest.param("axbn", B, marks=pytest.mark.long),
    ],
)
def test_compiled_emptying_and_filling(drift, rows):
    torch._dynamo.reset()
    criterion = train(CrossBatchMemory(Contrastive(), D, M, drift=drift))
    plain, batch = copy.deepcopy(criterion), [(torch.randn(rows, D), torch.arange(rows))]
    for of in (criterion, plain):
        fill = torch.compile(of.fill_from, backend="aot_eager") if of is criterion else of.fill_from
        fill(batch)
    torch.testing.assert_close(dict(criterion.named_state()), dict(plain.named_state()), equal_nan=True)
    torch.compile(criterion.reset_queue, backend="aot_eager", fullgraph=True)()
    new = dict(CrossBatchMemory(Contrastive(), D, M, drift=drift).named_state())
    torch.testing.assert_close(dict(criterion.named_state()), new, equal_nan=True)


def test_emptying_and_filling_are_of_the_memory_alone():
    """A subclass may have state of its own."""
    criterion = Subclass(Contrastive(), D, M)
    criterion.register_state("prototypes", torch.full((3,), 5.0))
    train(criterion)
    criterion.fill_from([(torch.randn(B, D), torch.arange(B))])
    assert criterion.count == B and criterion.prototypes.eq(5).all() and criterion.weights.eq(1).all()
    criterion.reset_queue()
    assert criterion.count == 0 and criterion.prototypes.eq(5).all()
    assert "prototypes" in criterion.state_dict()
    new = CrossBatchMemory(Contrastive(), D, M)
    for name, tensor in new.named_state():
        torch.testing.assert_close(getattr(criterion, name), tensor, equal_nan=True)


def test_a_generator_that_trains_the_criterion_loses_no_step():
    criterion = train(CrossBatchMemory(Contrastive(), D, M))

    def batches():
        for _ in range(2):
            criterion(torch.randn(B, D), torch.arange(B))
        yield torch.randn(B, D), torch.arange(B)

    criterion.fill_from(batches())
    assert criterion.step == 5 and criterion.count == B


def test_a_subclass_has_tensors_of_its_own():
    trained, other = train(Subclass(Contrastive(), D, M)), Subclass(Contrastive(), D, M)
    trained.weights.fill_(5)
    assert {"weights", "head_of_class.weight", "bank"} < set(trained.state_dict())
    other.load_state_dict(trained.state_dict())
    assert_state(other, state_of(trained))
    trained.half()
    assert trained.head_of_class.weight.dtype == torch.float16 and trained.bank.dtype == torch.float32
    other.fill_from([(torch.randn(B, D), torch.arange(B))])
    assert other.count == B and other.weights.eq(5).all()


@pytest.mark.parametrize("name, value, most", [("head", M, M - 1), ("head", -1, M - 1), ("count", M + 1, M)])
@pytest.mark.parametrize("make", [Contrastive, SigLIP, lambda: SupCon(nn.Parameter(torch.tensor(0.2)))])
def test_a_place_written_out_of_range_raises_before_anything_is_written(make, name, value, most):
    """In a step of several ops the last one would find it."""
    criterion = train(CrossBatchMemory(make(), D, M))
    getattr(criterion, name).fill_(value)
    before = state_of(criterion)
    for mode in (True, False):
        with pytest.raises(RuntimeError, match=rf"^{name} must be within \[0, {most}\], got {value}"):
            train(criterion.train(mode))
    assert_state(criterion, before)
    towers = TwoTowers(SupCon(), D, M)
    getattr(towers.second, name).fill_(value)
    with pytest.raises(RuntimeError, match=rf"^{name} must be within"):
        towers(torch.randn(B, D), torch.randn(B, D))
    assert towers.first.count == 0 and towers.first.step == 0


@pytest.mark.parametrize("name, value", [("step", 0), ("scale", 64.0), ("bank", None), ("pairs", [1, 2])])
def test_a_subclass_does_not_replace_the_state_by_a_name_of_its_own(name, value):
    """As with a buffer. A step would have raised with the memory half moved."""
    criterion = train(CrossBatchMemory(Contrastive(), D, M))
    before = state_of(criterion)
    with pytest.raises(TypeError, match=f"{name} is state of CrossBatchMemory and must be a tensor, got"):
        setattr(criterion, name, value)
    with pytest.raises(KeyError, match=f"attribute '{name}' already exists"):
        criterion.register_state(name, torch.zeros(3))
    for wrong in (None, 3.0, nn.Parameter(torch.zeros(3))):
        with pytest.raises(TypeError, match=f"register_state: own must be a tensor, got {type(wrong).__name__}"):
            criterion.register_state("own", wrong)
    assert not hasattr(criterion, "own")
    assert_state(criterion, before)


def test_moving_moves_everything():
    criterion = CrossBatchMemory(Contrastive(), D, M).to("meta")
    assert all(tensor.is_meta for _, tensor in criterion.named_state())
    assert {name for name, _ in criterion.named_state(persistent=False)} == {"pairs", "drift_stats"}


def test_functional_call_takes_another_state():
    criterion = train(CrossBatchMemory(Contrastive(neg_margin=0.2), D, M))
    other = state_of(train(copy.deepcopy(criterion)))
    x, labels = torch.randn(B, D), torch.arange(B) % 3
    before = state_of(criterion)
    value = torch.func.functional_call(criterion, other, (x, labels))
    assert_state(criterion, before)
    assert other["step"] == 7, "it is what was written"
    assert value != criterion.eval()(x, labels)


@pytest.mark.parametrize("name", ["bank", "bank_ids", "head", "scale"])
def test_functional_call_takes_no_state_of_another_shape(name):
    """It raised in the op that takes it, when others had written."""
    criterion = train(CrossBatchMemory(Contrastive(neg_margin=0.2), D, M))
    before = state_of(criterion)
    with pytest.raises(ValueError, match=rf"{name} is state of CrossBatchMemory and must be \[.*\], got \[3\]"):
        torch.func.functional_call(criterion, {name: torch.zeros(3)}, (torch.randn(B, D), torch.arange(B)))
    assert_state(criterion, before)


@pytest.mark.parametrize(
    "name, change, error, message",
    [
        ("bank", torch.Tensor.int, TypeError, "torch.float32, got torch.int32"),
        ("bank_labels", torch.Tensor.int, TypeError, "torch.int64, got torch.int32"),
        ("head", torch.Tensor.float, TypeError, "torch.int64, got torch.float32"),
        ("pairs", torch.Tensor.float, TypeError, "torch.float64, got torch.float32"),
        ("bank", lambda t: t.T.contiguous().T, ValueError, "contiguous"),
        ("scale", lambda t: torch.zeros(2 * D, dtype=t.dtype)[::2], ValueError, "contiguous"),
        ("bank", torch.Tensor.to_sparse, TypeError, "dense, got torch.float32, torch.sparse_coo"),
        ("bank", torch._neg_view, ValueError, "the tensor of its own numbers"),
    ],
)
def test_state_is_replaced_by_nothing_that_a_step_does_not_take(name, change, error, message):
    """The last op of a step raised, when others had written."""
    criterion = train(CrossBatchMemory(SelectPairs(Contrastive()), D, M))
    before = state_of(criterion)
    with pytest.raises(error, match=f"{name} is state of CrossBatchMemory and must be {message}"):
        setattr(criterion, name, change(getattr(criterion, name)))
    assert_state(criterion, before)
    criterion(torch.randn(B, D), torch.arange(B))


@pytest.mark.parametrize(
    "name, other", [("head", "count"), ("bank_labels", "bank_ids"), ("scale", "shift"), ("sums", "sums")]
)
def test_state_is_replaced_by_no_other_state(name, other):
    """The last op of a step raised, when others had written."""
    criterion = train(CrossBatchMemory(SelectPairs(Contrastive()), D, M))
    before = state_of(criterion)
    given = getattr(criterion, other)
    for same in (given, given.detach(), given.view(given.shape)):
        if name == other:
            setattr(criterion, name, same)
            continue
        with pytest.raises(ValueError, match=f"{name} is state of CrossBatchMemory and must be apart from {other}, wi"):
            setattr(criterion, name, same)
        with pytest.raises(ValueError, match=f"{name} is state of CrossBatchMemory and must be apart from {other}, wi"):
            torch.func.functional_call(criterion, {name: same}, (torch.randn(B, D), torch.arange(B)))
    assert_state(criterion, before)
    criterion(torch.randn(B, D), torch.arange(B))


UNFIT = {  # by what is said of it: a state tensor that takes the place of another
    "head is on meta, bank on cpu: move one of them": ("head", lambda t: t.to("meta")),
    "pairs requires a gradient, and a memory has none: detach it": ("pairs", lambda t: t.clone().requires_grad_()),
    "step was made in inference mode and cannot be written": ("step", torch.inference_mode()(torch.Tensor.clone)),
}


@pytest.mark.parametrize("message", UNFIT)
@pytest.mark.parametrize("towers", [False, True], ids=["one memory", "two towers"])
def test_a_step_refuses_state_that_it_could_not_write(towers, message):
    """The last op of a step raised, when others had written; of two towers, one had made its step."""
    name, change = UNFIT[message]
    x, labels = torch.randn(B, D), torch.arange(B)
    criterion: nn.Module = TwoTowers(SupCon(), D, M) if towers else CrossBatchMemory(SelectPairs(Contrastive()), D, M)
    memories = [criterion.first, criterion.second] if towers else [criterion]
    batch = (x, torch.randn(B, D), labels) if towers else (x, labels)
    criterion(*batch)
    before = [state_of(memory) for memory in memories]
    given = change(getattr(memories[-1], name))
    with pytest.raises(RuntimeError, match=message):
        torch.func.functional_call(criterion, {"second." * towers + name: given}, batch)
    kept = getattr(memories[-1], name)
    setattr(memories[-1], name, given)
    with pytest.raises(RuntimeError, match=message):
        criterion(*batch)
    setattr(memories[-1], name, kept)
    for memory, its in zip(memories, before, strict=True):
        assert_state(memory, its)
    criterion(*batch)


def test_state_made_in_inference_mode_is_written_in_it():
    criterion = CrossBatchMemory(SelectPairs(Contrastive()), D, M)
    with torch.inference_mode():
        torch.func.functional_call(criterion, state_of(criterion), (torch.randn(B, D), torch.arange(B)))
        criterion.step = criterion.step.clone()
        criterion(torch.randn(B, D), torch.arange(B))
        assert criterion.step == 1
    criterion.eval()(torch.randn(B, D), torch.arange(B))


def test_functional_call_compiles():
    torch._dynamo.reset()
    criterion = train(CrossBatchMemory(Contrastive(neg_margin=0.2), D, M))
    x, labels, other = torch.randn(B, D), torch.arange(B) % 3, state_of(train(copy.deepcopy(criterion)))
    before, values = state_of(criterion), []
    for call in (torch.func.functional_call, torch.compile(torch.func.functional_call, backend="aot_eager")):
        given = {name: tensor.clone() for name, tensor in other.items()}
        values.append(call(criterion, given, (x, labels)))
        assert given["step"] == 7
        assert_state(criterion, before)
    torch.testing.assert_close(*values)


def test_a_parameter_does_not_become_state():
    """It stayed one: of the optimizer, of DistributedDataParallel, and what is chosen once could be set."""
    criterion = train(CrossBatchMemory(Contrastive(), D, M))
    before = state_of(criterion)
    given = nn.Parameter(criterion.bank.clone())
    with pytest.raises(TypeError, match=r"^bank is state of CrossBatchMemory and must be a tensor, got Parameter"):
        criterion.bank = given
    with pytest.raises(TypeError, match=r"^bank is state of CrossBatchMemory and must be a tensor, got Parameter"):
        torch.func.functional_call(criterion, {"bank": given}, (torch.randn(B, D), torch.arange(B)))
    assert not list(criterion.parameters())
    assert_state(criterion, before)
