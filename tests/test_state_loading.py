"""A state is loaded whole, as it was saved, or refused."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.utils.parametrize
from criteria import D, M, Net, assert_state, state_of, train
from torch import nn

from xbn_ext import Contrastive, CrossBatchMemory, SupCon, Triplet

OLD = Path(__file__).parent / "data" / "memory-0.1.0.pt"


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


def test_what_was_measured_on_another_state_is_forgotten():
    criterion = train(CrossBatchMemory(Contrastive(neg_margin=0.2), D, M))
    assert not criterion.stats()["gap_before"].isnan()
    criterion.load_state_dict(criterion.state_dict())
    assert all(criterion.stats()[name].isnan() for name in ("gap_before", "gap_after", "gain", "positives"))


def test_a_part_of_a_model_may_be_loaded_without_it():
    net = train(Net())
    before = state_of(net.criterion)
    weights = {name: tensor for name, tensor in Net().state_dict().items() if not name.startswith("criterion")}
    missing, unexpected = net.load_state_dict(weights, strict=False)
    assert "criterion.bank" in missing and not unexpected
    assert_state(net.criterion, before)


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
