"""The same step in several ways. Each is a factory: problem -> function of a batch, returning (loss, dLoss/dz).

`eager` is the method as one would first write it; `eager-tuned` updates in place with the fewest passes and no
second copy of the bank; `compile` is torch.compile of that; the last two are this library.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import Contrastive
from ..memory import CrossBatchMemory
from .problem import Problem

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

PROCESS_NOISE, MEASUREMENT_NOISE, EPS = 1e-2, 1.0, 1e-6


def kalman(z: Tensor, mean: Tensor, std: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Kalman step on the moments of the batch: filtered mean and std, variance."""
    batch_std, batch_mean = torch.std_mean(z, 0, correction=0)
    prior = variance + PROCESS_NOISE
    gain = prior / (prior + MEASUREMENT_NOISE)
    return mean + gain * (batch_mean - mean), std + gain * (batch_std - std), (1 - gain) * prior


class TorchStep:
    """Shared state of the PyTorch baselines: bank, ring position, Kalman filter. All tensors, no host sync."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.bank, self.labels = problem.embeddings(problem.memory, seed=1)
        self.head = torch.zeros((), dtype=torch.int64)
        self.mean, self.std = self.bank.mean(0), self.bank.std(0, correction=0)
        self.variance = torch.zeros(())

    def target(self, z: Tensor) -> tuple[Tensor, Tensor]:
        self.mean, self.std, self.variance = kalman(z, self.mean, self.std, self.variance)
        return self.mean, self.std

    def pair_loss(self, s: Tensor, positive: Tensor) -> Tensor:
        return torch.where(positive, 1 - s, s - self.problem.neg_margin).relu().sum() / len(s)

    def batch_loss(self, z: Tensor, labels: Tensor) -> Tensor:
        s = torch.where(torch.eye(len(z), dtype=torch.bool), self.problem.neg_margin, z @ z.T)
        positive = (labels[:, None] == labels[None, :]) & ~torch.eye(len(z), dtype=torch.bool)
        return self.pair_loss(s, positive)

    def enqueue(self, z: Tensor, labels: Tensor) -> None:
        slots = (self.head + torch.arange(len(z))) % self.problem.memory
        self.bank.index_copy_(0, slots, z)
        self.labels.index_copy_(0, slots, labels)
        self.head = (self.head + len(z)) % self.problem.memory


class Eager(TorchStep):
    def __call__(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        z = x.clone().requires_grad_()
        mean, std = self.target(x)
        standardised = (self.bank - self.bank.mean(0)) / self.bank.std(0, correction=0)
        self.bank.copy_(standardised * std + mean)
        s = z @ F.normalize(self.bank, dim=1).T
        positive = labels[:, None] == self.labels[None, :]
        pos = (F.relu(1 - s) * positive).sum() / len(z)
        neg = (F.relu(s - self.problem.neg_margin) * ~positive).sum() / len(z)
        loss = pos + neg + self.batch_loss(z, labels)
        (grad,) = torch.autograd.grad(loss, z)
        self.enqueue(x, labels)
        return loss.detach(), grad


class EagerTuned(TorchStep):
    def loss(self, z: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        mean, std = self.target(x)
        bank_std, bank_mean = torch.std_mean(self.bank, 0, correction=0)
        scale = std / bank_std.clamp(min=EPS)
        torch.addcmul(mean - scale * bank_mean, self.bank, scale, out=self.bank)
        norm = torch.linalg.vector_norm(self.bank, dim=1).clamp_(min=EPS)
        s = (z @ self.bank.T) / norm
        positive = labels[:, None] == self.labels[None, :]
        return self.pair_loss(s, positive) + self.batch_loss(z, labels)

    def __call__(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        z = x.clone().requires_grad_()
        loss = self.loss(z, x, labels)
        (grad,) = torch.autograd.grad(loss, z)
        self.enqueue(x, labels)
        return loss.detach(), grad


class Compiled(EagerTuned):
    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.compiled = torch.compile(self.pure_loss, dynamic=False)

    def pure_loss(self, z: Tensor, x: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, mean: Tensor,
                  std: Tensor, variance: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
        """EagerTuned.loss without attributes, so that the compiler sees one graph."""
        mean, std, variance = kalman(x, mean, std, variance)
        bank_std, bank_mean = torch.std_mean(bank, 0, correction=0)
        scale = std / bank_std.clamp(min=EPS)
        bank.mul_(scale).add_(mean - scale * bank_mean)
        s = (z @ bank.T) / torch.linalg.vector_norm(bank, dim=1).clamp(min=EPS)
        positive = labels[:, None] == bank_labels[None, :]
        return self.pair_loss(s, positive) + self.batch_loss(z, labels), mean, std, variance

    def loss(self, z: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        value, self.mean, self.std, self.variance = self.compiled(
            z, x, labels, self.bank, self.labels, self.mean, self.std, self.variance
        )
        return value


class Ours:
    """`CrossBatchMemory`, its memory filled with the same rows as the others'."""

    def __init__(self, problem: Problem, update: str) -> None:
        self.criterion = CrossBatchMemory(
            Contrastive(neg_margin=problem.neg_margin),
            problem.dim,
            problem.memory,
            drift="axbn",
            process_noise=PROCESS_NOISE,
            measurement_noise=MEASUREMENT_NOISE,
            update="deferred" if update == "deferred" else "inplace",
        )
        self.criterion.fill_from([problem.embeddings(problem.memory, seed=1)])

    def __call__(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        z = x.clone().requires_grad_()
        loss = self.criterion(z, labels)
        (grad,) = torch.autograd.grad(loss, z)
        return loss.detach(), grad


IMPLEMENTATIONS: dict[str, Callable[[Problem], Step]] = {
    "xbn_ext": lambda problem: Ours(problem, "inplace"),
    "xbn_ext deferred": lambda problem: Ours(problem, "deferred"),
    "eager-tuned": EagerTuned,
    "compile": Compiled,
    "eager": Eager,
}
