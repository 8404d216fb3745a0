"""What torch asks of an op (opcheck), and what an op asks of its arguments."""

import copy
import dataclasses
import inspect
import math
import random
import warnings

import plain_ops
import pytest
import torch
from op_calls import (
    ARGUMENTS,
    OPS,
    B,
    D,
    M,
    enqueue_arguments,
    loss_arguments,
    schema_of,
    tensors_of,
    transform_arguments,
    written_by,
)
from torch.utils._pytree import tree_leaves

import xbn_ext
from xbn_ext import Circle, Contrastive, MultiSimilarity, NTXent, SigLIP, SupCon, Triplet, ops, reference
from xbn_ext.checks import MEMORY_DTYPE_NAMES
from xbn_ext.losses import LOSSES, PairLoss

# The compiled ops and those in plain PyTorch ask the same of their arguments.
every_library = pytest.mark.parametrize("library", ["xbn_ext", plain_ops.NAMESPACE])


def call(library, op, arguments):
    return getattr(getattr(torch.ops, library), op)(*arguments.values())


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    arguments, schema = ARGUMENTS[op](), schema_of(op).arguments
    assert list(arguments) == [a.name for a in schema]
    overload = getattr(torch.ops.xbn_ext, op).default
    torch.library.opcheck(overload, tuple(arguments.values()))
    optional = {a.name: None for a in schema if str(a.type).startswith("Optional")}
    estimated = {"process_noise": optional.pop("process_noise", None)}  # needs an innovation, which is optional, too
    for changes in (optional, {"need_grad": False}, estimated):
        if changes.keys() & arguments.keys():
            torch.library.opcheck(overload, tuple(ARGUMENTS[op](**changes).values()))


@pytest.mark.parametrize("op", [op for op in OPS if len(tensors_of(op)) > 1])
def test_a_tensor_on_the_meta_device_is_on_another_one(op):
    """It brings the call to what gives the shapes: that returned what was in new memory, and wrote nothing."""
    names = [name for name, value in ARGUMENTS[op]().items() if isinstance(value, torch.Tensor)]
    for i, name in enumerate(names):
        arguments = ARGUMENTS[op]()
        arguments[name] = arguments[name].detach().to("meta")
        other = name if i > 0 else names[1]
        with pytest.raises(RuntimeError, match=f"{op}: {other} is on another device than the other arguments"):
            call("xbn_ext", op, arguments)


f32, f64, i32 = torch.float32, torch.float64, torch.int32
SECOND_PASS = {"loss": "ntxent", "parameters": [0.1], "number": 1}
BAD = [
    ("normalize", {"x": torch.randn(B)}, r"x must be \[B, D\]"),
    ("normalize", {"x": torch.randn(B, 0)}, "x must have at least one column"),
    ("normalize", {"x": torch.ones(B, D, dtype=torch.bfloat16)}, "x must be float32 or float64"),
    ("normalize", {"eps": 0.0}, "eps must be positive"),
    ("normalize", {"eps": 1e31}, "eps must be positive, within"),
    ("normalize_backward", {"z": torch.randn(B)}, r"z must be \[B, D\]"),
    ("normalize_backward", {"grad_z": torch.randn(B, D + 1)}, r"grad_z must be \[B, D\]"),
    ("normalize_backward", {"grad_z": torch.randn(B, D, dtype=f64)}, "grad_z must be of the dtype of z"),
    ("normalize_backward", {"norm": torch.ones(B)}, "norm must be float64"),
    ("normalize_backward", {"norm": torch.ones(B + 1, dtype=f64)}, r"norm must be \[B\]"),
    ("normalize_backward", {"eps": math.nan}, "eps must be positive"),
    ("moments", {"x": torch.randn(B)}, r"x must be \[B, D\]"),
    ("moments", {"x": torch.randn(B, 0)}, "x must have at least one column"),
    ("moments", {"x": torch.ones(B, D, dtype=i32)}, "x must be float32 or float64"),
    ("moments", {"mask": torch.ones(B + 1, dtype=torch.bool)}, r"mask must be \[B\]"),
    ("moments", {"mask": torch.ones(B)}, "mask must be bool"),
    ("track_", {"target_mean": torch.zeros(D)}, "target_mean must be float64"),
    ("track_", {"target_std": torch.zeros(D + 1, dtype=f64)}, r"target_std must be \[D\]"),
    ("track_", {"variance": torch.zeros(1, dtype=f64)}, "variance must be a scalar"),
    ("track_", {"sums": torch.zeros(D, dtype=f64)}, r"sums must be \[2, D\]"),
    ("track_", {"count": torch.tensor(1.0)}, "count must be int64"),
    ("track_", {"count": torch.tensor(-1)}, r"count must be within \[0, "),
    ("track_", {"process_noise": -1.0}, "process_noise must not be negative"),
    ("track_", {"process_noise": math.nan}, "process_noise must not be negative"),
    ("track_", {"innovation": torch.zeros(D + 1, dtype=f64)}, r"innovation must be \[D\]"),
    ("track_", {"process_noise": None, "innovation": None}, "without a process_noise an innovation is needed"),
    ("track_", {"measurement_noise": 0.0}, "measurement_noise must be positive"),
    ("track_", {"fixed_gain": 1.5}, "fixed_gain must be within"),
    ("track_", {"eps": 0.0}, "eps must be positive"),
    ("track_", {"stats": torch.zeros(2, dtype=f64)}, r"stats must be \[3\]"),
    ("track_", {"stats": torch.zeros(3)}, "stats must be float64"),
    ("transform_", {"bank": torch.randn(D, M).T}, "bank must be contiguous"),
    ("transform_", {"bank": torch.ones(M, D, dtype=i32)}, f"bank must be {MEMORY_DTYPE_NAMES}"),
    ("enqueue_", {"bank": torch.ones(M, D, dtype=i32)}, f"bank must be {MEMORY_DTYPE_NAMES}"),
    ("memory_loss", {"bank": torch.ones(M, D, dtype=i32)}, f"bank must be {MEMORY_DTYPE_NAMES}"),
    ("transform_", {"count": torch.tensor(M + 1)}, r"count must be within \[0, 11\]"),
    ("track_", {"measurement_noise": math.inf}, "measurement_noise must be positive and finite"),
    ("standardize_", {"sums": torch.zeros(2, D)}, "sums must be float64"),
    ("standardize_", {"eps": 0.0}, "eps must be positive"),
    ("standardize_", {"count": torch.tensor(-1)}, "count must be within"),
    ("enqueue_", {"z": torch.randn(B, D + 1)}, r"z must be \[B, D\] \(any, 7\), got \[5, 8\]"),
    ("enqueue_", {"labels": torch.arange(B, dtype=i32)}, "labels must be int64"),
    ("enqueue_", {"labels": torch.arange(B + 1)}, r"labels must be \[B\]"),
    ("enqueue_", {"head": torch.tensor(-1)}, r"head must be within \[0, 10\]"),
    ("enqueue_", {"head": torch.tensor(M)}, r"head must be within \[0, 10\]"),
    ("enqueue_", {"count": torch.tensor(M + 1)}, r"count must be within \[0, 11\]"),
    ("enqueue_", {"bank_labels": torch.arange(M - 1)}, r"bank_labels must be \[M\]"),
    ("enqueue_", {"bank_ids": torch.arange(M - 1)}, r"bank_ids must be \[M\]"),
    ("enqueue_", {"bank_ids": torch.zeros(M)}, "bank_ids must be int64"),
    ("enqueue_", {"bank_ids": torch.arange(2 * M)[::2]}, "bank_ids must be contiguous"),
    ("enqueue_", {"bank_ids": None}, "ids need bank_ids"),
    ("enqueue_", {"ids": torch.arange(B + 1)}, r"ids must be \[B\]"),
    ("enqueue_", {"bank_steps": torch.arange(M + 1)}, r"bank_steps must be \[M\]"),
    ("enqueue_", {"bank_steps": None}, "bank_steps and step go together"),
    ("enqueue_", {"step": None}, "bank_steps and step go together"),
    ("enqueue_", {"step": torch.tensor(1.0)}, "step must be int64"),
    ("enqueue_", {"first": -1}, "first must not be negative, got -1"),
    ("enqueue_", {"first": 1}, "ring_size must have room for M = 11 slots from first = 1 on, got 11"),
    ("enqueue_", {"first": 2**63 - 1}, "ring_size must have room for M = 11 slots from first = 9223372036854775807 on"),
    ("enqueue_", {"ring_size": M - 1}, "ring_size must have room for M = 11 slots from first = 0 on, got 10"),
    ("enqueue_", {"ring_size": M + 3, "head": torch.tensor(M + 3)}, r"head must be within \[0, 13\]"),
    ("standardize_", {"ring_count": torch.tensor(9)}, "ring_sums and ring_count go together"),
    ("standardize_", {"ring_sums": torch.zeros(2, D), "ring_count": torch.tensor(9)}, "ring_sums must be float64"),
    ("step_", {"bank": torch.ones(M, D, dtype=i32)}, f"bank must be {MEMORY_DTYPE_NAMES}"),
    ("step_", {"bank_ids": torch.arange(M - 1)}, r"bank_ids must be \[M\]"),
    ("step_", {"target_mean": torch.zeros(D)}, "target_mean must be float64"),
    ("step_", {"step": torch.tensor(1.0)}, "step must be int64"),
    ("step_", {"head": torch.tensor(M)}, r"head must be within \[0, 10\]"),
    ("step_", {"count": torch.tensor(M + 1)}, r"count must be within \[0, 11\]"),
    ("step_", {"pairs": torch.zeros(3, dtype=f64)}, r"pairs must be \[2\]"),
    ("step_", {"drift_stats": torch.zeros(3)}, "drift_stats must be float64"),
    ("step_", {"x": torch.randn(B, D + 1)}, r"x must be \[B, D\]"),
    ("step_", {"x": torch.ones(B, D, dtype=torch.bfloat16)}, "x must be float32 or float64"),
    ("step_", {"sides": torch.randn(2 * B, D)}, "sides are of a batch that is normalised"),
    ("step_", {"sides": torch.randn(B, D), "normalizes": False}, r"sides must be \[2 B, D\]"),
    (
        "step_",
        {"sides": torch.randn(2 * B, D), "normalizes": False, "center_gradient": True},
        "center_gradient is of a batch without sides",
    ),
    ("step_", {"labels": torch.arange(B, dtype=i32)}, "labels must be int64"),
    ("step_", {"mask": torch.ones(B)}, "mask must be bool"),
    ("step_", {"ids": torch.arange(B + 1)}, r"ids must be \[B\]"),
    ("step_", {"loss": "hinge"}, "unknown loss 'hinge'"),
    ("step_", {"parameters": [1.0]}, "contrastive takes 2 parameters, got 1"),
    ("step_", {"process_noise": -1.0}, "process_noise must not be negative"),
    ("step_", {"fixed_gain": 1.5}, "fixed_gain must be within"),
    ("step_", {"memory_weight": math.nan}, "weights must be finite"),
    ("step_", {"eps": 0.0}, "eps must be positive"),
    ("memory_loss", {"z": torch.randn(B, D + 1)}, r"bank must be \[M, D\]"),
    ("memory_loss", {"z": torch.randn(B, D, dtype=torch.bfloat16)}, "z must be float32 or float64"),
    ("memory_loss", {"labels": torch.zeros(B)}, "labels must be int64"),
    ("memory_loss", {"bank_labels": torch.arange(M + 1)}, r"bank_labels must be \[M\]"),
    ("memory_loss", {"count": torch.tensor(M + 1)}, "count must be within"),
    ("memory_loss", {"scale": None}, "scale and shift go together"),
    ("memory_loss", {"exclude": torch.arange(B + 1)}, r"exclude must be \[B\]"),
    ("memory_loss", {"exclude": None}, "bank_ids are for exclude"),
    ("memory_loss", {"bank_ids": torch.arange(M + 1)}, r"bank_ids must be \[M\]"),
    ("memory_loss", {"bank_ids": torch.zeros(M)}, "bank_ids must be int64"),
    ("memory_loss", {"anchors": torch.ones(B)}, "anchors must be bool"),
    ("memory_loss", {"loss": "hinge"}, "unknown loss 'hinge'"),
    ("memory_loss", {"parameters": [1.0]}, "contrastive takes 2 parameters, got 1"),
    ("memory_loss", {"parameters": [1.0, math.nan]}, "parameters of contrastive must be finite"),
    ("memory_loss", {"loss": "supcon", "parameters": [0.0]}, "temperature of supcon must be within"),
    ("memory_loss", {"loss": "ntxent", "parameters": [-1.0]}, "temperature of ntxent must be within"),
    (
        "memory_loss",
        {"loss": "multi_similarity", "parameters": [2.0, 0.0, 0.5, 0.1]},
        "beta of multi_similarity must",
    ),
    ("memory_loss", {"loss": "circle", "parameters": [0.4, 0.0]}, "the gamma of circle must be within"),
    ("memory_loss", {"eps": -1.0}, "eps must be positive"),
    ("transform_memory_loss_", {"sums": torch.zeros(2, D)}, "sums must be float64"),
    ("transform_memory_loss_", {"count": torch.tensor(M + 1)}, r"count must be within \[0, 11\]"),
    ("transform_memory_loss_", {"ranked": torch.tensor(-1)}, r"ranked must be within \[0, 11\]"),
    ("transform_memory_loss_", {"ranked": torch.tensor(1.0)}, "ranked must be int64"),
    ("transform_memory_loss_", {"z": torch.randn(B, D + 1)}, r"bank must be \[M, D\]"),
    ("transform_memory_loss_", {"bank_labels": torch.arange(M + 1)}, r"bank_labels must be \[M\]"),
    ("transform_memory_loss_", {"exclude": None}, "bank_ids are for exclude"),
    ("transform_memory_loss_", {"eps": 0.0}, "eps must be positive"),
    ("transform_memory_loss_", {"eps": 1e31}, "eps must be positive, within"),
    ("batch_loss", {"dots": torch.randn(B, B + 1)}, r"dots must be \[B, B\]"),
    ("batch_loss", {"dots": torch.tensor(1.0), "labels": torch.zeros(1, B)}, r"dots must be \[B, B\]"),
    ("batch_loss", {"labels": torch.zeros(B)}, "labels must be int64"),
    ("batch_loss", {"ids": torch.arange(B + 1)}, r"ids must be \[B\]"),
    ("batch_loss", {"anchors": torch.ones(B)}, "anchors must be bool"),
    ("batch_loss", {"eps": 0.0}, "eps must be positive"),
    ("batch_sums", {"dots": torch.randn(3, B + 1)}, r"dots must be \[A, B\] \(any, 5\)"),
    ("batch_sums", {"dots": torch.tensor(1.0), "labels": torch.zeros(1, B)}, r"dots must be \[A, B\]"),
    ("batch_sums", {"dots": torch.ones(3, B).half()}, "dots must be float32 or float64"),
    ("batch_sums", {"labels": torch.zeros(B)}, "labels must be int64"),
    ("batch_sums", {"ids": torch.arange(3)}, r"ids must be \[B\]"),
    ("batch_sums", {"anchors": torch.ones(B) > 0}, r"anchors must be \[A\] \(3\)"),
    ("batch_sums", {"anchors": torch.ones(3)}, "anchors must be bool"),
    ("batch_sums", {"first": -1}, r"first must be within \[0, B - A\] = \[0, 2\], got -1"),
    ("batch_sums", {"first": 3}, "first must be within"),
    ("batch_sums", {"dots": torch.randn(B + 1, B), "anchors": None, "first": 0}, "first must be within"),
    ("memory_sums", {"z": torch.randn(B, D + 1)}, r"bank must be \[M, D\]"),
    ("memory_sums", {"count": torch.tensor(M + 1)}, "count must be within"),
    ("memory_sums", {"given": torch.zeros(B, dtype=f64)}, "given is for all passes but the first"),
    ("memory_sums", SECOND_PASS, "given is for all passes but the first"),
    ("memory_sums", SECOND_PASS | {"given": torch.zeros(B)}, "given must be float64"),
    ("memory_sums", SECOND_PASS | {"given": torch.zeros(B + 1, dtype=f64)}, r"given must be \[B\]"),
    ("memory_sums", SECOND_PASS | {"number": 2}, r"number must be within \[0, 1\], got 2"),
    ("memory_sums", {"number": -1}, "number must be within"),
    ("memory_sums", {"first": -1}, "first must not be negative, got -1"),
    ("memory_sums", {"loss": "triplet_all", "parameters": [0.1]}, "triplet_all has no sums that could be added up"),
    ("settle_sums", {"parts": torch.rand(3, 2, B, 4)}, "parts must be float64"),
    ("settle_sums", {"parts": torch.rand(3, 1, B, 4, dtype=f64)}, r"parts must be \[n, 2, B, 4\]"),
    ("settle_sums", {"parts": torch.rand(0, 2, B, 4, dtype=f64)}, "parts must be of one part at least"),
    ("settle_sums", {"parts": torch.rand(2, 3, B, 4, dtype=f64).transpose(0, 1)[:, :2]}, "parts must be contiguous"),
    ("settle_sums", {"anchors": torch.ones(B)}, "anchors must be bool"),
    ("settle_sums", {"passes": 0}, r"passes must be within \[1, 1\], got 0"),
    ("settle_sums", {"loss": "triplet_all", "parameters": [0.1]}, "triplet_all has no sums that could be added up"),
]
# What is wrong with a loss, every op that takes one says of itself.
BAD += [
    (op, change, message)
    for op in ("transform_memory_loss_", "batch_loss", "batch_sums", "memory_sums", "settle_sums")
    for name, change, message in BAD
    if name == "memory_loss" and ("loss" in change or "parameters" in change)
]


def test_every_op_is_called_badly():
    assert {op for op, _, _ in BAD} == set(OPS)


@every_library
@pytest.mark.parametrize(
    "op, change, message", BAD, ids=[f"{op}-{next(iter(c))}-{i}" for i, (op, c, _) in enumerate(BAD)]
)
def test_bad_arguments_are_named_and_nothing_is_written(op, change, message, library):
    arguments = ARGUMENTS[op](**change)
    before = {k: v.detach().clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    with pytest.raises(RuntimeError, match=f"{op}: .*{message}|{op}: {message}"):
        call(library, op, arguments)
    for name, value in before.items():
        assert torch.equal(arguments[name], value), f"{name} was written"


@pytest.mark.skipif(not xbn_ext.build_info()["native"], reason="no compiled library")
def test_the_kernels_and_plain_torch_say_the_same_of_a_bad_argument():
    differ = {}
    for op, change, _ in BAD:
        said = []
        for library in ("xbn_ext", "xbn_plain"):
            with pytest.raises(RuntimeError) as raised:
                call(library, op, ARGUMENTS[op](**change))
            said.append(str(raised.value).splitlines()[0])
        if said[0] != said[1]:
            differ[(op, *change)] = said
    assert not differ


REQUIRED = [
    (op, argument.name)
    for op in ARGUMENTS
    for argument in getattr(torch.ops.xbn_ext, op).default._schema.arguments
    if isinstance(argument.type, torch.TensorType) and (op, argument.name) != ("normalize", "x")  # torch itself refuses
]


@every_library
@pytest.mark.parametrize("op, name", REQUIRED)
def test_a_tensor_that_is_missing_is_named(op, name, library):
    """torch takes None for a tensor, and passes one on that is undefined."""
    arguments = ARGUMENTS[op]()
    arguments[name] = None
    with pytest.raises(RuntimeError, match=f"^{op}: {name} must be a tensor, got None"):
        call(library, op, arguments)


FUNCTIONS = {
    (name, argument.name)
    for name in OPS
    if hasattr(ops, name) and name != "step_"  # which takes a memory
    for argument in inspect.signature(getattr(ops, name)).parameters.values()
    if argument.annotation == "Tensor" and argument.default is argument.empty
}


@pytest.mark.parametrize("op, name", sorted(FUNCTIONS))
@pytest.mark.parametrize("others", [True, False])
def test_a_function_names_what_is_no_tensor(op, name, others):
    """Also one that looks at it before it calls the op; and where there is no tensor at all."""
    good = ARGUMENTS[op]() | {"loss": Contrastive(), "z": torch.randn(B, D)}
    if op == "batch_loss":
        good["labels"] = torch.arange(B)
    parameters = inspect.signature(getattr(ops, op)).parameters
    arguments = {word: good[word] for word, p in parameters.items() if p.default is p.empty and word in good}
    named = rf"{op}: {name} must be a tensor, got|{op}\(\) Expected a value of type 'Tensor' for argument '{name}'"
    for no_tensor in (None, [1.0]):
        arguments[name] = no_tensor
        if not others:
            arguments |= {word: no_tensor for word, value in arguments.items() if isinstance(value, torch.Tensor)}
        with pytest.raises(RuntimeError, match=named if others else "tensor|Tensor"):
            getattr(ops, op)(**arguments)


@every_library
def test_a_sparse_tensor_is_refused(library):
    """There is no kernel for one, so the plain op says it."""
    for op, name in REQUIRED:
        arguments = ARGUMENTS[op]()
        if arguments[name].dim() > 0:
            arguments[name] = arguments[name].to_sparse()
            with pytest.raises(RuntimeError, match=f"^{op}: {name} must be dense, got .* torch.sparse_coo"):
                call(library, op, arguments)


def spoil(value, how):
    """Something else in the place of an argument."""
    if isinstance(value, float):
        return how.choice([0.0, -1.0, math.nan, math.inf, 1e-31, 1e31, 1.0])
    if isinstance(value, list):
        return how.choice([[], [0.0], [0.1], [1e31, 1.0], [math.nan, 1.0]])
    if isinstance(value, str):
        return how.choice(["hinge", "supcon", "triplet_all", "contrastive_mean"])
    if not isinstance(value, torch.Tensor):
        return value
    return how.choice(
        [
            lambda: None,
            lambda: value.unsqueeze(0),
            lambda: value.reshape(-1),
            lambda: value.double() if value.is_floating_point() else value.to(torch.int32),
            lambda: value[..., :0] if value.dim() else value.float(),
            lambda: torch.cat([value, value]) if value.dim() else value - 100,
            lambda: torch.stack([value, value], -1)[..., 0],
            lambda: torch.full_like(value, 12),
        ]
    )()


def outcome(library, op, arguments):
    """The error of a call; and whether all tensors are as they were."""
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    try:
        call(library, op, arguments)
    except RuntimeError as error:
        same = all(torch.equal(arguments[k], v) for k, v in before.items())
        return str(error).partition("\n")[0].replace(library, "library"), same
    return "", True


@pytest.mark.skipif(not xbn_ext.build_info()["native"], reason="one library")
@pytest.mark.parametrize("op", ARGUMENTS)
def test_both_libraries_refuse_the_same_calls_in_the_same_words(op):
    how, names = random.Random(op), list(ARGUMENTS[op]())
    for _ in range(50):
        spoiled = {name: spoil(ARGUMENTS[op]()[name], how) for name in how.sample(names, min(2, len(names)))}
        if not any(isinstance(v, torch.Tensor) for v in ARGUMENTS[op](**spoiled).values()):
            continue  # torch itself refuses
        torch.manual_seed(0)
        compiled = outcome("xbn_ext", op, ARGUMENTS[op](**copy.deepcopy(spoiled)))
        torch.manual_seed(0)
        assert compiled == outcome(plain_ops.NAMESPACE, op, ARGUMENTS[op](**spoiled)), spoiled
        assert compiled[1], f"written before {compiled[0]}"


@every_library
@pytest.mark.parametrize("op", ["track_", "transform_", "standardize_", "enqueue_", "transform_memory_loss_"])
def test_a_state_that_wants_a_gradient_is_written(op, library):
    """A kernel knows nothing of autograd; PyTorch refused in the middle of the op."""
    arguments = ARGUMENTS[op]()
    for name in ("scale", "shift", "sums", "bank", "target_std"):
        if name in arguments:
            arguments[name].requires_grad_()
    call(library, op, arguments)
    assert all(v.is_leaf for v in arguments.values() if isinstance(v, torch.Tensor))


@every_library
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_map_that_is_no_number_does_not_spoil_a_dead_dimension(bad, library):
    a = ARGUMENTS["standardize_"](scale=torch.full((D,), bad, dtype=f64))
    a["bank"][:, 0] = 1  # std 0
    a["sums"].copy_(reference.sums_of(a["bank"][: a["count"]]))
    a["scale"][1:] = 1
    a["bank"][:, 1] *= 100  # so that it is rewritten
    a["sums"].copy_(reference.sums_of(a["bank"][: a["count"]]))
    call(library, "standardize_", a)
    assert (a["bank"][:, 0] == 1).all()


@pytest.mark.parametrize(
    "loss, change",
    [
        (Contrastive, {"pos_margin": math.nan}),
        (Contrastive, {"neg_margin": math.inf}),
        (Contrastive, {"reduction": "sum"}),
        (Contrastive, {"pos_margin": torch.tensor(1.0)}),
        (SupCon, {"temperature": 0.0}),
        (SupCon, {"temperature": 1e-39}),
        (Triplet, {"margin": "x"}),
        (MultiSimilarity, {"alpha": torch.nn.Parameter(torch.tensor(2.0))}),
        (NTXent, {"temperature": -0.1}),
        (NTXent, {"temperature": math.inf}),
        (MultiSimilarity, {"alpha": 0.0}),
        (MultiSimilarity, {"beta": -1.0}),
        (MultiSimilarity, {"base": math.nan}),
        (MultiSimilarity, {"mining": -0.1}),
        (Circle, {"m": math.nan}),
        (Circle, {"gamma": 0}),
        (Triplet, {"margin": math.inf}),
        (Triplet, {"mining": "semihard"}),
    ],
)
def test_bad_loss(loss, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        loss(**change)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_what_cannot_be_learned(loss):
    for name in {*loss().numbers()} - {*loss.may_be_learned}:
        with pytest.raises(ValueError, match=f"{name} must be a number, got a tensor: only a temperature, a bias or a"):
            loss(**{name: torch.nn.Parameter(torch.tensor(0.5))})


def test_the_wrapper_takes_float32_maps():
    a = loss_arguments()
    scale, shift = torch.rand(D) + 0.5, torch.randn(D)
    args = (a["z"], a["labels"], a["bank"], a["bank_labels"], Contrastive())
    narrow = ops.memory_loss(*args, scale=scale, shift=shift)
    assert torch.equal(narrow, ops.memory_loss(*args, scale=scale.double(), shift=shift.double()))


@every_library
@pytest.mark.parametrize(
    "op, name, other, view",
    [
        ("enqueue_", "z", "bank", lambda bank: bank[2 : 2 + B]),
        ("enqueue_", "labels", "bank_labels", lambda rows: rows[:B]),
        ("enqueue_", "labels", "bank_ids", lambda rows: rows[1 : 1 + B]),
        ("enqueue_", "ids", "bank_labels", lambda rows: rows[1 : 1 + B]),
        ("enqueue_", "ids", "bank_steps", lambda rows: rows[1 : 1 + B]),
        ("enqueue_", "scale", "sums", lambda sums: sums[1]),
        ("enqueue_", "step", "bank_steps", lambda rows: rows[3]),
        ("enqueue_", "step", "head", lambda head: head),
        ("enqueue_", "bank_ids", "bank_labels", lambda rows: rows),
        ("enqueue_", "count", "head", lambda head: head),
        ("track_", "sums", "scale", lambda scale: scale.new_zeros(2, D)),
        ("track_", "shift", "scale", lambda scale: scale),
        ("track_", "target_std", "target_mean", lambda mean: mean),
        ("transform_", "shift", "scale", lambda scale: scale),
        ("standardize_", "shift", "sums", lambda sums: sums[0]),
        ("transform_memory_loss_", "z", "bank", lambda bank: bank[:B]),
        ("transform_memory_loss_", "scale", "sums", lambda sums: sums[1]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_written_shares_no_memory(op, name, other, view, library):
    """An op that reads what it is writing would store something else than it was given."""
    a = ARGUMENTS[op]()
    a[name] = view(a[other])
    if name == "sums":  # [2, D], so the written one is a part of it
        a[other] = a[name][1].fill_(1)
    before = {k: v.detach().clone() for k, v in a.items() if isinstance(v, torch.Tensor)}
    with pytest.raises(RuntimeError, match=f"{op}: ({name} must not share memory with {other}|{other} .* {name}$)"):
        call(library, op, a)
    assert all(torch.equal(a[k], v) for k, v in before.items())


@every_library
def test_a_copy_of_what_is_written_may_be_given(library):
    """A view that is not dense is copied first, and an empty one shares nothing."""
    a = enqueue_arguments(mask=None, ids=None, bank_ids=None)
    a["labels"] = a["bank_steps"][: 2 * B : 2]
    given = a["labels"].clone()
    slots = call(library, "enqueue_", a)
    assert torch.equal(a["bank_labels"][slots], given)
    a["z"], a["labels"] = a["bank"][:0], a["bank_labels"][:0]
    assert call(library, "enqueue_", a).shape == (0,)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(
    "loss",
    [Contrastive(), SupCon(torch.tensor(0.1)), SigLIP(bias=torch.nn.Parameter(torch.tensor(-1.0)))],
    ids=["number", "tensor", "offset"],
)
@pytest.mark.parametrize(
    "change, message",
    [
        ({"z": torch.randn(1, B, D)}, r"z must be \[B, D\], float32 or float64, got torch.float32 \[1, 5, 7\]"),
        ({"z": torch.randn(B)}, r"z must be \[B, D\], .*, got torch.float32 \[5\]"),
        ({"z": torch.ones(B, D, dtype=torch.float16)}, r"z must be \[B, D\], .*, got torch.float16"),
        ({"labels": torch.arange(B + 1)}, r"labels must be \[B\] \(5\), got \[6\]"),
        ({"labels": torch.arange(B)[:, None]}, r"labels must be \[B\] \(5\), got \[5, 1\]"),
        ({"labels": torch.zeros(B)}, "labels must be int64"),
        ({"labels": None}, "labels must be a tensor, got None"),
        ({"ids": torch.arange(B + 1)}, r"ids must be \[B\]"),
        ({"anchors": torch.ones(B)}, "anchors must be bool"),
        ({"anchors": torch.ones(B + 1, dtype=torch.bool)}, r"anchors must be \[B\]"),
        ({"eps": 0.0}, "eps must be positive"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_batch_loss_names_its_own_arguments(change, message, loss, renormalize):
    """The error names them, and not the products that the op takes."""
    with pytest.raises(RuntimeError, match=f"^batch_loss: {message}"):
        given = {"z": torch.randn(B, D), "labels": torch.arange(B), "loss": loss, "renormalize": renormalize}
        ops.batch_loss(**given | change)


@pytest.mark.parametrize("name", ["scale", "shift", "count", "anchors"])
def test_a_number_in_the_place_of_a_tensor_is_named(name):
    a = loss_arguments()
    rows = {option: a[option] for option in ("scale", "shift")}
    with pytest.raises(RuntimeError, match=f"for argument '{name}'"):
        ops.memory_loss(a["z"], a["labels"], a["bank"], a["bank_labels"], Contrastive(), **rows | {name: 2.0})


class OwnName(Contrastive):
    name = "own"


@dataclasses.dataclass(frozen=True)
class OwnNumber(Contrastive):
    weight: float = 2.0


@dataclasses.dataclass(frozen=True)
class Noted(SupCon):
    """What a subclass may have more."""

    words = ("note",)
    note: str = ""


@pytest.mark.parametrize("loss", [OwnName(), OwnNumber()])
def test_a_criterion_is_not_made_of_a_loss_that_the_kernels_do_not_know(loss):
    """It was, and raised in its first step, with the memory moved."""
    with pytest.raises(TypeError, match="CrossBatchMemory: loss must be one that the kernels know"):
        xbn_ext.CrossBatchMemory(loss, D, M)


def test_a_subclass_of_a_loss_keeps_what_is_its_own():
    temperature = torch.nn.Parameter(torch.tensor(0.2))
    criterion = xbn_ext.CrossBatchMemory(Noted(temperature, "a note"), D, M)
    assert criterion.loss == Noted(temperature, "a note")
    plain = xbn_ext.CrossBatchMemory(SupCon(temperature), D, M)
    x, labels = torch.randn(B, D), torch.arange(B) % 2
    assert torch.equal(criterion(x, labels), plain(x, labels))


@pytest.mark.parametrize("call", ["memory_loss", "memory_loss_and_pairs", "transform_memory_loss_", "batch_loss"])
def test_a_wrapper_names_what_is_no_loss(call):
    class Own(PairLoss):
        pass

    a, m = loss_arguments(), transform_arguments(bank=torch.randn(M, D))
    rows = {"batch_loss": (), "transform_memory_loss_": (a["bank_labels"],)}.get(call, (a["bank"], a["bank_labels"]))
    first = tuple(m.values()) if call == "transform_memory_loss_" else ()
    op = "memory_loss" if call == "memory_loss_and_pairs" else call
    for loss, got in (
        (Own(), "an xbn_ext loss .*, got Own"),
        ("contrastive", "an xbn_ext loss .*, got str"),
        (None, "an xbn_ext loss .*, got NoneType"),
        (OwnName(), "one that the kernels know: OwnName is of the kind 'own_mean'"),
        (OwnNumber(), "one that the kernels know: OwnNumber .* has the numbers pos_margin, neg_margin, weight"),
    ):
        with pytest.raises(TypeError, match=f"{op}: loss must be {got}"):
            getattr(ops, call)(*first, a["z"].detach(), a["labels"], *rows, loss)


@every_library
@pytest.mark.parametrize("op", [op for op in OPS if schema_of(op).returns])
def test_an_op_that_is_called_directly_has_no_gradient(op, library):
    """Its wrapper has it. torch warns, once for each op and process, so in another one; `autograd.grad` raises."""
    a = ARGUMENTS[op]()
    by = next(name for name in tensors_of(op) if name not in written_by(op) and a[name].is_floating_point())
    a[by].requires_grad_()
    value = tree_leaves(call(library, op, a))[0].sum()
    if not value.is_floating_point():
        assert not value.requires_grad
        return
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        warnings.simplefilter("ignore")
        torch.autograd.grad(value, a[by])


@pytest.mark.parametrize("module", [ops, reference], ids=["ops", "reference"])
@pytest.mark.parametrize("function", ["memory_loss", "memory_loss_and_pairs", "transform_memory_loss_"])
def test_an_option_that_there_is_not_is_named(function, module):
    a, m = loss_arguments(), transform_arguments(bank=torch.randn(M, D))
    before = m["bank"].clone()
    args = (a["z"], a["labels"], a["bank"], a["bank_labels"], Contrastive())
    if function == "transform_memory_loss_":
        args = (*m.values(), a["z"], a["labels"], a["bank_labels"], Contrastive())
    with pytest.raises(TypeError, match=rf"{function}\(\) got an unexpected keyword argument 'exclud'"):
        getattr(module, function)(*args, anchors=None, exclud=a["exclude"])
    assert torch.equal(m["bank"], before)


def test_forward_mode_raises():
    a = loss_arguments()
    with torch.autograd.forward_ad.dual_level():
        z = torch.autograd.forward_ad.make_dual(a["z"].detach(), torch.ones(B, D))
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            ops.memory_loss(z, a["labels"], a["bank"], a["bank_labels"], Contrastive())


def test_the_bank_carries_no_gradient():
    a = loss_arguments()
    bank = a["bank"].requires_grad_()
    value = ops.memory_loss(a["z"].detach(), a["labels"], bank, a["bank_labels"], Contrastive())
    assert not value.requires_grad
