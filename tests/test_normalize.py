"""ops.normalize and its gradient against torch.nn.functional.normalize in float64."""

import pytest
import torch
import torch.nn.functional as F
from conftest import only
from shapes import SIZES

import xbn_ext
from xbn_ext import ops as cpu_ops
from xbn_ext import reference
from xbn_ext.testing import assert_within_budget

EPS = 1e-6


def run(normalize, x, upstream):
    """z, and the gradient by x of what has `upstream` for its gradient by z."""
    leaf = x.detach().requires_grad_()
    z = normalize(leaf)
    return z.detach(), *torch.autograd.grad(z, leaf, upstream)


def of_torch(x):
    return F.normalize(x, dim=1, eps=EPS)


def assert_right(ops, x, upstream=None):
    """Each row by itself: a gradient is as large as its row is short."""
    upstream = torch.randn_like(x) if upstream is None else upstream
    results = run(ops.normalize, x, upstream)
    truths = run(of_torch, x.double(), upstream.double())
    assert all(result.dtype == x.dtype and result.is_contiguous() for result in results)
    for result, truth in zip(results, truths, strict=True):
        assert result.shape == truth.shape
        for row, true_row in zip(result, truth, strict=True):
            assert_within_budget(row, true_row)


@pytest.mark.parametrize("B", SIZES[:-1])
@pytest.mark.parametrize("D", SIZES)
def test_ragged_shapes(B, D, ops, device, dtype):
    lengths = torch.logspace(-5, 5, B, dtype=dtype, device=device)
    x = lengths[:, None] * torch.randn(B, D, dtype=dtype, device=device)
    if D > 1:
        return assert_right(ops, x)
    z, grad = run(ops.normalize, x, torch.ones_like(x))  # a single column has no direction to turn to
    assert_within_budget(z, x.double().sign())
    assert (grad * x).abs().max() <= 4 * torch.finfo(dtype).eps


def test_the_reference_is_the_same(dtype):
    x = torch.randn(20, 7, dtype=dtype)
    assert_within_budget(reference.normalize(x), of_torch(x.double()))


def test_short_rows_are_divided_by_eps(ops, device, dtype):
    x = torch.randn(4, 33, dtype=dtype, device=device)
    x[0] = 0
    x[1] *= 1e-9
    x[2] *= 0.5 * EPS / x[2].norm()
    upstream = torch.randn_like(x)
    z, grad = run(ops.normalize, x, upstream)
    assert not z[0].any()
    assert_within_budget(z[:3], x[:3].double() / EPS)
    assert_within_budget(grad[:3], upstream[:3].double() / EPS)
    assert_right(ops, x, upstream)


def test_a_row_as_long_as_eps(ops, device, dtype):
    """On the border it counts as a long one, whatever the version of torch makes of it."""
    x = torch.zeros(1, 8, dtype=dtype, device=device)
    x[0, 3] = 2.0
    leaf = x.requires_grad_()
    (grad,) = torch.autograd.grad(ops.normalize(leaf, 2.0).sum(), leaf)
    expected = torch.full_like(x, 0.5)
    expected[0, 3] = 0
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e19, 3e37])
@pytest.mark.parametrize("D", [33, 64])
def test_no_square_of_a_float_overflows_or_vanishes(size, D, ops, device):
    x = torch.randn(5, D, device=device).clamp(-3, 3) * size
    leaf = x.requires_grad_()
    z = ops.normalize(leaf, 1e-30)
    assert_within_budget(z.detach().norm(dim=1), torch.ones(5, dtype=torch.float64, device=device))
    assert_within_budget(z.detach(), F.normalize(x.detach().double(), dim=1, eps=1e-30))
    (grad,) = torch.autograd.grad(z[:, 0].sum(), leaf)
    truth = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(F.normalize(truth, dim=1, eps=1e-30)[:, 0].sum(), truth)
    torch.testing.assert_close(grad * size, (expected * size).float(), rtol=1e-4, atol=1e-5)


def test_a_float64_row_that_overflows_is_what_torch_makes_of_it(ops, device):
    x = torch.randn(3, 9, dtype=torch.float64, device=device) * 1e200
    assert all(map(torch.equal, run(ops.normalize, x, torch.ones_like(x)), run(of_torch, x, torch.ones_like(x))))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("D", [1, 33, 64])
def test_rows_that_are_not_finite(bad, D, ops, device, dtype):
    x, upstream = torch.randn(6, D, dtype=dtype, device=device), torch.randn(6, D, dtype=dtype, device=device)
    clean = run(ops.normalize, x, upstream)
    x[2, D // 2] = bad
    z, grad = run(ops.normalize, x, upstream)
    expected, expected_grad = run(of_torch, x, upstream)
    assert torch.equal(z.isnan(), expected.isnan()) and z[2, D // 2].isnan()
    assert torch.equal(z[2].nan_to_num(7), expected[2].nan_to_num(7))
    assert torch.equal(grad.isnan(), expected_grad.isnan()) and grad[2].isnan().all()
    others = torch.arange(6, device=device) != 2
    assert torch.equal(z[others], clean[0][others]) and torch.equal(grad[others], clean[1][others])


def test_a_gradient_that_is_not_finite_stays_in_its_row(ops, device, dtype):
    x, upstream = torch.randn(3, 20, dtype=dtype, device=device), torch.randn(3, 20, dtype=dtype, device=device)
    upstream[1, 4] = torch.nan
    _, grad = run(ops.normalize, x, upstream)
    assert grad[1].isnan().all() and grad[[0, 2]].isfinite().all()


def test_an_empty_batch(ops, device, dtype):
    x = torch.empty(0, 5, dtype=dtype, device=device)
    z, grad = run(ops.normalize, x, x)
    assert z.shape == grad.shape == (0, 5)


def test_non_contiguous(ops, device, dtype):
    x = torch.randn(63, 130, dtype=dtype, device=device)
    unaligned = x.flatten()[1 : 1 + 20 * 64].view(20, 64)
    for view in (x[:, ::2], x.T, x[::3], x[:, :7], unaligned):
        assert_right(ops, view)
        assert_right(ops, view, torch.randn_like(view.T.contiguous()).T)
    assert_right(ops, x, torch.randn(63, 1, dtype=dtype, device=device).expand(63, 130))
    assert_right(ops, torch.randn(20, 64, dtype=dtype, device=device), unaligned)


def test_another_tensor_comes_back(ops, device):
    x = F.normalize(torch.randn(4, 8, device=device), dim=1)
    z = ops.normalize(x)
    assert z.data_ptr() != x.data_ptr() and not z.requires_grad


def test_a_second_use_of_the_graph(ops, device, dtype):
    x = torch.randn(9, 20, dtype=dtype, device=device).requires_grad_()
    value = (ops.normalize(x) * torch.randn_like(x)).sum()
    value.backward(retain_graph=True)
    once = x.grad.clone()
    value.backward()
    assert torch.equal(x.grad, 2 * once)


@only(dtype="f64")
def test_gradcheck(ops, device, dtype):
    for D in (1, 6, 7):
        x = torch.randn(4, D, dtype=torch.float64, device=device)
        x[0] *= 1e-3  # short
        assert torch.autograd.gradcheck(lambda x: ops.normalize(x, 0.05), x.requires_grad_())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_second_derivative_raises(compiled):
    torch._dynamo.reset()
    normalize = torch.compile(cpu_ops.normalize, backend="aot_eager", fullgraph=True) if compiled else cpu_ops.normalize
    message = "does not currently support double backward|appears to not have been used" if compiled else "only once"
    x, target = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    (grad,) = torch.autograd.grad((normalize(x) * target).sum(), x, create_graph=True)
    for of in (x, target):
        with pytest.raises(RuntimeError, match=message):
            torch.autograd.grad(grad.square().sum(), of, retain_graph=True)


def test_forward_mode_raises():
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(torch.randn(3, 4), torch.ones(3, 4))
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            cpu_ops.normalize(x)


@only(compiled=True)  # the emulated ops have no fake kernels
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_fullgraph_compile(backend, ops, device):
    torch._dynamo.reset()
    fast = torch.compile(ops.normalize, fullgraph=True, backend=backend)
    for x in (torch.randn(6, 20, device=device), torch.randn(20, 6, device=device).T):
        upstream = torch.randn_like(x)
        for got, expected in zip(run(fast, x, upstream), run(ops.normalize, x, upstream), strict=True):
            assert torch.equal(got, expected)


def test_vmap_without_grad():
    x = torch.randn(3, 5, 4, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(torch.func.vmap(cpu_ops.normalize)(x), torch.stack(list(map(cpu_ops.normalize, x))))


def test_gradients_in_batches():
    """What torch.autograd.functional.jacobian(vectorize=True) computes."""
    x, upstream = torch.randn(5, 4, requires_grad=True), torch.randn(3, 5, 4)
    z = cpu_ops.normalize(x)
    (grads,) = torch.autograd.grad(z, x, upstream, is_grads_batched=True, retain_graph=True)
    for grad, one in zip(grads, upstream, strict=True):
        assert torch.equal(grad, *torch.autograd.grad(z, x, one, retain_graph=True))


def test_same_bits_on_any_number_of_threads():
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        x = torch.randn(3000, 65)
        results.append(run(cpu_ops.normalize, x, torch.randn_like(x)))
    torch.set_num_threads(1)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_every_instruction_set(isa, dtype, monkeypatch):
    monkeypatch.setenv("XBN_CPU_ISA", isa)
    try:
        assert xbn_ext.build_info()["cpu_isa"] == isa
    except RuntimeError as lacking:
        pytest.skip(str(lacking))
    for B, D in ((1, 2), (65, 257), (300, 130)):
        assert_right(cpu_ops, torch.randn(B, D, dtype=dtype))
