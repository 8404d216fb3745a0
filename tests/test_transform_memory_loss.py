"""ops.transform_memory_loss_ is transform_, then memory_loss: to the bit, whether it does both in one sweep or not."""

import pytest
import state
import torch
import torch.nn.functional as F
from loss_cases import assert_close, clear_anchors, each_kind_of_loss, every_loss

from xbn_ext import Contrastive, reference
from xbn_ext import ops as cpu_ops
from xbn_ext.dtypes import MEMORY_DTYPES

SHAPES = [(1, 1, 1), (7, 63, 5), (64, 1000, 64), (65, 257, 48), (256, 700, 16), (257, 300, 7), (0, 9, 4)]


def moved(m):
    """What transform_ takes."""
    return m.bank, m.sums, m.scale, m.shift, m.count


def anchors(B, D, dtype, device="cpu"):
    return F.normalize(torch.randn(B, D, dtype=dtype), dim=1).to(device), torch.randint(-3, 8, (B,)).to(device)


def in_one(ops, m, z, labels, loss, **options):
    z = z.clone().requires_grad_()
    value, pairs = ops.transform_memory_loss_(*moved(m), z, labels, m.bank_labels, loss, **options)
    return value.detach(), *torch.autograd.grad(value, z), pairs


def in_turn(ops, m, z, labels, loss, ranked=None, **options):
    z = z.clone().requires_grad_()
    ops.transform_(*moved(m))
    options |= {"count": m.count if ranked is None else ranked, "scale": m.scale, "shift": m.shift}
    value, pairs = ops.memory_loss_and_pairs(z, labels, m.bank, m.bank_labels, loss, **options)
    return value.detach(), *torch.autograd.grad(value, z), pairs


def assert_same(ops, m, z, labels, loss, **options):
    other = state.clone(m)
    for got, want in zip(
        in_one(ops, m, z, labels, loss, **options), in_turn(ops, other, z, labels, loss, **options), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(m.bank, other.bank)
    assert torch.equal(m.scale, torch.ones_like(m.scale)) and not m.shift.any()
    torch.testing.assert_close(m.sums, other.sums, rtol=1e-12, atol=1e-12)


@each_kind_of_loss
@pytest.mark.parametrize("B, M, D", SHAPES)
def test_ragged_shapes(B, M, D, loss, ops, device, dtype):
    m = state.to(state.filled(M, D, max(M - 5, 1), dtype, pending=True), device)
    assert_same(ops, m, *anchors(B, D, dtype, device), loss)


@pytest.mark.parametrize("memory_dtype", MEMORY_DTYPES, ids=str)
def test_the_bank_has_its_own_dtype(memory_dtype, ops, device, dtype):
    m = state.to(state.clone(state.filled(300, 16, 300, pending=True), memory_dtype), device)
    assert_same(ops, m, *anchors(40, 16, dtype, device), Contrastive(0.9, 0.1))


@pytest.mark.parametrize("ranked", [0, 100, 290, 300])
def test_rows_that_are_moved_but_not_ranked(ranked, ops, device, dtype):
    m = state.to(state.filled(300, 16, 290, dtype, pending=True), device)
    assert_same(ops, m, *anchors(40, 16, dtype, device), Contrastive(), ranked=torch.tensor(ranked, device=device))


def test_options(ops, device, dtype):
    m = state.to(state.filled(300, 16, 290, dtype, pending=True), device)
    z, labels = anchors(40, 16, dtype, device)
    options = {"bank_ids": torch.arange(300, device=device) % 50, "exclude": torch.arange(40, device=device)}
    assert_same(ops, m, z, labels, Contrastive(), anchors=labels > 0, renormalize=False, eps=0.5, **options)


def test_float64_says_the_same(ops, device, dtype):
    loss = Contrastive(0.9, 0.1)
    m = state.to(state.filled(1000, 32, 900, dtype, pending=True), device)
    z, labels = anchors(64, 32, dtype, device)
    truth, same_dtype = state.clone(m, torch.float64), state.clone(m)
    rows = truth.bank[:900] * truth.scale + truth.shift
    keep = clear_anchors(loss, z, labels, rows, m.bank_labels[:900])
    *result, pairs = in_one(ops, m, z, labels, loss, anchors=keep)
    *expected, true_pairs = in_one(reference, truth, z.double(), labels, loss, anchors=keep)
    same = in_one(reference, same_dtype, z, labels, loss, anchors=keep)[:2]
    assert_close(result, expected, same, loss, 1.0)
    torch.testing.assert_close(pairs, true_pairs)
    torch.testing.assert_close(m.bank[:900].double(), rows, rtol=1e-5, atol=1e-5)


def test_same_bits_on_any_number_of_threads():
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        m = state.filled(5000, 65, 4999, pending=True)
        results.append([*in_one(cpu_ops, m, *anchors(70, 65, torch.float32), Contrastive()), m.bank, m.sums])
    torch.set_num_threads(1)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_a_row_of_the_bank_cannot_be_an_anchor(ops, device):
    m = state.to(state.filled(30, 8, 30, pending=True), device)
    before = state.clone(m)
    with pytest.raises(RuntimeError, match="transform_memory_loss_: z must not share memory with bank"):
        ops.transform_memory_loss_(*moved(m), m.bank[:4], m.bank_labels[:4], m.bank_labels, Contrastive())
    state.assert_same_state(m, before)


def test_without_grad_and_a_second_derivative():
    m = state.filled(30, 8, 30, pending=True)
    z, labels = anchors(5, 8, torch.float32)
    with torch.no_grad():
        value, _ = cpu_ops.transform_memory_loss_(
            *moved(state.clone(m)), z.requires_grad_(), labels, m.bank_labels, Contrastive()
        )
    assert not value.requires_grad
    assert torch.equal(value, in_one(cpu_ops, state.clone(m), z.detach(), labels, Contrastive())[0])
    value, _ = cpu_ops.transform_memory_loss_(*moved(m), z, labels, m.bank_labels, Contrastive())
    (grad,) = torch.autograd.grad(2 * value, z, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated only once"):
        grad.sum().backward()


def test_forward_mode_raises_before_anything_is_written():
    m = state.filled(30, 8, 30, pending=True)
    z, labels = anchors(5, 8, torch.float32)
    before = state.clone(m)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z, torch.ones_like(z))
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            cpu_ops.transform_memory_loss_(*moved(m), dual, labels, m.bank_labels, Contrastive())
    state.assert_same_state(m, before)


@every_loss
def test_it_is_in_step_with_the_reference(loss):
    """The twin has the same signature."""
    m = state.filled(200, 12, 150, torch.float64, pending=True)
    other, (z, labels) = state.clone(m), anchors(20, 12, torch.float64)
    value, pairs = cpu_ops.transform_memory_loss_(*moved(m), z, labels, m.bank_labels, loss)
    want, true_pairs = reference.transform_memory_loss_(*moved(other), z, labels, other.bank_labels, loss)
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(pairs, true_pairs)
    state.assert_same_state(m, other)
