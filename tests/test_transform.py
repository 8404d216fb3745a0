"""ops.transform_ against the reference."""

import pytest
import state
import torch
from shapes import SIZES

from xbn_ext import ops as cpu_ops
from xbn_ext import reference
from xbn_ext.testing import assert_within_budget


def transform(module, m):
    module.transform_(m.bank, m.sums, m.scale, m.shift, m.count)


@pytest.mark.parametrize("M", SIZES)
@pytest.mark.parametrize("D", SIZES)
@pytest.mark.parametrize("fill", [0, 0.4, 1], ids=["empty", "partial", "full"])
def test_ragged_shapes(M, D, fill, ops, device, dtype):
    m = state.to(state.filled(M, D, int(fill * M), dtype, pending=True), device)
    untouched = m.bank[m.count :].clone()
    truth, same_dtype = state.clone(m, torch.float64), state.clone(m)
    expected_same = same_dtype.bank * same_dtype.scale.to(dtype) + same_dtype.shift.to(dtype)
    transform(ops, m)
    transform(reference, truth)
    n = int(m.count)
    assert_within_budget(m.bank[:n], truth.bank[:n], expected_same[:n])
    assert torch.equal(m.bank[n:], untouched)
    assert torch.equal(m.scale, torch.ones_like(m.scale)) and not m.shift.any()
    torch.testing.assert_close(m.sums, reference.sums_of(m.bank[:n]), rtol=1e-12, atol=1e-12)


def test_same_bits_on_any_number_of_threads():
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        m = state.filled(5000, 65, 4999, pending=True)
        transform(cpu_ops, m)
        results.append((m.bank, m.sums))
    torch.set_num_threads(1)
    for bank, sums in results[1:]:
        assert torch.equal(bank, results[0][0]) and torch.equal(sums, results[0][1])


@pytest.mark.parametrize("memory_dtype", state.NARROW_DTYPES, ids=str)
@pytest.mark.parametrize("D", [1, 7, 8, 64, 65, 264])
def test_16_bit_banks(memory_dtype, D, ops, device):
    m = state.to(state.filled(257, D, 200, memory_dtype, pending=True), device)
    truth = state.clone(m)
    transform(ops, m)
    transform(reference, truth)
    torch.testing.assert_close(m.bank, truth.bank, rtol=torch.finfo(memory_dtype).eps, atol=1e-6)
    assert (m.bank == truth.bank).double().mean() > 0.99  # the same rounding but where float32 decides otherwise
    torch.testing.assert_close(m.sums, reference.sums_of(m.bank[:200]), rtol=1e-12, atol=1e-12)


def test_every_number_of_a_narrow_dtype(ops, device):
    """Conversions of all bit patterns: the identity keeps them, NaN stays NaN, and halving rounds as torch does."""
    for memory_dtype in state.NARROW_DTYPES:
        n = 8 * memory_dtype.itemsize
        bits = torch.arange(-(2 ** (n - 1)), 2 ** (n - 1), dtype=getattr(torch, f"int{n}"), device=device)
        for scale in (1.0, 0.5, 3.0):
            bank = bits.view(memory_dtype).reshape(-1, 8).clone()
            expected = (bank.float() * scale).to(memory_dtype)
            scales, shift = torch.full((8,), scale, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
            count = torch.tensor(len(bank), device=device)
            ops.transform_(
                bank, torch.zeros(2, 8, dtype=torch.float64, device=device), scales.to(device), shift.to(device), count
            )
            torch.testing.assert_close(bank, expected, rtol=0, atol=0, equal_nan=True)
