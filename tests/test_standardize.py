"""ops.standardize_ against the reference: other coordinates, same rows."""

import pytest
import state
import torch

from xbn_ext import reference

FAR = {"wide": (100.0, 0.0), "narrow": (0.01, 0.0), "shifted": (1.0, 9.0)}


def standardize(module, m):
    module.standardize_(m.bank, m.sums, m.scale, m.shift, m.count, 1e-6)


def off_standard(M, D, count, dtype, factor, offset):
    """A memory that stands for rows around 0.3 with std 0.1 in coordinates that are off by a factor and an offset."""
    m = reference.Memory.empty(M, D, dtype)
    m.bank[:count] = (torch.randn(count, D, dtype=torch.float64) * factor + offset).to(dtype)
    m.scale.fill_(0.1 / factor)
    m.shift.copy_(0.3 - m.scale * offset)
    m.count.fill_(count)
    m.sums.copy_(reference.sums_of(m.bank[:count]))
    return m


@pytest.mark.parametrize("far", FAR.values(), ids=FAR.keys())
@pytest.mark.parametrize("D", [1, 7, 65])
@pytest.mark.parametrize("count", [30, 257])
def test_rows_stand_for_what_they_did(far, D, count, ops, device, dtype):
    m = state.to(off_standard(257, D, count, dtype, *far), device)
    meant, beyond = m.bank.double() * m.scale + m.shift, m.bank[count:].clone()
    truth = state.clone(m)
    standardize(ops, m)
    standardize(reference, truth)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close((m.bank.double() * m.scale + m.shift)[:count], meant[:count], rtol=0, atol=20 * eps)
    lost = 5 if far == FAR["shifted"] else 1  # the spread is a small difference of large sums
    state.assert_same_state(m, truth, rtol=20 * eps, atol=20 * lost * eps * count)
    mean, std = reference.bank_moments(m.sums, m.count)
    assert mean.abs().max() < 1e-3 and (std - 1).abs().max() < 1e-3
    assert torch.equal(m.bank[count:], beyond)


def test_does_nothing_near_standard_coordinates(ops, device, dtype):
    m = state.to(off_standard(257, 7, 200, dtype, 2.0, 3.0), device)
    before = state.clone(m)
    standardize(ops, m)
    state.assert_same_state(m, before, rtol=0, atol=0)


def test_empty_bank_and_dead_dimensions(ops, device, dtype):
    m = state.to(reference.Memory.empty(10, 3, dtype), device)
    standardize(ops, m)
    assert torch.equal(m.scale, torch.ones_like(m.scale))
    m = state.to(off_standard(10, 3, 10, dtype, 100.0, 0.0), device)
    m.bank[:, 1] = 5.0  # dead: left as it is
    m.scale[1] = 0.1
    m.sums.copy_(reference.sums_of(m.bank))
    scale = m.scale.clone()
    standardize(ops, m)
    assert (m.bank[:, 1] == 5).all() and m.scale[1] == scale[1] and m.scale[0] != scale[0]


@pytest.mark.parametrize("scale", [1e-7, 1e5])
@pytest.mark.parametrize("memory_dtype", [None, *state.NARROW_DTYPES], ids=str)
def test_the_scale_of_a_dimension_that_has_died_becomes_1(scale, memory_dtype, ops, device, dtype):
    m = state.to(off_standard(40, 3, 30, memory_dtype or dtype, 1.0, 0.0), device)  # the others are as they should be
    m.bank[:30, 1] = 3.0
    m.scale[1], m.shift[1] = scale, 0.25
    m.sums.copy_(reference.sums_of(m.bank[:30]))
    meant, truth = (m.bank.double() * m.scale + m.shift)[:30], state.clone(m)
    standardize(ops, m)
    standardize(reference, truth)
    eps = torch.finfo(m.bank.dtype).eps
    state.assert_same_state(m, truth, rtol=20 * eps, atol=600 * eps)
    torch.testing.assert_close(m.scale[1].item(), 1.0, rtol=1e-6, atol=0)
    assert m.bank[:30, 1].abs().max() <= 1e-6 * scale
    assert ((m.bank.double() * m.scale + m.shift)[:30, 1] - meant[:, 1]).abs().max() <= 1e-6 * (1 + scale)
    before = state.clone(m)
    standardize(ops, m)
    state.assert_same_state(m, before, rtol=0, atol=0)


@pytest.mark.parametrize("memory_dtype", state.NARROW_DTYPES, ids=str)
def test_16_bit_banks(memory_dtype, ops, device):
    m = state.to(off_standard(257, 40, 200, memory_dtype, 50.0, 20.0), device)
    meant = m.bank.double() * m.scale + m.shift
    standardize(ops, m)
    mean, std = reference.bank_moments(m.sums, m.count)
    assert mean.abs().max() < 0.01 and (std - 1).abs().max() < 0.01
    # Rounded once more, in units of the spread 0.1.
    assert (m.bank.double() * m.scale + m.shift - meant)[:200].abs().max() < 0.1 * 4 * torch.finfo(memory_dtype).eps


@pytest.mark.parametrize("far", ["wide", "shifted", "near"])
@pytest.mark.parametrize("rows", [0, 3, 60], ids=["none", "few", "more"])
def test_a_part_follows_the_whole_ring(far, rows, ops, device, dtype):
    """The moments of all rows decide, and say how. What a part has of its own could say otherwise, or nothing."""
    whole = state.to(off_standard(200, 7, 200, dtype, *FAR.get(far, (1.0, 0.0))), device)
    part = state.clone(whole)
    part.bank = whole.bank[:60].clone()
    part.count.fill_(rows)
    part.sums.copy_(reference.sums_of(part.bank[:rows]))
    truth, ring = state.clone(part), {"ring_sums": whole.sums.clone(), "ring_count": whole.count.clone()}
    ops.standardize_(part.bank, part.sums, part.scale, part.shift, part.count, 1e-6, **ring)
    reference.standardize_(truth.bank, truth.sums, truth.scale, truth.shift, truth.count, 1e-6, **ring)
    standardize(ops, whole)
    assert torch.equal(part.scale, whole.scale) and torch.equal(part.shift, whole.shift)
    assert torch.equal(part.bank[:rows], whole.bank[:rows])
    state.assert_same_state(part, truth, rtol=100 * torch.finfo(dtype).eps, atol=1000 * torch.finfo(dtype).eps)
    assert torch.equal(part.bank[rows:], truth.bank[rows:])
