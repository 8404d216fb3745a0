"""The memory's state is in `state_dict()` and not among the buffers: what wraps, averages, casts, moves, copies or
loads a model that owns its criterion leaves a memory that existed."""

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.utils.parametrize
from processes import context, start
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from xbn_ext import Contrastive, CrossBatchMemory, CustomLoss, SelectPairs, SupCon, Triplet, TwoTowers

D, M, B = 8, 32, 6
OLD = Path(__file__).parent / "data" / "memory-0.1.0.pt"


class Net(nn.Module):
    """A model that owns its criterion, as a LightningModule does."""

    def __init__(self, loss=None):
        super().__init__()
        self.fc = nn.Linear(D, D)
        self.criterion = CrossBatchMemory(loss or Contrastive(neg_margin=0.2), D, M)

    def forward(self, x, labels):
        return self.criterion(self.fc(x), labels)


class Subclass(CrossBatchMemory):
    """With tensors of its own."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("cache", torch.zeros(3), persistent=False)
        self.register_buffer("weights", torch.ones(3))
        self.head_of_class = nn.Linear(2, 2)


def train(module, steps=3, first_label=0):
    for _ in range(steps):
        x = torch.randn(B, D, requires_grad=True)
        module(x, torch.arange(B) % 3 + first_label).backward()
    return module


def state_of(criterion):
    return {name: tensor.clone() for name, tensor in criterion.state_dict().items()}


def assert_state(criterion, expected):
    found = criterion.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_there_are_no_buffers():
    criterion = CrossBatchMemory(Contrastive(), D, M)
    assert not list(criterion.buffers()) and not list(criterion.parameters())
    assert [name for name, _ in Subclass(Contrastive(), D, M).named_buffers()] == ["cache", "weights"]


def _rank(rank, store, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    net = Net()
    train(nn.parallel.DistributedDataParallel(net), first_label=100 * rank)
    queue.put((rank, net.criterion.label_memory.tolist(), net.fc.weight.detach().tolist()))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.long
def test_every_rank_of_distributed_data_parallel_keeps_its_memory(tmp_path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    queue = context().SimpleQueue()
    start(2, _rank, str(tmp_path / "store"), queue)
    (_, labels, weight), (_, other_labels, other_weight) = sorted(queue.get() for _ in range(2))
    assert weight == other_weight
    assert labels == [0, 1, 2] * 6 and other_labels == [100, 101, 102] * 6


def test_distributed_data_parallel_has_nothing_to_broadcast(one_process):
    wrapped = nn.parallel.DistributedDataParallel(Net())
    assert not wrapped.modules_buffers
    train(wrapped)
    assert wrapped.module.criterion.count == 3 * B


def test_averaging_leaves_a_memory_that_existed():
    """The average has the memory of the model that it was made of, and copying it back leaves the model's own."""
    net = train(Net(), first_label=1000)
    at_first = state_of(net.criterion)
    averaged = AveragedModel(net, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(4):
        train(net, 1, first_label=1000)
        averaged.update_parameters(net)
    assert_state(averaged.module.criterion, at_first)
    now = state_of(net.criterion)
    with torch.no_grad():  # as Lightning's WeightAveraging does when training ends
        for ours, theirs in zip(net.parameters(), averaged.module.parameters(), strict=True):
            ours.copy_(theirs)
        for ours, theirs in zip(net.buffers(), averaged.module.buffers(), strict=True):
            ours.copy_(theirs)
    assert_state(net.criterion, now)


def test_fsdp1_casts_nothing(one_process):
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision

    precision = MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
    net = Net()
    dtypes = {name: tensor.dtype for name, tensor in net.criterion.state_dict().items()}
    wrapped = FullyShardedDataParallel(net, device_id=torch.device("cpu"), mixed_precision=precision)
    train(wrapped)
    assert {name: tensor.dtype for name, tensor in net.criterion.state_dict().items()} == dtypes
    assert net.criterion.count == 3 * B


def test_fsdp2_learns_a_temperature_of_one_element(one_process):
    from torch.distributed.fsdp import fully_shard

    net = Net(SupCon(nn.Parameter(torch.tensor([0.3]))))
    alone = copy.deepcopy(net)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    fully_shard(net, mesh=mesh)
    x, labels = torch.randn(B, D), torch.arange(B) % 3
    for module in (net, alone):
        module(x, labels).backward()
    torch.testing.assert_close(net.criterion.temperature.grad.full_tensor(), alone.criterion.temperature.grad)
    assert net.criterion.temperature.grad.full_tensor().abs() > 0


@pytest.mark.parametrize("name", ["embeddings", "labels", "enqueue_mask", "ids"])
def test_a_distributed_tensor_is_refused_before_anything_is_written(name, one_process):
    """One among others raised in the first op that takes it, which for labels comes after the memory has moved."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    criterion = train(CrossBatchMemory(Contrastive(), D, M))
    before, labels = state_of(criterion), torch.arange(B)
    call = {"embeddings": torch.randn(B, D), "labels": labels, "enqueue_mask": labels > 3, "ids": labels}
    call[name] = distribute_tensor(call[name], mesh, [Replicate()])
    with pytest.raises(TypeError, match=f"{name} must be .* in a DTensor, not its to_local"):
        criterion(**call)
    state = state_of(criterion) | {"sums": distribute_tensor(criterion.sums, mesh, [Replicate()])}
    with pytest.raises(RuntimeError, match=r"sums must be .* in a DTensor.*; nothing of the state was loaded"):
        criterion.load_state_dict(state)
    assert_state(criterion, before)


def test_checkpoints_of_torch_distributed(one_process):
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    net, other = train(Net()), Net()
    state = get_model_state_dict(net)
    assert "criterion.bank" in state
    set_model_state_dict(other, state)
    assert_state(other.criterion, state_of(net.criterion))


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


def test_assign_takes_copies_and_keeps_dtypes():
    narrow = train(CrossBatchMemory(Contrastive(), D, M, memory_dtype=torch.float16))
    wide = CrossBatchMemory(Contrastive(), D, M)
    wide.load_state_dict(narrow.state_dict(), assign=True)
    assert wide.bank.dtype == torch.float32 and torch.equal(wide.bank, narrow.bank.float())
    before = state_of(narrow)
    train(wide)
    assert_state(narrow, before)
    with pytest.raises(RuntimeError, match=r"bank is torch\.float32 and would be rounded to torch\.float16; nothing"):
        narrow.load_state_dict(wide.state_dict(), assign=True)
    mixed = wide.state_dict() | {"sums": wide.sums.to("meta")}
    with pytest.raises(RuntimeError, match="must be on one device to be assigned, got cpu, meta; nothing"):
        wide.load_state_dict(mixed, assign=True)


def number(value, dtype=torch.int64):
    return torch.tensor(value, dtype=dtype)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bank_labels": torch.zeros(M)}, r"bank_labels is torch\.float32 and would be rounded to torch\.int64"),
        ({"head": 3}, "head must be a tensor, got int"),
        ({"head": number(M)}, r"head must be within \[0, 31\], got 32"),
        ({"head": number(5), "count": number(6)}, "head must be count where the memory is not full, got 5 and 6"),
        ({"count": number(-3)}, r"count must be within \[0, 32\], got -3"),
        ({"step": number(-1)}, "step must not be negative, got -1"),
        ({"variance": number(torch.nan, torch.float64)}, "variance must not be negative or NaN, got nan"),
        ({"scale": torch.zeros(D, dtype=torch.float64)}, "scale must not be 0"),
        ({"target_std": torch.full((D,), -0.1, dtype=torch.float64)}, "target_std must not be negative"),
        ({"bank": torch.full((M, D), torch.nan).to(torch.float8_e5m2), "count": number(1)}, "bank must be finite"),
        ({"sums": torch.full((2, D), torch.inf, dtype=torch.float64)}, "sums must be finite"),
        ({"bank": torch.full((M, D), torch.nan), "count": number(1)}, "bank must be finite"),
        ({"head": number(3).to("meta")}, "head holds no values: it is on the meta device, or fake"),
        (
            {"bank_steps": torch.zeros(M, dtype=torch.int64).to_sparse()},
            "bank_steps must be a tensor, got .*sparse_coo",
        ),
        (
            {"bank": torch.zeros(M, D, dtype=torch.int64)},
            r"bank is torch\.int64 and would be rounded to torch\.float32",
        ),
        (
            {"bank_labels": torch.zeros(M, dtype=torch.uint64)},
            r"bank_labels is torch\.uint64 and would be rounded to torch\.int64",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_state_that_cannot_be_is_refused_whole(change, message):
    criterion = train(CrossBatchMemory(SupCon(nn.Parameter(torch.tensor([0.2]))), D, M))
    before = state_of(criterion)
    other = CrossBatchMemory(SupCon(nn.Parameter(torch.tensor([0.2]))), D, M).state_dict()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=f"{message}; nothing of the state was loaded"):
            criterion.load_state_dict(other | change, strict=strict)
        assert_state(criterion, before)


def test_a_state_of_any_dtype_that_is_not_rounded_is_taken():
    """isfinite does not know each of them."""
    state = train(CrossBatchMemory(Contrastive(), D, M)).state_dict()
    narrow = {name: state[name].to(torch.float8_e4m3fn) for name in ("bank", "sums", "target_mean")}
    narrow |= {name: state[name].to(torch.int32) for name in ("bank_labels", "head", "count")}
    criterion = CrossBatchMemory(Contrastive(), D, M)
    criterion.load_state_dict(state | narrow)
    for name, tensor in narrow.items():
        assert torch.equal(getattr(criterion, name), tensor.to(state[name].dtype)), name


def test_what_was_only_measured_is_no_part_of_a_checkpoint():
    state = CrossBatchMemory(Contrastive(), D, M).state_dict() | {"pairs": torch.zeros(2)}
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "pairs"'):
        CrossBatchMemory(Contrastive(), D, M).load_state_dict(state)
    assert CrossBatchMemory(Contrastive(), D, M).load_state_dict(state, strict=False).unexpected_keys == ["pairs"]


def test_rows_that_nothing_was_stored_in_may_be_anything():
    state = CrossBatchMemory(Contrastive(), D, M).state_dict() | {"bank": torch.full((M, D), torch.nan)}
    CrossBatchMemory(Contrastive(), D, M).load_state_dict(state)


def test_a_part_of_the_state_is_none():
    net = train(Net())
    before = state_of(net.criterion)
    part = {name: tensor for name, tensor in Net().state_dict().items() if name != "criterion.bank_steps"}
    for strict in (True, False):
        with pytest.raises(
            RuntimeError, match=r"criterion\.bank_steps: missing from the state; nothing of the state was loaded"
        ):
            net.load_state_dict(part, strict=strict)
        assert_state(net.criterion, before)


def test_a_memory_is_loaded_without_a_temperature_and_a_temperature_without_a_memory():
    fixed, learned = SupCon(0.2), SupCon(nn.Parameter(torch.tensor([0.7])))
    trained = train(CrossBatchMemory(fixed, D, M))
    criterion = CrossBatchMemory(learned, D, M)
    missing, unexpected = criterion.load_state_dict(trained.state_dict(), strict=False)
    assert missing == ["temperature"] and not unexpected
    assert torch.equal(criterion.bank, trained.bank) and criterion.temperature == 0.7
    missing, _ = criterion.load_state_dict({"temperature": torch.tensor([0.3])}, strict=False)
    assert criterion.temperature == torch.tensor(0.3) and torch.equal(criterion.bank, trained.bank)
    assert set(missing) == set(trained.state_dict())


def test_hooks_see_the_state_first():
    """As of any module: what they rename or mend is what is loaded."""
    trained, criterion = (CrossBatchMemory(Contrastive(), D, M) for _ in range(2))
    train(trained)
    old = {f"old_{name}": tensor for name, tensor in trained.state_dict().items()}

    def rename(module, state_dict, prefix, *_):
        for name in list(state_dict):
            state_dict[name.replace("old_", "")] = state_dict.pop(name)
        state_dict[prefix + "bank_labels"] = state_dict[prefix + "bank_labels"] + 1000

    criterion.register_load_state_dict_pre_hook(rename)
    criterion.load_state_dict(old)
    assert torch.equal(criterion.label_memory, trained.label_memory + 1000) and torch.equal(
        criterion.bank, trained.bank
    )


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("made_there", [False, True])
def test_loading_where_nothing_is_tracked(assign, made_there):
    """A memory that is made or loaded under inference_mode can be written outside."""
    saved = train(CrossBatchMemory(Contrastive(), D, M)).state_dict()
    criterion = CrossBatchMemory(Contrastive(), D, M)
    with torch.inference_mode():
        if made_there:
            criterion = CrossBatchMemory(Contrastive(), D, M)
        criterion.load_state_dict(saved, assign=assign)
    assert_state(criterion, saved)
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


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_that_wants_a_gradient_gets_none(assign):
    saved = train(CrossBatchMemory(Contrastive(), D, M)).state_dict()
    wanting = {k: nn.Parameter(v.clone()) if v.is_floating_point() else v for k, v in saved.items()}
    criterion = CrossBatchMemory(Contrastive(), D, M)
    criterion.load_state_dict(wanting, assign=assign)
    assert not any(tensor.requires_grad for _, tensor in criterion.named_state())
    copy.deepcopy(train(criterion))


def test_fake_states():
    """To plan memory without having it: no value can be looked at."""
    real = train(CrossBatchMemory(Contrastive(), D, M))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = CrossBatchMemory(Contrastive(), D, M)
        fake.load_state_dict(CrossBatchMemory(Contrastive(), D, M).state_dict())
        fake.load_state_dict(real.state_dict())
    before = state_of(real)
    with pytest.raises(RuntimeError, match="bank holds no values"):
        real.load_state_dict(fake.state_dict())
    assert_state(real, before)


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


def test_what_was_measured_on_another_state_is_forgotten():
    criterion = train(CrossBatchMemory(Contrastive(neg_margin=0.2), D, M))
    assert not criterion.stats()["gap_before"].isnan()
    criterion.load_state_dict(criterion.state_dict())
    assert all(criterion.stats()[name].isnan() for name in ("gap_before", "gap_after", "gain", "positives"))


def test_a_wrapped_criterion_can_be_filled(one_process):
    from torch.distributed.fsdp import fully_shard

    sharded = fully_shard(CrossBatchMemory(Contrastive(), D, M), mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    half = nn.Module()
    half.forward = lambda t: t / 2
    parametrized = CrossBatchMemory(SupCon(nn.Parameter(torch.tensor(0.2))), D, M)
    nn.utils.parametrize.register_parametrization(parametrized, "temperature", half)
    for criterion in (sharded, parametrized):
        criterion.fill_from([(torch.randn(B, D), torch.arange(B))])
        assert criterion.count == B


def test_a_generator_that_trains_the_criterion_loses_no_step():
    criterion = train(CrossBatchMemory(Contrastive(), D, M))

    def batches():
        for _ in range(2):
            criterion(torch.randn(B, D), torch.arange(B))
        yield torch.randn(B, D), torch.arange(B)

    criterion.fill_from(batches())
    assert criterion.step == 5 and criterion.count == B


def test_a_part_of_a_model_may_be_loaded_without_it():
    net = train(Net())
    before = state_of(net.criterion)
    weights = {name: tensor for name, tensor in Net().state_dict().items() if not name.startswith("criterion")}
    missing, unexpected = net.load_state_dict(weights, strict=False)
    assert "criterion.bank" in missing and not unexpected
    assert_state(net.criterion, before)


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


@pytest.mark.parametrize("name, value", [("step", 0), ("scale", 64.0), ("bank", None), ("pairs", [1, 2])])
def test_a_subclass_does_not_replace_the_state_by_a_name_of_its_own(name, value):
    """As with a buffer. A step would have raised with the memory half moved."""
    criterion = train(CrossBatchMemory(Contrastive(), D, M))
    before = state_of(criterion)
    with pytest.raises(TypeError, match=f"{name} is state of CrossBatchMemory and must be a tensor, got"):
        setattr(criterion, name, value)
    with pytest.raises(KeyError, match=f"attribute '{name}' already exists"):
        criterion.register_state(name, torch.zeros(3))
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


@pytest.mark.parametrize(
    "name, make",
    {
        "axbn": lambda: CrossBatchMemory(Contrastive(), 4, 16),
        "axbn_float16": lambda: CrossBatchMemory(Triplet(), 4, 16, memory_dtype=torch.float16),
        "learned": lambda: CrossBatchMemory(SupCon(nn.Parameter(torch.tensor(1.0))), 4, 16, drift="none"),
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_of_version_0_1_0_loads(name, make, assign):
    """Written when the state was buffers: `state`, and the `rows` that it stood for."""
    saved = torch.load(OLD, weights_only=True)[name]
    criterion = make()
    criterion.load_state_dict(saved["state"], assign=assign)
    now = criterion.state_dict()
    assert not now.pop("innovation").any(), "which that version did not have"
    assert list(now) == list(saved["state"])
    assert_state(criterion, saved["state"] | {"innovation": torch.zeros(4, dtype=torch.float64)})
    assert torch.equal(criterion.embedding_memory, saved["rows"])
    criterion(torch.randn(3, 4), torch.arange(3))
