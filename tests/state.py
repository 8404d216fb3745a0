"""Memories for tests: `reference.Memory` objects filled with something, and copies of them."""

import dataclasses

import torch

from xbn_ext import reference
from xbn_ext.dtypes import MEMORY_DTYPES, compute_dtype, is_narrow

NARROW_DTYPES = [dtype for dtype in MEMORY_DTYPES if is_narrow(dtype)]


def clone(m, memory_dtype=None):
    copy = reference.Memory(**{f.name: getattr(m, f.name).clone() for f in dataclasses.fields(m)})
    if memory_dtype is not None:
        copy.bank = copy.bank.to(memory_dtype)
    return copy


def to(m, device):
    return reference.Memory(**{f.name: getattr(m, f.name).to(device) for f in dataclasses.fields(m)})


def filled(M, D, count, dtype=torch.float32, pending=False):
    """A ring with `count` rows (head where a ring that wrapped would have it), perhaps with a pending map."""
    m = reference.Memory.empty(M, D, dtype)
    wide = compute_dtype(dtype)  # torch draws no numbers of fewer than 16 bits
    rows = torch.randn(count, D, dtype=wide) * (0.5 + torch.rand(D, dtype=wide)) + torch.randn(D, dtype=wide)
    m.bank[:count] = rows
    m.bank_labels[:count] = torch.randint(-3, 8, (count,))
    m.count.fill_(count)
    m.head.fill_(count % M if count < M else M // 3)
    m.sums.copy_(reference.sums_of(m.bank[:count]))
    if pending:
        m.scale.copy_(0.5 + torch.rand(D))
        m.shift.copy_(torch.randn(D))
    return m


def assert_same_state(a, b, rtol=1e-12, atol=1e-12):
    for f in dataclasses.fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, n=f.name: f"{n}: {m}")
