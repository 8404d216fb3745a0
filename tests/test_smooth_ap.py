"""`SmoothAP` against its formula, pair by pair."""

import pytest
import torch
import torch.nn.functional as F
from chunk_cases import B, D, M, compare, rows

from xbn_ext import CrossBatchMemory, SmoothAP, ops


def smooth_ap(s, positive, temperature):
    """Of similarities [B, n], pair by pair."""
    costs = []
    for i in range(len(s)):
        ratios = []
        for p in positive[i].nonzero()[:, 0].tolist():
            ranks = [1.0, 1.0]
            for j in range(s.shape[1]):
                if j != p and s[i, j].isfinite():
                    ahead = torch.sigmoid((s[i, j] - s[i, p]) / temperature)
                    ranks = [ranks[0] + ahead * positive[i, j], ranks[1] + ahead]
            ratios.append(ranks[0] / ranks[1])
        if ratios:
            costs.append(1 - torch.stack(ratios).mean())
    return torch.stack(costs).mean()


def test_smooth_average_precision():
    loss = SmoothAP(temperature=0.3)
    (z, labels), (bank, of_bank) = rows(B), rows(M)
    labels[0] = 7  # no other row is of this class
    z, again = z.requires_grad_(), z.detach().clone().requires_grad_()
    value = ops.memory_loss(z, labels, bank, of_bank, loss)
    unit = F.normalize(again)
    compare(loss, value, z, smooth_ap(unit @ bank.T, labels[:, None] == of_bank, 0.3), again)
    s = (unit @ unit.T).masked_fill(torch.eye(B, dtype=torch.bool), torch.inf)
    same = (labels[:, None] == labels) & ~torch.eye(B, dtype=torch.bool)
    compare(loss, ops.batch_loss(z, labels, loss), z, smooth_ap(s, same, 0.3), again)
    memory = CrossBatchMemory(SmoothAP(), D, 50)
    for _ in range(2):
        x, labels = torch.randn(20, D, requires_grad=True), torch.randint(5, (20,))
        with torch.device("meta"):  # another default device
            value = memory(x, labels)
        value.backward()
    with pytest.raises(ValueError, match="temperature must be"):
        SmoothAP(0)


def test_it_says_what_it_is():
    assert "anchors=8" in repr(SmoothAP(0.05)) and "temperature=0.05" in repr(SmoothAP(0.05))
