"""The path of a device: kernels where there are some for it, plain PyTorch elsewhere, the CPU where there is no
float64. None of these devices is here: `elsewhere.py` has tensors that say they are."""

import copy
import warnings

import pytest
import torch
from elsewhere import Elsewhere, There
from loss_cases import few_losses
from op_calls import ARGUMENTS, OPS, WRITING, B, D, M, written_by
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import xbn_ext
from xbn_ext import Contrastive, CrossBatchMemory, CustomLoss, NTXent, Triplet, _autograd, _devices, _library

HAS_KERNELS = xbn_ext.build_info()["native"]
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="all devices take the plain path without the library")
ON_CPU = "kernels" if HAS_KERNELS else "plain"


@pytest.fixture(autouse=True)
def _anew(monkeypatch, recwarn):
    """As if no device had been looked at; warnings are kept from the summary."""
    monkeypatch.setattr(_library, "_told", set())
    forget = _devices.obstacle.cache_clear
    forget()
    yield
    forget()


@pytest.fixture
def xpu():
    with Elsewhere("xpu") as there:
        yield there


@pytest.fixture
def mps():
    with Elsewhere("mps", float64=False) as there:
        yield there


def tensors_in(values):
    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


def held(values):
    return [t.held if isinstance(t, There) else t for t in tensors_in(values)]


def call(op, arguments):
    return getattr(torch.ops.xbn_ext, op)(*arguments.values())


# --- What the dispatcher has --------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("op", OPS)
def test_a_device_without_kernels_has_the_plain_op_and_the_cpu_keeps_its_own(op):
    table = dict(line.split(": ", 1) for line in torch._C._dispatch_dump_table(f"xbn_ext::{op}").splitlines())
    for key in ("HIP", "MPS", "XPU", "HPU", "XLA", "PrivateUse1"):
        assert "_library.py" in table[key], key
    assert "backend.cpp" in table["CPU"]
    assert ("backend.cpp" if xbn_ext.build_info()["cuda"] else "_library.py") in table["CUDA"]


@pytest.mark.parametrize("op", OPS)
def test_an_op_computes_there_what_it_computes_on_a_cpu(op, xpu):
    arguments = ARGUMENTS[op]()
    there = tree_map_only(torch.Tensor, lambda t: t.clone().to(xpu.device), arguments)
    got, want = call(op, there), call(op, arguments)
    assert op in xpu.called
    for t in tensors_in(got):
        assert t.device == xpu.device
    torch.testing.assert_close(held(got), held(want), rtol=1e-5, atol=1e-6)
    written = [[a[name] for name in written_by(op)] for a in (there, arguments)]
    torch.testing.assert_close(held(written[0]), held(written[1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", WRITING)
def test_bad_input_is_named_there_before_anything_is_written(op, xpu):
    arguments = ARGUMENTS[op]()
    last = [name for name in written_by(op) if arguments[name] is not None][-1]
    arguments[last] = arguments[last].to(torch.int32)
    there = tree_map_only(torch.Tensor, lambda t: t.clone().to(xpu.device), arguments)
    with pytest.raises(RuntimeError, match=f"{op}: {last} must be "):
        call(op, there)
    torch.testing.assert_close(held(there), held(arguments), rtol=0, atol=0)


def test_a_tensor_that_was_left_on_the_cpu_is_named(xpu):
    arguments = ARGUMENTS["memory_loss"]()
    there = {name: t.to(xpu.device) if name == "z" else t for name, t in arguments.items()}
    with pytest.raises(RuntimeError, match="memory_loss: labels is on another device than the other arguments"):
        call("memory_loss", there)


@pytest.mark.parametrize("op", OPS)
def test_fake_tensors_have_the_shapes_and_the_device(op):
    """What a compiler asks; it runs nothing."""
    arguments = ARGUMENTS[op]()
    shapes, want = tree_map_only(torch.Tensor, lambda t: t.to("meta"), arguments), tensors_in(call(op, arguments))
    for device in (torch.device(type, 0) for type in ("cuda", "xpu", "mps", "hpu")):
        with FakeTensorMode() as mode:
            got = call(op, tree_map_only(torch.Tensor, lambda t: FakeTensor(mode, t, device), shapes))  # noqa: B023
        for one, other in zip(tensors_in(got), want, strict=True):
            assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, device)


# --- A memory there -----------------------------------------------------------------------------------------------


def train(criterion, device, steps=4):
    """Values, gradients and the state after a few steps, as they are held."""
    x, labels = torch.randn(steps, 12, 8, dtype=torch.float64), torch.randint(4, (steps, 12))
    results = []
    for i in range(steps):
        z = x[i].float().to(device).requires_grad_()
        value = criterion(z, labels[i].to(device), ids=torch.arange(12).to(device) + i)
        value.backward()
        assert value.device == z.grad.device == torch.device(device)
        results += [value.detach(), z.grad]
    return held([*results, *criterion.state_dict().values()])


@few_losses
@pytest.mark.parametrize("update", ["inplace", pytest.param("deferred", marks=pytest.mark.long)])
def test_a_memory_trains_there(loss, update, xpu):
    def make():
        return CrossBatchMemory(loss, 8, 40, update=update, memory_dtype=torch.float64)

    criterion = make().to(xpu.device)
    want = train(make(), "cpu")
    torch.manual_seed(0)
    got = train(criterion, xpu.device)
    assert "step_" in xpu.called and criterion.bank.device == xpu.device
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


class Hinge(CustomLoss):
    """With a parameter."""

    def __init__(self):
        super().__init__()
        self.margin = torch.nn.Parameter(torch.full((), 0.2))

    def positive(self, s):
        return 1 - s

    def negative(self, s):
        return (s - self.margin).relu()


@pytest.mark.parametrize("type, float64", [("xpu", True), ("mps", False)])
def test_a_loss_of_your_own_trains_there(type, float64):
    """And its memory comes back."""
    with Elsewhere(type, float64) as there:
        criterion = CrossBatchMemory(Hinge(), 8, 40).to(there.device)
        want = train(CrossBatchMemory(Hinge(), 8, 40), "cpu")
        torch.manual_seed(0)
        got = train(criterion, there.device)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert criterion.stats()["fill"] == 1
        saved = {name: t.cpu() for name, t in criterion.state_dict().items()}
    again = CrossBatchMemory(Hinge(), 8, 40)
    again.load_state_dict(saved)
    torch.testing.assert_close(list(again.state_dict().values()), want[-len(saved) :], rtol=1e-5, atol=1e-5)


def test_a_second_derivative_raises_there(xpu):
    criterion = CrossBatchMemory(Contrastive(), D, M).to(xpu.device)
    z = torch.randn(B, D).to(xpu.device).requires_grad_()
    (grad,) = torch.autograd.grad(criterion(z, torch.arange(B).to(xpu.device) % 2), z, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated only once"):
        grad.sum().backward()


@needs_kernels
def test_it_says_once_that_there_are_no_kernels(xpu):
    x = torch.randn(B, D).to(xpu.device)
    with pytest.warns(RuntimeWarning, match="xbn_ext runs in plain PyTorch on xpu:0: .* no kernels for xpu"):
        xbn_ext.ops.moments(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        xbn_ext.ops.moments(x)


def test_a_backend_that_has_no_autocast():
    assert not _autograd._has_autocast("privateuseone") and not _autograd._has_autocast("meta")
    assert _autograd._has_autocast("xpu")


# --- Without float64 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [NTXent(), Triplet(mining="all")], ids=["ntxent", "triplet_all"])
def test_a_memory_stays_on_the_cpu_where_there_is_no_float64(loss, mps):
    """And computes there: the same bits."""
    criterion = CrossBatchMemory(loss, 8, 40).to(mps.device)
    want = train(CrossBatchMemory(loss, 8, 40), "cpu")
    torch.manual_seed(0)
    assert all(t.device.type == "cpu" for _, t in criterion.named_state())
    torch.testing.assert_close(train(criterion, mps.device), want, rtol=0, atol=0)
    assert mps.called == []


def test_what_a_memory_without_float64_is_called_with(mps):
    criterion = torch.nn.Sequential(CrossBatchMemory(Contrastive(), D, M)).to(mps.device)[0]
    x, labels = torch.randn(B, D), torch.arange(B) % 2
    there, labels_there = x.to(mps.device), labels.to(mps.device)
    with pytest.raises(ValueError, match="embeddings is on cpu, the memory on mps:0"):
        criterion(x, labels_there)
    with pytest.raises(ValueError, match="labels is on cpu, the memory on mps:0"):
        criterion(there, labels)
    with pytest.raises(TypeError, match="enqueue_mask must be a bool tensor"):
        criterion(there, labels_there, enqueue_mask=labels_there)
    assert int(criterion.step) == 0
    value = criterion(there, labels_there, enqueue_mask=labels_there == 0, ids=labels_there)
    assert value.device == mps.device and int(criterion.count) == 3
    criterion.fill_from([(there, labels_there)])
    assert int(criterion.count) == B
    assert criterion.eval()(there, labels_there).device == mps.device
    assert copy.deepcopy(criterion)(there, labels_there).device == mps.device
    criterion.to("cpu")
    assert criterion(x, labels).device.type == "cpu"


def test_a_learned_temperature_stays_with_the_memory(mps):
    criterion = CrossBatchMemory(NTXent(torch.nn.Parameter(torch.tensor(0.2))), D, M).to(mps.device)
    z = torch.randn(B, D).to(mps.device).requires_grad_()
    criterion(z, torch.arange(B).to(mps.device) % 2).backward()
    assert z.grad.device == mps.device and criterion.temperature.grad.device.type == "cpu"


def test_what_is_learned_and_made_there_comes_to_the_memory(mps):
    with torch.device("mps"):
        criterion = CrossBatchMemory(NTXent(torch.nn.Parameter(torch.full((), 0.2))), D, M)
        own = CrossBatchMemory(Hinge(), D, M)
    x, labels = torch.randn(B, D).to(mps.device), torch.arange(B).to(mps.device) % 2
    for memory in (criterion, own):
        memory(x, labels).backward()
        assert [p.grad.device.type for p in memory.parameters()] == ["cpu"]


def test_ways_to_a_memory_without_float64(mps):
    """Made there, and made of nothing."""
    with torch.device("mps"):
        made = CrossBatchMemory(Contrastive(), D, M)
    with torch.device("meta"):
        empty = CrossBatchMemory(Contrastive(), D, M)
    empty._apply(lambda t: torch.empty_like(t, device=mps.device)).reset_parameters()  # what to_empty() does
    x, labels = torch.randn(B, D).to(mps.device), torch.arange(B).to(mps.device) % 2
    for criterion in (made, empty):
        assert criterion.bank.device.type == "cpu" and not criterion.bank.is_meta
        assert criterion(x, labels).device == mps.device


def test_an_op_says_that_there_is_no_float64(mps):
    x = torch.randn(B, D).to(mps.device)
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match=r"mps:0 has no float64, .* to the CPU"):
        warnings.simplefilter("error")  # it does not say first that it computes there
        xbn_ext.ops.moments(x)


def test_a_gpu_of_intel_says_whether_it_has_float64(monkeypatch):
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    for answer in (True, False):
        properties = type("Properties", (), {"has_fp64": answer})
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device, its=properties: its)
        assert _devices.has_float64(torch.device("xpu", 0)) == answer


# --- NVIDIA's and AMD's -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture, on, not_on",
    [
        ("75", [(7, 5)], [(7, 0), (8, 0)]),
        ("80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("86", [(8, 6), (8, 9)], [(8, 0), (12, 0)]),
        ("90a", [(9, 0)], [(8, 9), (10, 0)]),
        ("100", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("100f", [(10, 0), (10, 3)], [(11, 0), (12, 0)]),
        ("120", [(12, 0), (12, 1)], [(10, 0)]),
        ("80-ptx", [(8, 0), (9, 0), (12, 0)], [(7, 5)]),
        ("90a-ptx", [(9, 0)], [(10, 0)]),
    ],
)
def test_which_gpus_run_code_for_an_architecture(architecture, on, not_on):
    assert all(_devices.runs(architecture, *capability) for capability in on)
    assert not any(_devices.runs(architecture, *capability) for capability in not_on)


@pytest.fixture
def build(monkeypatch):
    """A library with kernels for architectures, and two GPUs of different compute capability."""
    capabilities = {0: (9, 0), 1: (6, 1)}

    def pretend(architectures):
        monkeypatch.setattr(torch.ops.xbn_ext, "cuda_architectures", lambda: architectures)
        monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
        monkeypatch.setattr(torch.version, "hip", None)

    return pretend


def test_the_path_of_a_gpu(build, monkeypatch):
    build("80;90a;80-ptx")
    assert xbn_ext.path_of("cuda:0") == ("kernels", "the library has kernels for cuda:0")
    name, why = xbn_ext.path_of("cuda:1")
    assert name == "plain" and "kernels for 80;90a;80-ptx and none for cuda:1 (compute capability 6.1)" in why
    assert xbn_ext.path_of("cuda:2") == ("unknown", "torch finds no such GPU here")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    _devices.obstacle.cache_clear()
    assert xbn_ext.path_of("cuda:0") == ("plain", "xbn_ext has no kernels for AMD GPUs")
    build("")
    _devices.obstacle.cache_clear()
    name, why = xbn_ext.path_of("cuda:0")
    assert name == "plain" and "no CUDA kernels" in why and "XBN_CUDA=1" in why


@needs_kernels
def test_a_gpu_without_kernels_beside_one_that_has_them(monkeypatch):
    """The CPU in their place: its kernels are replaced by a choice, as those for GPUs are."""
    x, kernels = torch.randn(B, D), xbn_ext.ops.moments
    want = kernels(x)
    why, called = None, []
    monkeypatch.setattr(_devices, "obstacle", lambda device: why)
    monkeypatch.setattr("xbn_ext.plain.moments", lambda *args: called.append(args) or want)
    library = torch.library.Library("xbn_ext", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch's, that there are kernels already
            _library._choose_by_gpu(library, "CPU")
        torch.testing.assert_close(kernels(x), want)
        assert not called
        why = "it is too old"
        with pytest.warns(RuntimeWarning, match="plain PyTorch on cpu: .*; it is too old"):
            kernels(x)
        assert len(called) == 1
    finally:
        library._destroy()
    kernels(x)
    assert len(called) == 1


@needs_kernels
@pytest.mark.parametrize("architectures, chosen", [("90a", True), ("90a;50-ptx", False)])
def test_gpus_are_looked_at_when_cuda_is_initialised(architectures, chosen, build, monkeypatch):
    build(architectures)
    queued, replaced = [], []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "_lazy_call", queued.append)
    monkeypatch.setattr(_library, "_choose_by_gpu", replaced.append)
    monkeypatch.setattr(_library, "_with_kernels", lambda key: [])
    _library._complete("library")
    assert len(queued) == 1 and not replaced
    queued[0]()
    assert replaced == (["library"] if chosen else [])


@needs_kernels
def test_amd_gpus_take_the_plain_path_at_once(monkeypatch):
    replaced = []
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(_library, "_choose_by_gpu", replaced.append)
    monkeypatch.setattr(_library, "_with_kernels", lambda key: [])
    _library._complete("library")
    assert replaced == ["library"]


# --- What is said of it -------------------------------------------------------------------------------------------


def test_the_path_of_what_is_here_and_of_what_is_not(xpu):
    assert xbn_ext.path_of(torch.randn(2)).name == xbn_ext.path_of("cpu").name == ON_CPU
    assert xbn_ext.path_of("hpu").name == xbn_ext.path_of(torch.device("privateuseone", 1)).name == "plain"
    assert xbn_ext.path_of("mps").name == ON_CPU and "no float64" in xbn_ext.path_of("mps").why
    assert xbn_ext.path_of("meta").name == "unknown"
    if not torch.xpu.is_available():
        assert xbn_ext.path_of(torch.randn(2).to(xpu.device)) == ("unknown", "torch finds no such GPU here")


@pytest.mark.parametrize("where", ["gpu", 1.5, None, [1]])
def test_what_is_no_device_is_named(where):
    with pytest.raises(ValueError, match=r"where must be a tensor or a device, got "):
        xbn_ext.path_of(where)


def test_build_info_says_the_paths(monkeypatch):
    assert xbn_ext.build_info()["paths"]["cpu"].name == ON_CPU
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert xbn_ext.build_info()["paths"]["cuda:1"].name == "unknown"
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch.mps, "device_count", lambda: 1)
    assert xbn_ext.build_info()["paths"]["mps:0"].name == ON_CPU
