"""The way of halves of `memory_loss` on a GPU, executed on the CPU: which rows it takes, and that it has the digits of
float whatever the size of anchors, rows and weights."""

import pytest
import torch
from conftest import HAS_EMULATOR
from test_cuda import launches
from torch.nn.functional import normalize

from xbn_ext import NCA, Contrastive, MultiSimilarity, NTXent, SupCon, Triplet, ops, reference

if HAS_EMULATOR:
    import emulated

pytestmark = pytest.mark.skipif(not HAS_EMULATOR, reason="there is a real GPU, or no g++")
B, M, D = 9, 400, 24


@pytest.fixture(autouse=True)
def settings():
    with ops.over(emulated.ops):
        yield
    emulated.executor.set_multiprocessors(4)
    emulated.executor.set_shared_memory(227 << 10)
    torch.ops.xbn_emu.set_loss_way("auto")


def loss_and_gradient(way, z, *args, **options):
    torch.ops.xbn_emu.set_loss_way(way)
    z = z.detach().requires_grad_()
    value = ops.memory_loss(z, *args, **options)
    return value.detach(), *torch.autograd.grad(value, z)


def problem(n=B, D=D):
    labels, bank_labels = torch.randint(3, (n,)), torch.randint(3, (M,))
    return normalize(torch.randn(n, D)), labels, normalize(torch.randn(M, D)), bank_labels


def takes(z, labels, bank, bank_labels, **options):
    """Whether the products of halves do it: the sweep, which does it otherwise, has bits of its own."""
    args = (z, labels, bank, bank_labels, SupCon(0.1))
    halves, sweep = (loss_and_gradient(way, *args, **options) for way in ("halves", "tensor"))
    return not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(halves, sweep, strict=True))


@pytest.mark.parametrize(
    "norm, taken", [(1.0, True), (254.0, True), (256.0, False), (1.01 * 2**-10, True), (0.99 * 2**-10, False),
                    (0.0, False), (torch.nan, False), (torch.inf, False), (1e30, False)],
)  # fmt: skip
@pytest.mark.parametrize("row", [11, 137, M - 1])
def test_a_row_of_another_size_leaves_all_to_the_sweep(norm, taken, row):
    z, labels, bank, bank_labels = problem()
    bank[row] *= norm
    assert takes(z, labels, bank, bank_labels) == taken
    assert takes(z, labels, bank, bank_labels, count=torch.tensor(row))  # it does not exist


def test_rows_count_as_the_map_makes_them():
    z, labels, bank, bank_labels = problem()
    scale, shift = torch.full((D,), 300.0, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
    assert not takes(z, labels, bank, bank_labels, scale=scale, shift=shift)
    assert takes(z, labels, bank / 300, bank_labels, scale=scale, shift=shift)


@pytest.mark.parametrize("anchors", [1.0, 2.0**-60, 3e-30, 2.0**40])
@pytest.mark.parametrize("rows", [1.0, 0.002, 200.0])
@pytest.mark.parametrize("renormalize", [True, False])
def test_digits_whatever_the_size(anchors, rows, renormalize):
    """Of a loss that is linear in all similarities: no pair reaches its margins, which are twice the largest one."""
    z, labels, bank, bank_labels = problem()
    z[1] *= 1e-3  # each anchor has a power of two of its own
    z, bank = anchors * z, rows * bank
    margin = 2 * anchors * (1 if renormalize else rows)
    loss = Contrastive(margin, -margin)
    for some in (slice(None), slice(1, 2)):
        args = (labels[some], bank, bank_labels, loss)
        value, grad = loss_and_gradient("halves", z[some], *args, renormalize=renormalize)
        z64 = z[some].double().requires_grad_()
        truth = reference.memory_loss(z64, labels[some], bank.double(), bank_labels, loss, renormalize=renormalize)
        (grad64,) = torch.autograd.grad(truth, z64)
        torch.testing.assert_close(value.double(), truth.detach(), rtol=1e-7, atol=0)
        torch.testing.assert_close(grad.double(), grad64, rtol=1e-6, atol=2e-7 * float(grad64.abs().max()))
    assert takes(z, labels, bank, bank_labels, renormalize=renormalize)


@pytest.mark.parametrize("softmax_scale", [1, 100])
def test_digits_of_weights_of_all_sizes(softmax_scale):
    """Softmax weights from 1 to e^-200, and rows that have them of norms from 2^-9 to 200."""
    z, labels, bank, bank_labels = problem(70, 260)
    bank *= torch.logspace(-2.5, 2.3, M)[torch.randperm(M)][:, None]
    args = (labels, bank, bank_labels, NCA(softmax_scale))
    got = loss_and_gradient("halves", z, *args)
    z64 = z.double().requires_grad_()
    truth = reference.memory_loss(z64, labels, bank.double(), bank_labels, NCA(softmax_scale))
    wanted = truth.detach(), *torch.autograd.grad(truth, z64)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6 * softmax_scale, atol=1e-6 * float(b.abs().max()))


@pytest.mark.parametrize("n", [1, 7, 70])
def test_rows_that_have_a_weight_of_one_anchor_only(n):
    """Those of 32 rows that none has a weight of are left out."""
    z, _, bank, _ = problem(n)
    labels, bank_labels = torch.arange(n), torch.full((M,), -1)
    bank_labels[torch.randperm(M)[:n]] = labels  # a positive for each
    args = (labels, bank, bank_labels, Contrastive(1.0, 1.0))  # no negative costs anything
    _, grad = loss_and_gradient("halves", z, *args)
    _, expected = loss_and_gradient("simt", z, *args)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)


def test_an_anchor_that_is_not_finite_spoils_its_own_gradient_only():
    z, labels, bank, bank_labels = problem()
    args = (labels, bank, bank_labels, NCA(1.0))
    ranks = torch.arange(B) != 4
    _, expected = loss_and_gradient("halves", z, *args, anchors=ranks)
    for value in (torch.nan, torch.inf):
        z[4, 5] = value
        _, grad = loss_and_gradient("halves", z, *args, anchors=ranks)
        assert grad[4].isnan().all() and torch.equal(grad[ranks], expected[ranks])


def test_a_gpu_with_less_shared_memory():
    """Then fewer anchors at a time, with the same bits; and no rows of more than 704 dimensions."""
    for dimension in (400, 704, 708):
        z, labels, bank, bank_labels = problem(40, dimension)
        args = (z, labels, bank, bank_labels, SupCon(0.1))
        emulated.executor.set_shared_memory(227 << 10)
        expected = loss_and_gradient("halves", *args)
        emulated.executor.set_shared_memory(99 << 10)
        same = all(map(torch.equal, expected, loss_and_gradient("halves", *args)))
        assert same == (dimension <= 704)
        assert takes(*args[:4]) == (dimension <= 704)


@pytest.mark.parametrize(
    "loss, passes",  # of each pass its launches: begin, similarities, scores, gradient, sweep, settle
    [(SupCon(), [6]), (NTXent(), [6, 6]), (MultiSimilarity(mining=0.1), [5, 5, 6]), (Triplet(), [5])],
    ids=str,
)  # fmt: skip
def test_similarities_are_there_for_the_next_pass(loss, passes):
    """One that has left no weights in their place; a last launch adds up the gradient, or gathers it."""
    z, labels, bank, bank_labels = problem()
    torch.ops.xbn_emu.set_loss_way("halves")
    n = launches(ops.memory_loss, z.requires_grad_(), labels, bank, bank_labels, loss)
    assert n == sum(passes) + 1


def test_the_number_of_multiprocessors_changes_rounding_only():
    z, labels, bank, bank_labels = problem(130)
    results = []
    for n in (1, 3, 132):
        emulated.executor.set_multiprocessors(n)
        results.append(loss_and_gradient("halves", z, labels, bank, bank_labels, SupCon(0.1)))
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
