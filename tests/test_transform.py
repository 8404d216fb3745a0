"""ops.transform_ against the reference."""

import pytest
import state
import torch

from xbn_ext import ops as cpu_ops
from xbn_ext import reference
from xbn_ext.testing import assert_within_budget

SIZES = [1, 7, 63, 64, 65, 257, 1000]


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
