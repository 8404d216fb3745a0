"""ops.enqueue_ against the reference."""

import pytest
import state
import torch
from shapes import SIZES

from xbn_ext import reference
from xbn_ext.dtypes import MEMORY_DTYPES, compute_dtype


def enqueue(module, m, z, labels, mask=None, **more):
    return module.enqueue_(m.bank, m.bank_labels, m.sums, m.head, m.count, z, labels, mask, m.scale, m.shift, **more)


@pytest.mark.parametrize("memory_dtype", state.NARROW_DTYPES, ids=str)
def test_16_bit_banks(memory_dtype, ops, device, dtype):
    """The sums are those of the rows as rounded; what rounding makes infinite stays out."""
    for fill in (0, 40, 65):
        m = state.to(state.filled(65, 33, fill, memory_dtype, pending=True), device)
        truth = state.clone(m)
        z, labels = torch.randn(30, 33, dtype=dtype, device=device), torch.arange(30, device=device)
        z[3] = min(2 * torch.finfo(memory_dtype).max, 3.4e38)
        m.scale.fill_(0.5), truth.scale.fill_(0.5)
        slots = enqueue(ops, m, z, labels)
        assert torch.equal(slots, enqueue(reference, truth, z, labels)) and slots[3] == -1
        assert torch.equal(m.bank, truth.bank)
        torch.testing.assert_close(m.sums, truth.sums, rtol=1e-12, atol=1e-9)


def same(ops, m, z, labels, mask=None):
    truth = state.clone(m)
    slots = enqueue(ops, m, z, labels, mask)
    assert torch.equal(slots, enqueue(reference, truth, z, labels, mask))
    # The stored rows differ by the rounding of one division, the sums by that of adding and subtracting.
    state.assert_same_state(m, truth, rtol=1e-6 if m.bank.dtype == torch.float32 else 1e-12, atol=1e-9)
    return slots


@pytest.mark.parametrize("B", SIZES[:-1])
@pytest.mark.parametrize("M", SIZES[:-1])
@pytest.mark.parametrize("fill", [0, 0.6, 1], ids=["empty", "partial", "full"])
@pytest.mark.parametrize("memory_dtype", [torch.float32, torch.float64], ids=["bank-f32", "bank-f64"])
def test_ragged_shapes_and_wrap_around(B, M, fill, memory_dtype, ops, device, dtype):
    D = 1 + (B + M) % 70
    m = state.to(state.filled(M, D, int(fill * M), memory_dtype, pending=fill != 0), device)
    z = torch.randn(B, D, dtype=dtype, device=device)
    slots = same(ops, m, z, torch.arange(B, device=device) - 5)
    assert (slots >= 0).sum() == min(B, M)
    rows = slots >= 0
    torch.testing.assert_close(
        (m.bank.double() * m.scale + m.shift)[slots[rows]], z[rows].double(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("B, M", [(7, 65), (64, 65), (65, 64), (257, 63)])
def test_ids_and_steps(B, M, ops, device, dtype):
    m = state.to(state.filled(M, 5, M // 2), device)
    m.bank_ids.copy_(torch.arange(M) + 1000), m.bank_steps.fill_(3)
    truth = state.clone(m)
    z, labels = torch.randn(B, 5, dtype=dtype, device=device), torch.arange(B, device=device)
    z[1, 0] = torch.nan
    mask = torch.rand(B, device=device) < 0.8
    for t, ids in enumerate([torch.randint(-3, 9, (B,), device=device), None]):
        step = torch.tensor(17 + t, device=device)
        for module, memory in ((ops, m), (reference, truth)):
            more = {"bank_ids": memory.bank_ids, "ids": ids, "bank_steps": memory.bank_steps, "step": step}
            slots = enqueue(module, memory, z, labels, mask, **more)
        assert torch.equal(m.bank_ids, truth.bank_ids) and torch.equal(m.bank_steps, truth.bank_steps)
        stored = slots >= 0
        assert (m.bank_steps[slots[stored]] == step).all()
        want = -2 - slots if ids is None else torch.where(ids >= 0, ids, -2 - slots)
        assert torch.equal(m.bank_ids[slots[stored]], want[stored])
    negative = m.bank_ids[m.bank_ids < 0]
    assert negative.unique().numel() == negative.numel(), "no two rows share the id of none"


def test_mask_and_rows_that_are_not_finite(ops, device, dtype):
    m = state.to(state.filled(20, 5, 13), device)
    z = torch.randn(9, 5, dtype=dtype, device=device)
    z[1, 0], z[2, 4], z[3, 2] = torch.nan, torch.inf, -torch.inf
    mask = torch.tensor([1, 1, 1, 1, 0, 1, 0, 1, 1], dtype=torch.bool, device=device)
    slots = same(ops, m, z, torch.arange(9, device=device), mask)
    assert slots.tolist() == [13, -1, -1, -1, -1, 14, -1, 15, 16]
    assert m.bank.isfinite().all() and m.sums.isfinite().all()


def test_a_row_that_overflows_the_bank_stays_out(ops, device):
    m = state.to(state.filled(8, 3, 4), device)
    z = torch.ones(2, 3, dtype=torch.float64, device=device)
    z[0, 1] = 1e300
    assert same(ops, m, z, torch.zeros(2, dtype=torch.int64, device=device)).tolist() == [-1, 4]


def test_non_contiguous(ops, device, dtype):
    m = state.to(state.filled(20, 5, 13), device)
    same(ops, m, torch.randn(5, 9, dtype=dtype, device=device).T, torch.arange(18, device=device)[::2])


def test_sums_stay_exact_over_many_wraps(ops, device):
    m = state.to(reference.Memory.empty(64, 7, torch.float32), device)
    for _ in range(2000):
        enqueue(ops, m, torch.randn(17, 7, device=device) + 3, torch.zeros(17, dtype=torch.int64, device=device))
    torch.testing.assert_close(m.sums, reference.sums_of(m.bank), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("M", [700, 3000])
@pytest.mark.parametrize("D", [5, 12])
def test_more_rows_than_are_looked_at_at_once(M, D, ops, device):
    m = state.to(state.filled(M, D, 500, pending=True), device)
    z = torch.randn(2100, D, device=device)
    z[::3, 1] = torch.inf
    z[1024:1100] = torch.nan
    mask = torch.rand(2100, device=device) < 0.9
    slots = same(ops, m, z, torch.arange(2100, device=device), mask)
    assert (slots >= 0).sum() == min(M, (mask & z.isfinite().all(1)).sum())


@pytest.mark.parametrize("D", [5, 12])
@pytest.mark.parametrize("memory_dtype", MEMORY_DTYPES, ids=str)
def test_rows_are_stored_as_a_division_rounds_them(memory_dtype, D, ops, device, dtype):
    m = state.to(state.filled(500, D, 0, memory_dtype, pending=True), device)
    m.shift[0] = 0
    z = torch.randn(400, D, dtype=dtype, device=device)
    z[:9, 0] = -0.0
    enqueue(ops, m, z, torch.arange(400, device=device))
    u = (z.double() - m.shift) / m.scale
    assert torch.equal(m.bank[:400], u.to(compute_dtype(memory_dtype)).to(memory_dtype))
    assert m.bank[:9, 0].signbit().all()


def test_slots_beyond_what_32_bits_count(ops, device, dtype, tmp_path):
    """A full ring of slightly more than 2^31 rows, in sparse files: only what is written takes room."""
    M, D, B = 2**31 + 50, 3, 20
    if str(device) != "cpu":
        pytest.skip("the files are in the host's memory")

    def of_file(name, rows, dtype):
        return torch.from_file(str(tmp_path / name), shared=True, size=rows, dtype=dtype)

    m = reference.Memory.empty(1, D, torch.float16)
    m.bank = of_file("bank", M * D, torch.float16).view(M, D)
    for name in ("bank_labels", "bank_ids", "bank_steps"):
        setattr(m, name, of_file(name, M, torch.int64))
    m.head.fill_(M - 7), m.count.fill_(M), m.step.fill_(5)
    m.bank[M - 7 :] = 2  # which leave
    m.sums[0], m.sums[1] = 14, 28
    z = torch.randn(B, D, dtype=dtype)
    slots = enqueue(ops, m, z, torch.arange(B) + 1, bank_ids=m.bank_ids, bank_steps=m.bank_steps, step=m.step)
    assert slots.tolist() == [*range(M - 7, M), *range(B - 7)]
    assert m.head == B - 7 and m.count == M
    assert torch.equal(m.bank[slots], z.half()) and torch.equal(m.bank_labels[slots], torch.arange(B) + 1)
    assert torch.equal(m.bank_ids[slots], -2 - slots) and (m.bank_steps[slots] == 5).all()
    assert not m.bank[M - 8].any() and not m.bank[B - 7].any() and m.bank_labels[M - 8] == 0
    torch.testing.assert_close(m.sums[0], z.half().double().sum(0), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("B, M, fill", [(5, 37, 0), (5, 37, 35), (30, 37, 37), (80, 37, 37), (3, 37, 18), (0, 37, 9)])
def test_a_ring_in_parts(B, M, fill, parts, ops, device, dtype):
    """Each writes what goes into it, and its sums: together they are the ring."""
    whole = state.to(state.filled(M, 5, fill, pending=True), device)
    sizes = [len(rows) for rows in torch.arange(M).tensor_split([*range(6, M, 6)] if parts == 7 else parts)]
    truth, change = state.clone(whole), torch.zeros_like(whole.sums)
    z, labels = torch.randn(B, 5, dtype=dtype, device=device), torch.arange(B, device=device)
    mask, ids = torch.rand(B, device=device) < 0.9, torch.arange(B, device=device) - 2
    z[1:2, 0] = torch.inf

    def store(module, m, **more):
        its = {"bank_ids": m.bank_ids, "ids": ids, "bank_steps": m.bank_steps, "step": m.step + 3}
        return enqueue(module, m, z, labels, mask, **its, **more)

    slots = store(ops, truth)
    first = 0
    for rows in sizes:
        part = state.clone(whole)
        for name in ("bank", "bank_labels", "bank_ids", "bank_steps"):
            setattr(part, name, getattr(whole, name)[first : first + rows])  # a view: the ring is put together in place
        part.sums.zero_()
        by_reference = state.clone(part)
        assert torch.equal(store(ops, part, first=first, ring_size=M), slots)
        assert part.head == truth.head and part.count == truth.count
        assert torch.equal(store(reference, by_reference, first=first, ring_size=M), slots)
        state.assert_same_state(part, by_reference, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=1e-6)
        change += part.sums
        first += rows
    for name in ("bank", "bank_labels", "bank_ids", "bank_steps"):
        assert torch.equal(getattr(whole, name), getattr(truth, name)), name
    torch.testing.assert_close(whole.sums + change, truth.sums, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("first", [2**31 - 20, 10**9 - 20, 2**40 - 20])
def test_a_block_far_along_a_ring(first, ops, device, dtype):
    """Of a billion slots and more: what is stored here begins in the block before and ends in the next."""
    rows, B, size = 30, 50, 2**40 + 100
    m = state.to(state.filled(rows, 5, 0), device)
    m.head.fill_(first - 10), m.count.fill_(size)
    z, labels = torch.randn(B, 5, dtype=dtype, device=device), torch.arange(B, device=device)
    its = {"bank_ids": m.bank_ids, "bank_steps": m.bank_steps, "step": m.step + 3}
    slots = enqueue(ops, m, z, labels, first=first, ring_size=size, **its)
    assert torch.equal(slots, torch.arange(first - 10, first + 40, device=device))
    assert m.head == first + 40 and m.count == size
    assert torch.equal(m.bank, z[10:40].float()) and torch.equal(m.bank_labels, labels[10:40])
    assert torch.equal(m.bank_ids, -2 - slots[10:40]) and (m.bank_steps == 3).all()
