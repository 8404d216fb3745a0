"""What is particular to CUDA: streams, devices, graphs, launches; and that the order of threads does not matter."""

import functools

import pytest
import state
import torch
import torch.nn.functional as F
from conftest import FORCED_WAYS, HAS_EMULATOR, HAS_GPU
from loss_cases import LOSSES
from op_calls import ARGUMENTS, OPS
from parts import loss_of_parts

import xbn_ext
from xbn_ext import Contrastive, CrossBatchMemory, MultiSimilarity, NTXent, SupCon, Triplet, ops
from xbn_ext.checks import listed
from xbn_ext.options import WAYS

if HAS_EMULATOR:
    import emulated

needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="no GPU")
D, M = 48, 700


@pytest.fixture
def executor():
    """Of the CUDA kernels, which `ops` is over."""
    if not HAS_EMULATOR:
        pytest.skip("there is a real GPU, or no g++")
    with ops.over(emulated.ops):
        yield emulated.executor
    emulated.executor.set_launch_error(0)
    emulated.executor.set_seed(0)
    emulated.executor.set_multiprocessors(4)


def everything(module, way, set_way):
    """Results of all ops, one after the other, on fixed inputs."""
    torch.manual_seed(1)
    m = state.filled(M, D, 650, pending=True)
    z, labels = F.normalize(torch.randn(130, D), dim=1), torch.randint(8, (130,))
    of_filter = (m.target_mean, m.target_std, m.variance, m.scale, m.shift)
    for x, process_noise in ((z, 0.01), (z + 1, None), (z + 2, None)):
        module.track_(*of_filter, x, None, m.sums, m.count, process_noise, 1.0, None, 1e-6, innovation=m.innovation)
    module.transform_(m.bank, m.sums, m.scale, m.shift, m.count)
    slots = module.enqueue_(m.bank, m.bank_labels, m.sums, m.head, m.count, z, labels, None, m.scale, m.shift)
    before = set_way(way)
    results = [m.bank, m.sums, m.target_mean, m.target_std, m.variance, m.innovation, slots]
    losses = [Contrastive(0.9, 0.1), Contrastive(0.9, 0.1, "avg_nonzero")]
    for loss in [*losses, *([Triplet(mining="all")] if way == "composite" else [])]:
        anchors = z.clone().requires_grad_()
        value = module.memory_loss(anchors, labels, m.bank, m.bank_labels, loss, count=m.count)
        results += [value.detach(), *torch.autograd.grad(value, anchors)]
    centred = z.clone().requires_grad_()
    value = module.step_(m, centred, labels, losses[0], center_gradient=True)
    results += [value.detach(), *torch.autograd.grad(value, centred)]
    set_way(before)
    numbers = torch.arange(M)
    parts = [(m.bank[k], m.bank_labels[k], {"bank_ids": numbers[k]}) for k in (slice(300), slice(300, M))]
    for loss in (SupCon(), Triplet()):
        results += loss_of_parts(module, z, labels, parts, loss, exclude=numbers[:130])
    return results


@pytest.mark.parametrize("way", FORCED_WAYS)
def test_the_order_of_threads_and_blocks_changes_no_bit(way, executor):
    run = functools.partial(everything, ops, way, torch.ops.xbn_emu.set_loss_way)
    expected = run()
    for seed in (1, 2):
        executor.set_seed(seed)
        for got, want in zip(run(), expected, strict=True):
            assert torch.equal(got, want)


def test_another_number_of_multiprocessors_changes_rounding_only(executor):
    run = functools.partial(everything, ops, "tensor", torch.ops.xbn_emu.set_loss_way)
    expected = run()
    for n in (1, 3, 132):
        executor.set_multiprocessors(n)
        for got, want in zip(run(), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def launches(call, *args, **options):
    before = emulated.executor.launches()
    call(*args, **options)
    return emulated.executor.launches() - before


@pytest.mark.parametrize(
    "loss, B, D, precision, bank_dtype, way",
    [
        (Contrastive(), 600, 1024, torch.float32, torch.float32, "screen"),
        (Contrastive(), 511, 7, torch.float32, torch.float32, "sweep"),
        (Contrastive(), 512, 7, torch.float32, torch.float32, "composite"),
        (SupCon(), 511, 8, torch.float32, torch.float32, "sweep"),
        (SupCon(), 512, 8, torch.float32, torch.float32, "composite"),
        (Contrastive(), 5, 1028, torch.float32, torch.float32, "composite"),
        (Contrastive(), 5, 8, torch.float64, torch.float64, "composite"),
        (Contrastive(), 5, 8, torch.float32, torch.float64, "composite"),
        (Contrastive(), 5, 1024, torch.float32, torch.float16, "screen"),
        (Contrastive(), 5, 12, torch.float32, torch.bfloat16, "composite"),
        (SupCon(), 511, 8, torch.float32, torch.bfloat16, "sweep"),
        (SupCon(), 512, 8, torch.float32, torch.float16, "composite"),
        (SupCon(), 5, 8, torch.float64, torch.float16, "composite"),
    ],
)
def test_which_way_the_loss_goes(loss, B, D, precision, bank_dtype, way, executor):
    z, labels = torch.randn(B, D, dtype=precision, requires_grad=True), torch.zeros(B, dtype=torch.int64)
    bank, bank_labels = torch.randn(9, D, dtype=bank_dtype), torch.arange(9)
    products = executor.products()
    n = launches(ops.memory_loss, z, labels, bank, bank_labels, loss)
    assert n == {"sweep": 3, "screen": 5, "composite": 5}[way]  # the last two add up
    assert (executor.products() > products) == (way == "composite")


@pytest.mark.parametrize("bank_dtype, way", [(torch.float32, "sweep"), (torch.float16, "composite")])
def test_a_bank_that_no_vector_load_can_read(bank_dtype, way, executor):
    z, labels = torch.randn(5, 8, requires_grad=True), torch.zeros(5, dtype=torch.int64)
    bank, bank_labels = torch.randn(9 * 8 + 1).to(bank_dtype)[1:].view(9, 8), torch.arange(9)
    for forced in ("auto", "screen", "tensor"):
        before = torch.ops.xbn_emu.set_loss_way(forced)
        n = launches(ops.memory_loss, z, labels, bank, bank_labels, Contrastive())
        torch.ops.xbn_emu.set_loss_way(before)
        assert n == {"sweep": 3, "composite": 5}[way]


@pytest.mark.parametrize("way", ["tensor", "simt", "halves"])
def test_all_triplets_go_by_products_only(way, executor):
    args = (torch.randn(5, 8), torch.zeros(5, dtype=torch.int64), torch.randn(9, 8), torch.arange(9))
    before = torch.ops.xbn_emu.set_loss_way(way)
    try:
        with pytest.raises(RuntimeError, match=f"memory_loss: way '{way}' does not have triplet_all"):
            ops.memory_loss(*args, Triplet(mining="all"))
    finally:
        torch.ops.xbn_emu.set_loss_way(before)
    assert ops.memory_loss(*args, Triplet(mining="all")).isfinite()


@pytest.mark.parametrize(
    "loss, n",
    [
        (SupCon(), 3),
        (NTXent(), 5),
        (MultiSimilarity(), 3),
        (MultiSimilarity(mining=0.1), 7),
        (Triplet(), 3),
        (Triplet(mining="all"), 14),
    ],
)
def test_how_many_kernels_a_loss_launches(loss, n, executor):
    """A pass is a sweep and what it settles; the gradient comes at the end."""
    z, labels = torch.randn(5, 8, requires_grad=True), torch.zeros(5, dtype=torch.int64)
    assert launches(ops.memory_loss, z, labels, torch.randn(9, 8), torch.arange(9), loss) == n


LAUNCHES = {
    "normalize": 1, "normalize_backward": 1, "moments": 2, "track_": 2, "transform_": 2, "standardize_": 2,
    "enqueue_": 2, "memory_loss": 3, "transform_memory_loss_": 5, "memory_sums": 4, "settle_sums": 2, "batch_loss": 3,
    "batch_sums": 2, "step_": 15,
}  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_how_many_kernels_an_op_launches(op, executor):
    assert launches(getattr(emulated.ops, op), *ARGUMENTS[op]().values()) == LAUNCHES[op]


def test_a_damaged_counter_stays_within_the_bank(executor):
    for count, head in ((M + 5, M + 7), (-3, -1), (2**62, -(2**62))):
        m = state.filled(M, D, 650)
        m.count.fill_(count), m.head.fill_(head)
        z, labels = F.normalize(torch.randn(8, D), dim=1), torch.randint(8, (8,))
        ops.transform_(m.bank, m.sums, m.scale, m.shift, m.count)
        assert ops.memory_loss(z, labels, m.bank, m.bank_labels, Contrastive(), count=m.count).isfinite()
        slots = ops.enqueue_(m.bank, m.bank_labels, m.sums, m.head, m.count, z, labels, None, m.scale, m.shift)
        assert (slots >= 0).all() and (slots < M).all() and 0 <= m.head < M and 0 <= m.count <= M


@pytest.mark.parametrize(
    "error, advice",
    [
        (35, "the NVIDIA driver is older than the CUDA toolkit"),
        (209, r"none for this GPU \(compute capability \d+\.\d+\): build it from source with .*XBN_CUDA_ARCHS=\d+"),
        (222, "none for this GPU"),
        (700, "CUDA error 700"),
    ],
)
def test_a_launch_that_fails_says_what_to_do(error, advice, executor):
    m = state.filled(M, D, 650)
    before = m.bank.clone()
    executor.set_launch_error(error)
    with pytest.raises(RuntimeError, match=f"transform_: .*{advice}"):
        ops.transform_(m.bank, m.sums, m.scale, m.shift, m.count)
    executor.set_launch_error(0)
    assert torch.equal(m.bank, before)


def test_way_is_set_back():
    with xbn_ext.loss_way("composite"), xbn_ext.loss_way("simt"):
        pass
    assert xbn_ext.loss_way("auto").previous == "auto"


def test_a_way_can_be_used_again():
    def now():
        return xbn_ext.loss_way(xbn_ext.loss_way("auto").previous).name

    chosen = xbn_ext.loss_way("simt")
    for _ in range(2):
        with chosen:
            assert now() == "simt"
            with xbn_ext.loss_way("composite"), chosen:
                assert now() == "simt"
            assert now() == "simt"
        assert now() == "auto"
    with xbn_ext.loss_way("composite"):
        with chosen:
            assert now() == "simt"
        assert now() == "composite"
    for outer in (lambda: chosen, lambda: xbn_ext.loss_way("simt")):
        with outer():
            with chosen:
                pass
            assert now() == "simt", "the outer block goes on"
        assert now() == "auto"


@pytest.mark.parametrize("made", ["inside", "outside"])
def test_a_way_within_a_compiled_function_is_set_back(made):
    """Also where the compiler gives up on the function: it must not have set one before."""
    torch._dynamo.reset()
    outside = xbn_ext.loss_way("simt")
    xbn_ext.loss_way(outside.previous)
    seen = []

    @torch._dynamo.disable
    def look():
        seen.append(xbn_ext.loss_way("simt").previous)

    def function(x):
        with xbn_ext.loss_way("simt") if made == "inside" else outside:
            look()
        return x + 1

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(function, backend="eager", fullgraph=True)(torch.zeros(1))
    assert xbn_ext.loss_way("auto").previous == "auto"
    for _ in range(2):
        torch.compile(function, backend="eager")(torch.zeros(1))
        assert xbn_ext.loss_way("auto").previous == "auto"
    assert seen == ["simt", "simt"]


def test_a_way_has_a_name_that_there_is():
    names = listed([repr(way) for way in WAYS])
    with pytest.raises(RuntimeError, match=f"way must be {names}, got 'fast'"):
        xbn_ext.loss_way("fast")


def test_there_is_something_for_cuda():
    """Kernels, or in a build without them what computes in plain PyTorch."""
    own = "CUDA" if xbn_ext.build_info()["cuda"] else "CompositeExplicitAutograd"
    for op in OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"xbn_ext::{op}", own)


# --- On a GPU -------------------------------------------------------------------------------------------------


def batches(n, device, size=64):
    generator = torch.Generator().manual_seed(3)
    for _ in range(n):
        x = torch.randn(size, D, generator=generator)
        yield x.to(device), torch.randint(9, (size,), generator=generator).to(device)


def train(criterion, data):
    losses = []
    for x, labels in data:
        x = x.clone().requires_grad_()
        loss = criterion(x, labels)
        loss.backward()
        losses += [loss.detach(), x.grad]
    return losses


def new_criterion(device, **options):
    options = {"loss": Contrastive(0.9, 0.1)} | options
    return CrossBatchMemory(embedding_size=D, memory_size=M, **options).to(device)


@needs_gpu
def test_another_stream():
    """On the stream that is current: everything before it on that stream is seen, nothing waits for the default one."""
    expected = train(new_criterion("cuda"), batches(15, "cuda"))
    data, criterion = list(batches(15, "cuda")), new_criterion("cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        got = train(criterion, data)
    stream.synchronize()
    assert all(map(torch.equal, got, expected))


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_second_device():
    expected = train(new_criterion("cuda:0"), batches(15, "cuda:0"))
    got = train(new_criterion("cuda:1"), batches(15, "cuda:1"))  # cuda:0 is current
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, expected, strict=True))
    assert torch.cuda.current_device() == 0


@needs_gpu
@pytest.mark.parametrize("way", FORCED_WAYS)
@pytest.mark.parametrize(
    "options",
    [{}, {"update": "deferred"}, {"enqueue": "before"}, *({"loss": loss} for loss in LOSSES.values())],
    ids=str,
)
def test_graph_capture(way, options):
    """A captured step replays to the same numbers: no sync, no address or count that was fixed at capture."""
    loss = options.get("loss", Contrastive())
    screens = loss.takes_screen
    if (way != "composite" and loss.formula == "triplet_all") or (way in ("screen", "pairs") and not screens):
        pytest.skip("does not go this way")
    data = list(batches(20, "cuda"))
    with xbn_ext.loss_way(way):
        expected = train(new_criterion("cuda", **options), data)
        criterion = new_criterion("cuda", **options)
        got = train(criterion, data[:3])
        x, labels = (t.clone() for t in data[3])
        x.requires_grad_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm up on the side, on a copy
            copy = new_criterion("cuda", **options)
            copy.load_state_dict(criterion.state_dict())
            torch.autograd.grad(copy(x, labels), x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = criterion(x, labels)
            (grad,) = torch.autograd.grad(loss, x)
        for batch, batch_labels in data[3:]:
            x.data.copy_(batch), labels.copy_(batch_labels)
            graph.replay()
            got += [loss.clone(), grad.clone()]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@needs_gpu
def test_no_host_sync():
    criterion, data = new_criterion("cuda"), list(batches(4, "cuda"))
    train(criterion, data[:2])
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(criterion, data[2:])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("way", FORCED_WAYS)
def test_same_bits_every_run(way):
    with xbn_ext.loss_way(way):
        first = train(new_criterion("cuda"), batches(10, "cuda"))
        again = train(new_criterion("cuda"), batches(10, "cuda"))
    assert all(map(torch.equal, first, again))


@needs_gpu
def test_opcheck_on_the_gpu():
    z, labels = torch.randn(5, 7, device="cuda", requires_grad=True), torch.arange(5, device="cuda")
    bank, bank_labels = torch.randn(11, 7, device="cuda"), torch.arange(11, device="cuda") % 3
    options = (None, None, None, None, None, None, "contrastive_mean", [1.0, 0.5], True, 1e-6, True)
    torch.library.opcheck(torch.ops.xbn_ext.memory_loss.default, (z, labels, bank, bank_labels, *options))


@needs_gpu
def test_autocast_and_tf32_leave_the_sweep_exact():
    z, labels = F.normalize(torch.randn(64, D, device="cuda"), dim=1), torch.arange(64, device="cuda") % 8
    bank, bank_labels = torch.randn(M, D, device="cuda"), torch.arange(M, device="cuda") % 8
    expected = ops.memory_loss(z, labels, bank, bank_labels, Contrastive())
    with torch.autocast("cuda", dtype=torch.float16):
        assert torch.equal(ops.memory_loss(z, labels, bank, bank_labels, Contrastive()), expected)
