"""Batches that drift, a loss of each way that a step may go, and steps, for the tests of CrossBatchMemory."""

import dataclasses

import torch
from own_losses import Exponents
from torch import nn

from xbn_ext import Contrastive, SigLIP, SmoothAP, SupCon, reference

B, M, D = 24, 100, 16

STATE = [f.name for f in dataclasses.fields(reference.Memory)]

X, Y = torch.randn(B, D), torch.arange(B)

OF_EACH_WAY = {
    "one op": lambda: Contrastive(0.95, 0.3),
    "a learned temperature": lambda: SupCon(nn.Parameter(torch.tensor(0.2, dtype=torch.float64))),
    "a temperature that is a tensor": lambda: SupCon(torch.tensor(0.2, dtype=torch.float64)),
    "a learned bias": lambda: SigLIP(bias=nn.Parameter(torch.tensor(-3.0, dtype=torch.float64))),
    "of one's own": Exponents,
    "in chunks": SmoothAP,
}


def batches(n, dtype=torch.float32, size=B, device="cpu"):
    """Embeddings of a network that drifts."""
    generator = torch.Generator().manual_seed(7)
    centres = torch.randn(6, D, generator=generator)
    for t in range(n):
        labels = torch.randint(6, (size,), generator=generator)
        x = centres[labels] + torch.randn(size, D, generator=generator)
        x = x * (1 + 0.02 * t) + 0.05 * t
        yield x.to(dtype).to(device), labels.to(device)


def memory_of(criterion):
    return reference.Memory(**{name: getattr(criterion, name) for name in STATE})


def train(criterion, data, **call):
    losses = []
    for x, labels in data:
        x = x.clone().requires_grad_()
        loss = criterion(x, labels, **call)
        loss.backward()
        losses.append((loss.detach(), x.grad))
    return losses
