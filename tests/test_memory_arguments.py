"""What CrossBatchMemory refuses, when it is made, called or changed, it names, and nothing has changed."""

import copy
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from memory_cases import D, M, X, Y, batches, train

import xbn_ext
from xbn_ext import Contrastive, CrossBatchMemory, SupCon, TwoTowers
from xbn_ext.losses import PairLoss

BAD_CALLS = [
    ((X[0], Y), {}, ValueError, "embeddings must be"),
    ((X[:, 1:], Y), {}, ValueError, "embeddings must be .*embedding_size=16"),
    ((X.long(), Y), {}, TypeError, "embeddings must be a floating-point tensor, got torch.int64"),
    (([[1.0]], Y), {}, TypeError, "embeddings must be .*list"),
    ((X, Y.float()), {}, TypeError, "labels must be an integer tensor"),
    ((X, Y > 3), {}, TypeError, "labels must be an integer tensor"),
    ((X, Y.to(torch.uint64)), {}, TypeError, "labels must be of a dtype that int64 holds, got torch.uint64"),
    ((X, Y[1:]), {}, ValueError, r"labels must be \[B=24\]"),
    ((X, Y[:, None]), {}, ValueError, "labels must be"),
    ((X, Y), {"ids": Y.float()}, TypeError, "ids must be an integer tensor"),
    ((X, Y), {"ids": Y[1:]}, ValueError, r"ids must be \[B=24\]"),
    ((X, Y), {"ids": Y.to("meta")}, ValueError, "ids is on meta"),
    ((X, Y), {"ids": Y.to(torch.uint64)}, TypeError, "ids must be of a dtype that int64 holds, got torch.uint64"),
    ((X, Y, (Y, Y, Y)), {}, ValueError, "indices_tuple must be None: .*mining="),
    ((X, Y, Y > 3), {}, ValueError, "indices_tuple must be None: .*enqueue_mask="),
    ((X.to_sparse(), Y), {}, TypeError, "embeddings must be a floating-point tensor, got torch.float32, torch.sparse"),
    ((torch.nested.nested_tensor(list(X)), Y), {}, TypeError, "embeddings must be .*, got torch.float32, nested"),
    ((X, Y.to_sparse()), {}, TypeError, "labels must be an integer tensor, got torch.int64, torch.sparse_coo"),
    ((X, Y), {"ids": Y.to_sparse()}, TypeError, "ids must be an integer tensor, got torch.int64, torch.sparse_coo"),
    ((X, torch.quantize_per_tensor(X[:, 0], 1, 0, torch.qint32)), {}, TypeError, "labels must be .* got torch.qint32"),
    ((X, Y), {"enqueue_mask": Y}, TypeError, "enqueue_mask must be a bool tensor"),
    ((X, Y), {"enqueue_mask": Y[1:] > 3}, ValueError, "enqueue_mask must be"),
    ((X.to("meta"), Y), {}, ValueError, "embeddings is on meta, the memory on cpu"),
    ((X, Y.to("meta")), {}, ValueError, "labels is on meta"),
]


@pytest.mark.parametrize("args, kwargs, error, message", BAD_CALLS, ids=[m for *_, m in BAD_CALLS])
def test_bad_calls_change_nothing(args, kwargs, error, message):
    criterion = CrossBatchMemory(Contrastive(), D, M)
    train(criterion, batches(3))
    before = {k: v.clone() for k, v in criterion.state_dict().items()}
    with pytest.raises(error, match=message):
        criterion(*args, **kwargs)
    assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())


@pytest.mark.parametrize(
    "options, error",
    [
        ({"loss": torch.nn.MSELoss()}, TypeError),
        ({"embedding_size": 0}, ValueError),
        ({"memory_size": 0}, ValueError),
        ({"memory_size": 2.5}, ValueError),
        ({"drift": "kalman"}, ValueError),
        ({"update": "lazy"}, ValueError),
        ({"enqueue": "never"}, ValueError),
        ({"process_noise": -1.0}, ValueError),
        ({"measurement_noise": 0.0}, ValueError),
        ({"ema_momentum": 0.0}, ValueError),
        ({"warmup_steps": -1}, ValueError),
        ({"memory_dtype": torch.int32}, ValueError),
        ({"update": "inplace", "memory_dtype": torch.float16}, ValueError),
        ({"eps": 0.0}, ValueError),
        ({"eps": float("inf")}, ValueError),
        ({"batch_weight": float("nan")}, ValueError),
        ({"batch_weight": None}, ValueError),
        ({"batch_weight": 10**400}, ValueError),
        ({"batch_weight": 1e39}, ValueError),
        ({"memory_weight": "1"}, ValueError),
        ({"process_noise": "a"}, ValueError),
        ({"process_noise": float("inf")}, ValueError),
        ({"measurement_noise": [1.0]}, ValueError),
        ({"ema_momentum": "0.1"}, ValueError),
        ({"eps": "a"}, ValueError),
        ({"eps": 1e300}, ValueError),
        ({"renormalize": "false"}, ValueError),
        ({"center_gradient": 1}, ValueError),
        ({"normalize_embeddings": 1}, ValueError),
        ({"warmup_steps": 10**30}, ValueError),
        ({"embedding_size": "16"}, ValueError),
        ({"warmup_steps": None}, ValueError),
        ({"loss": PairLoss()}, TypeError),
        ({"loss": Contrastive}, TypeError),
        ({"batch_weight": 0.0, "memory_weight": 0.0}, ValueError),
    ],
)
def test_bad_options_are_named(options, error):
    arguments = {"loss": Contrastive(), "embedding_size": D, "memory_size": M} | options
    with pytest.raises(error, match=next(iter(options))):
        CrossBatchMemory(**arguments)


@pytest.mark.parametrize(
    "option, value",
    [
        ("batch_weight", None),
        ("batch_weight", float("nan")),
        ("memory_weight", "1"),
        ("memory_weight", -1.1e15),
        ("memory_weight", torch.tensor(0.5)),
        ("warmup_steps", "2"),
        ("warmup_steps", 2**70),
        ("normalize_embeddings", "false"),
        ("renormalize", "false"),
        ("center_gradient", None),
        ("update", "lazy"),
        ("update", None),
        ("enqueue", "befor"),
        ("eps", 0.0),
        ("eps", 1e31),
        ("warmup_steps", True),
    ],
)
def test_an_option_that_is_set_is_checked_like_one_that_is_given(option, value):
    """A step raised half way, with the filter moved and the batch stored; or the memory took no more rows."""
    criterion = CrossBatchMemory(Contrastive(), D, M)
    before = getattr(criterion, option)
    with pytest.raises(ValueError, match=f"{option} must be "):
        setattr(criterion, option, value)
    assert getattr(criterion, option) == before
    setattr(criterion, option, before)


def test_a_16_bit_memory_is_not_set_to_be_rounded_at_every_step():
    criterion = CrossBatchMemory(Contrastive(), D, M, memory_dtype=torch.float16)
    for one in (criterion, copy.deepcopy(criterion)):
        with pytest.raises(ValueError, match=r"update='inplace' would round a memory of torch\.float16"):
            one.update = "inplace"
    CrossBatchMemory(Contrastive(), D, M, memory_dtype=torch.float16, drift="none").update = "inplace"


def test_numbers_of_any_kind():
    """Options are numbers of Python's once they are checked."""
    plain = CrossBatchMemory(Contrastive(), D, M, batch_weight=0.5, eps=0.25, process_noise=0.5)
    other = CrossBatchMemory(
        Contrastive(), D, M, batch_weight=Fraction(1, 2), eps=Fraction(1, 4), process_noise=Fraction(1, 2),
        measurement_noise=np.float32(1), ema_momentum=Fraction(1, 10),
    )  # fmt: skip
    for x, labels in batches(3):
        assert torch.equal(plain(x, labels), other(x, labels))


@pytest.mark.parametrize("name", ["loss", "embedding_size", "memory_size", "drift", "filter"])
def test_what_is_chosen_once_cannot_be_set(name):
    criterion = CrossBatchMemory(Contrastive(), D, M)
    for one in (criterion, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        chosen = getattr(one, name)
        with pytest.raises(AttributeError, match=f"{name} is chosen once and cannot be set"):
            setattr(one, name, None)
        assert getattr(one, name) is chosen


@pytest.mark.parametrize(
    "name, value",
    [("memory_dtype", torch.float16), ("bank_dtype", torch.float16), ("process_noise", 1.0),
     ("measurement_noise", 2.0), ("ema_momentum", 0.5)],
)  # fmt: skip
def test_an_argument_that_went_into_another_cannot_be_set(name, value):
    """It did nothing, silently."""
    criterion = CrossBatchMemory(Contrastive(), D, M, drift="ema")
    with pytest.raises(AttributeError, match=f"{name} is chosen once and cannot be set"):
        setattr(criterion, name, value)
    towers = TwoTowers(SupCon(), D, M)
    for module in (towers, towers.second):
        with pytest.raises(AttributeError, match=f"{name} .*cannot be set"):
            setattr(module, name, value)


def test_repr():
    assert "drift='axbn'" in repr(CrossBatchMemory(Contrastive(), D, M))


def test_names_of_0_1_0_warn():
    with pytest.warns(DeprecationWarning, match="bank_dtype is called memory_dtype"):
        criterion = CrossBatchMemory(Contrastive(), D, M, bank_dtype=torch.float16)
    assert criterion.bank.dtype == torch.float16
    with pytest.warns(DeprecationWarning, match="xbn_ext.backend is called xbn_ext.loss_way"):
        assert xbn_ext.backend is xbn_ext.loss_way
    with pytest.raises(AttributeError, match="no attribute 'front'"):
        xbn_ext.front  # noqa: B018


def test_weights_that_become_zero_raise_before_anything_is_written(device):
    criterion = CrossBatchMemory(Contrastive(), D, M).to(device)
    data = list(batches(2, device=device))
    criterion(*data[0])
    before = {k: v.clone() for k, v in criterion.state_dict().items()}
    criterion.batch_weight = criterion.memory_weight = 0.0
    for mode in (True, False):
        with pytest.raises(ValueError, match="batch_weight and memory_weight are both 0"):
            criterion.train(mode)(*data[1])
    assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())
