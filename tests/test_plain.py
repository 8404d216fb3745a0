"""The ops in plain PyTorch: all are there, the memory they take, that nothing waits for a GPU. What they compute is
tested where all implementations are."""

import math

import plain_ops
import pytest
import state
import torch
from loss_cases import LOSSES, each_kind_of_loss, problem
from op_calls import loss_arguments
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xbn_ext import Contrastive, CrossBatchMemory, distributed, ops, plain, reference
from xbn_ext.options import LOSS_DEFAULTS
from xbn_ext.plain import chunks, triplets
from xbn_ext.plain.loss_of_memory import Ranked
from xbn_ext.schemas import NAMES


@pytest.fixture
def in_plain():
    """`xbn_ext.ops`, and what is built on it, without the compiled library."""
    with ops.over(plain):
        yield


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Counters may not be looked at."""
    monkeypatch.setattr(chunks, "reads", lambda device: False)


# --- Schemas ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("namespace", ["xbn_ext", plain_ops.NAMESPACE])
def test_every_op_is_implemented(namespace):
    for op in (f"{namespace}::{name}" for name in NAMES):
        keys = ("CPU", "CompositeExplicitAutograd")
        assert any(torch._C._dispatch_has_kernel_for_dispatch_key(op, key) for key in keys), op


def test_a_loss_against_the_memory_is_told_all_options():
    assert vars(Ranked()) == LOSS_DEFAULTS


# --- Ops that compute nothing -------------------------------------------------------------------------------------


def test_what_is_asked_of_a_build():
    assert plain.cuda_architectures() == "" and plain.cpu_isa() == "none"
    assert plain.set_loss_way("simt") == "auto" and plain.set_loss_way("auto") == "simt"
    with pytest.raises(RuntimeError, match=r"way must be 'auto', .* got 'fast'"):
        plain.set_loss_way("fast")
    with pytest.raises(RuntimeError, match=r"_peak_fma: .* without its library"):
        torch.ops.xbn_plain._peak_fma(1, 1, False)


# --- Memory -------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that is made; views of existing tensors do not count."""

    def __init__(self, *there):
        super().__init__()
        self.there = {t.untyped_storage().data_ptr() for t in there}
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.there:
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.itemsize)
        return result


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_ON_CPU", 4096)
    monkeypatch.setattr(triplets, "HELD", 4096)
    monkeypatch.setattr(triplets, "LEAST_HELD", 1)
    return 4096


@pytest.mark.singly
@each_kind_of_loss
@pytest.mark.parametrize(
    "update, memory_dtype",
    [("inplace", torch.float32), ("deferred", torch.float32), ("deferred", torch.float16)],
    ids=["inplace", "deferred", "deferred-f16"],
)
def test_no_tensor_is_larger_than_a_chunk(loss, update, memory_dtype, in_plain, small_chunks):
    """Neither the B x M similarities nor a copy of the bank in another dtype."""
    B, M, D = 16, 4000, 8
    criterion = CrossBatchMemory(loss, D, M, update=update, memory_dtype=memory_dtype)
    filled = state.filled(M, D, M - 30)
    for name in ("bank", "bank_labels", "sums", "head", "count"):
        getattr(criterion, name).copy_(getattr(filled, name))
    criterion.sums.mul_(100)  # standardize_ finds a memory that is far from standard coordinates
    with LargestTensor(*(t for _, t in criterion.named_state())) as largest:
        for _ in range(2):
            z = torch.randn(B, D, requires_grad=True)
            criterion(z, torch.randint(-3, 8, (B,)), ids=torch.arange(B)).backward()
    chunk = small_chunks + B  # of thresholds, one more for each anchor
    assert B * M > M * D > chunk and 1000 < largest.elements <= chunk


def test_the_memory_of_all_triplets_is_bounded_where_all_rows_are_positives(small_chunks, monkeypatch):
    z, labels, bank, bank_labels = problem(16, 4000, 8, torch.float64)
    labels.fill_(3), bank_labels[:3900].fill_(3), bank_labels[3900:].fill_(4)
    rows = {"z": z, "labels": labels, "bank": bank, "bank_labels": bank_labels}
    nothing = dict.fromkeys(("count", "scale", "shift", "bank_ids", "exclude", "anchors"))
    arguments = loss_arguments(**rows, **nothing, loss="triplet_all", parameters=[0.3])
    with LargestTensor(bank, bank_labels) as largest:
        in_rounds = plain.memory_loss(**arguments)
    assert triplets.HELD / 16 < 3900 and largest.elements <= small_chunks + 16
    monkeypatch.setattr(triplets, "HELD", 1 << 20)
    for got, want in zip(in_rounds, plain.memory_loss(**arguments), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


# --- Nothing waits ------------------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Refuses what a GPU's host would wait for: a value, or a shape that depends on values."""

    refused = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        assert name not in self.refused, f"{name} would wait"
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        assert not any(i is not None and i.dtype == torch.bool for i in indices), "a mask as an index would wait"
        return func(*args, **(kwargs or {}))


def test_a_look_at_a_value_is_seen():
    for look in (lambda t: int(t[0]), lambda t: t[t > 0], lambda t: bool(t.any())):
        with pytest.raises(AssertionError, match="would wait"), Waits():
            look(torch.arange(3))


@pytest.mark.singly
@each_kind_of_loss
@pytest.mark.parametrize("update", ["inplace", "deferred"])
@pytest.mark.parametrize("enqueue", ["after", "before"])
def test_a_step_that_looks_at_no_counter_waits_for_nothing_and_computes_the_same(
    loss, update, enqueue, in_plain, monkeypatch
):
    """Rows that are not there are masked where the count is not known."""
    waits = loss.formula == "triplet_all"
    x, labels = torch.randn(2, 6, 16, 8, dtype=torch.float64), torch.randint(4, (2, 6, 16))
    x[0, 2, 3, 1] = torch.nan
    results = []
    for knows in (True, False):
        monkeypatch.setattr(chunks, "reads", lambda device, knows=knows: knows)
        monkeypatch.setattr(distributed, "reads_at_once", lambda t, knows=knows: knows)
        criterion = CrossBatchMemory(loss, 8, 70, update=update, enqueue=enqueue, drift="xbn", warmup_steps=1)
        criterion.bank.fill_(torch.nan)  # beyond the count there may be anything
        got = []
        for i in range(6):
            z = (x[0, i] * 10**i).requires_grad_()  # standardize_ has to do something
            mask = labels[1, i] > 0
            if knows or waits:
                value = criterion(z, labels[0, i], enqueue_mask=mask, ids=torch.arange(16) + i)
            else:
                with Waits():
                    value = criterion(z, labels[0, i], enqueue_mask=mask, ids=torch.arange(16) + i)
            got += [value.detach(), *torch.autograd.grad(value, z)]
        results.append(
            [*got, *(t for name, t in criterion.named_state() if name != "bank"), criterion.embedding_memory]
        )
    for known, unknown in zip(*results, strict=True):
        torch.testing.assert_close(unknown, known, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("count", [0, 1, 7, 11])
@pytest.mark.parametrize("far", [True, False], ids=["far", "near"])
def test_standardize_without_a_look_at_the_count(count, far, as_on_a_gpu):
    m = state.filled(11, 5, count)
    m.bank[count:] = -0.0
    m.bank[:count] = m.bank[:count] * (1e3 if far else 1.0)
    m.sums.copy_(reference.sums_of(m.bank[:count]))
    truth = state.clone(m)
    reference.standardize_(truth.bank, truth.sums, truth.scale, truth.shift, truth.count, 1e-6)
    plain.standardize_(m.bank, m.sums, m.scale, m.shift, m.count, 1e-6)
    state.assert_same_state(m, truth, rtol=1e-5, atol=1e-5)
    assert m.bank[count:].signbit().all()


@pytest.mark.parametrize("head, count", [(13, 20), (-1, 5), (3, -2)])
def test_a_damaged_counter_that_is_not_looked_at_is_no_wild_write(head, count, as_on_a_gpu):
    """A kernel could not raise on a GPU either."""
    m = state.filled(10, 4, 10)
    m.head.fill_(head), m.count.fill_(count)
    slots = plain.enqueue_(
        m.bank, m.bank_labels, m.sums, m.head, m.count, torch.randn(4, 4), torch.arange(4), None, m.scale, m.shift
    )
    assert (slots >= 0).all() and (slots < 10).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    "loss", [loss for loss in LOSSES.values() if loss.formula != "triplet_all"], ids=lambda x: x.kind
)
@pytest.mark.parametrize("update", ["inplace", "deferred"])
def test_a_step_can_be_captured(loss, update, in_plain):
    """In a CUDA graph, which replays to the same numbers."""
    import test_cuda

    data = list(test_cuda.batches(8, "cuda"))
    expected = test_cuda.train(test_cuda.new_criterion("cuda", loss=loss, update=update), data)
    criterion = test_cuda.new_criterion("cuda", loss=loss, update=update)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = test_cuda.train(criterion, data[:3])
    torch.cuda.current_stream().wait_stream(stream)
    x, labels = (t.clone() for t in data[3])
    x.requires_grad_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = criterion(x, labels)
        (grad,) = torch.autograd.grad(value, x)
    for batch, batch_labels in data[3:]:
        x.data.copy_(batch), labels.copy_(batch_labels)
        graph.replay()
        got += [value.clone(), grad.clone()]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# --- What a caller is told ----------------------------------------------------------------------------------------


def test_errors_come_before_anything_is_written(in_plain):
    m = state.filled(30, 8, 30, pending=True)
    before = state.clone(m)
    z, labels = m.bank[:4], torch.arange(4)
    with pytest.raises(RuntimeError, match="transform_memory_loss_: z must not share memory with bank"):
        ops.transform_memory_loss_(m.bank, m.sums, m.scale, m.shift, m.count, z, labels, m.bank_labels, Contrastive())
    m.count.fill_(31), before.count.fill_(31)
    with pytest.raises(RuntimeError, match=r"transform_: count must be within \[0, 30\], got 31"):
        ops.transform_(m.bank, m.sums, m.scale, m.shift, m.count)
    with pytest.raises(RuntimeError, match=r"enqueue_: z must be float32 or float64, got torch\.float16"):
        ops.enqueue_(m.bank, m.bank_labels, m.sums, m.head, m.count, z.half(), labels, None, m.scale, m.shift)
    state.assert_same_state(m, before)


def test_a_number_that_is_not_finite_is_no_parameter(in_plain):
    arguments = (torch.eye(2), torch.arange(2), None, None)
    for kind, parameters in (("supcon", [math.inf]), ("circle", [0.4, math.nan])):
        with pytest.raises(RuntimeError, match=f"batch_loss: the parameters of {kind} must be finite"):
            torch.ops.xbn_plain.batch_loss(*arguments, kind, parameters, True, 1e-6, True)
