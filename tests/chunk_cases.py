"""Batches, comparisons and losses for the tests of `InChunks`."""

import torch
import torch.nn.functional as F
from torch import nn

B, M, D = 11, 60, 8


def rows(n):
    return F.normalize(torch.randn(n, D, dtype=torch.float64)), torch.randint(5, (n,))


def compare(loss, value, z, expected, again):
    """Values, and gradients by the embeddings and by what the loss learns."""
    learned = list(loss.parameters())
    of_z, *own = torch.autograd.grad(value, [z, *learned])
    its, *theirs = torch.autograd.grad(expected, [again, *learned], retain_graph=True)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(of_z, its, rtol=1e-9, atol=1e-12)
    for a, b in zip(own, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


class Own(nn.Module):
    """No loss of pytorch-metric-learning, but called like one."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, embeddings, labels, indices_tuple=None, ref_emb=None, ref_labels=None):
        if ref_emb is None:
            ref_emb = embeddings
        return F.softplus(self.scale * embeddings @ ref_emb.T).mean()


class Around(nn.Module):
    """Calls another loss."""

    def __init__(self, loss):
        super().__init__()
        self.inner = loss

    def forward(self, *args):
        return self.inner(*args)
