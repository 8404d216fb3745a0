"""ops.enqueue_ against a plain queue."""

import collections

import pytest
import state
import torch

from xbn_ext import reference

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(M=st.integers(1, 12), sizes=st.lists(st.integers(0, 30), max_size=12))
def test_behaves_like_a_queue(M, sizes, ops, device):
    m = state.to(reference.Memory.empty(M, 1, torch.float32), device)
    queue = collections.deque(maxlen=M)
    i = 0
    for B in sizes:
        labels = torch.arange(i, i + B, device=device)
        i += B
        slots = ops.enqueue_(
            m.bank, m.bank_labels, m.sums, m.head, m.count, labels[:, None].float(), labels, None, m.scale, m.shift
        )
        queue.extend(labels.tolist())
        assert m.count == len(queue)
        oldest_first = [(int(m.head) - len(queue) + k) % M for k in range(len(queue))]
        assert m.bank_labels[oldest_first].tolist() == m.bank[oldest_first, 0].tolist() == list(queue)
        kept = slots >= 0
        assert torch.equal(m.bank_labels[slots[kept]], labels[kept])
