"""The same mathematics in plain PyTorch, on any device: what the kernels are measured against.

State is written in place, so that a step can be captured into a CUDA graph and replayed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xbn_ext.bench.baselines import EPS, MEASUREMENT_NOISE, PROCESS_NOISE


def pair_loss(s: Tensor, positive: Tensor, neg_margin: float) -> Tensor:
    return torch.where(positive, 1 - s, s - neg_margin).relu().sum() / len(s)


def memory_loss(z: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, neg_margin: float) -> Tensor:
    """Tuned: the norms divide the similarities, so that no second bank is made."""
    norm = torch.linalg.vector_norm(bank, dim=1).clamp_(min=EPS)
    return pair_loss((z @ bank.T) / norm, labels[:, None] == bank_labels[None, :], neg_margin)


def batch_loss(z: Tensor, labels: Tensor, neg_margin: float) -> Tensor:
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    s = torch.where(own, neg_margin, z @ z.T)
    return pair_loss(s, (labels[:, None] == labels[None, :]) & ~own, neg_margin)


class TorchMemory:
    """Bank, ring position and Kalman filter, for the steps below."""

    def __init__(self, bank: Tensor, labels: Tensor, neg_margin: float) -> None:
        self.bank, self.labels, self.neg_margin = bank, labels, neg_margin
        self.head = torch.zeros((), dtype=torch.int64, device=bank.device)
        self.std, self.mean = torch.std_mean(bank, 0, correction=0)
        self.variance = torch.zeros((), device=bank.device)

    def track(self, z: Tensor) -> None:
        batch_std, batch_mean = torch.std_mean(z, 0, correction=0)
        prior = self.variance + PROCESS_NOISE
        gain = prior / (prior + MEASUREMENT_NOISE)
        self.mean.lerp_(batch_mean, gain)
        self.std.lerp_(batch_std, gain)
        self.variance.copy_((1 - gain) * prior)

    def transform(self) -> None:
        """Fewest passes: one for the moments, one to read and write."""
        std, mean = torch.std_mean(self.bank, 0, correction=0)
        scale = self.std / std.clamp(min=EPS)
        torch.addcmul(self.mean - scale * mean, self.bank, scale, out=self.bank)

    def enqueue(self, z: Tensor, labels: Tensor) -> None:
        slots = (self.head + torch.arange(len(z), device=z.device)) % len(self.bank)
        self.bank.index_copy_(0, slots, z)
        self.labels.index_copy_(0, slots, labels)
        self.head.add_(len(z)).remainder_(len(self.bank))

    def loss(self, z: Tensor, labels: Tensor) -> Tensor:
        self.transform()
        return memory_loss(z, labels, self.bank, self.labels, self.neg_margin) + batch_loss(z, labels, self.neg_margin)

    def __call__(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One step: loss and its gradient."""
        z = x.clone().requires_grad_()
        self.track(x)
        loss = self.loss(z, labels)
        (grad,) = torch.autograd.grad(loss, z)
        self.enqueue(x, labels)
        return loss.detach(), grad


class Eager(TorchMemory):
    """The method as one would first write it."""

    def loss(self, z: Tensor, labels: Tensor) -> Tensor:
        standardised = (self.bank - self.bank.mean(0)) / self.bank.std(0, correction=0)
        self.bank.copy_(standardised * self.std + self.mean)
        s = z @ F.normalize(self.bank, dim=1).T
        positive = labels[:, None] == self.labels[None, :]
        pos = (F.relu(1 - s) * positive).sum() / len(z)
        neg = (F.relu(s - self.neg_margin) * ~positive).sum() / len(z)
        return pos + neg + batch_loss(z, labels, self.neg_margin)


class Compiled(TorchMemory):
    """torch.compile of the tuned step's loss, transform included."""

    def __init__(self, bank: Tensor, labels: Tensor, neg_margin: float) -> None:
        super().__init__(bank, labels, neg_margin)
        self.compiled = torch.compile(_transform_and_loss, dynamic=False)

    def loss(self, z: Tensor, labels: Tensor) -> Tensor:
        return self.compiled(z, labels, self.bank, self.labels, self.mean, self.std, self.neg_margin)


def _transform_and_loss(z: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, target_mean: Tensor,
                        target_std: Tensor, neg_margin: float) -> Tensor:  # fmt: skip
    std, mean = torch.std_mean(bank, 0, correction=0)
    scale = target_std / std.clamp(min=EPS)
    bank.mul_(scale).add_(target_mean - scale * mean)
    return memory_loss(z, labels, bank, bank_labels, neg_margin) + batch_loss(z, labels, neg_margin)
