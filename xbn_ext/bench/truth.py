"""Every implementation's first step against the float64 reference."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..losses import Contrastive
from ..testing import error
from .baselines import IMPLEMENTATIONS, MEASUREMENT_NOISE, PROCESS_NOISE
from .problem import Problem


def errors(problem: Problem, names: list[str]) -> dict[str, float]:
    """Relative error of the loss and of dLoss/dz, the larger of the two, by implementation."""
    x, labels = problem.embeddings(problem.batch, seed=5)
    value, grad = _truth(problem, x, labels)
    result = {}
    for name in names:
        ours, our_grad = IMPLEMENTATIONS[name](problem)(x, labels)
        result[name] = max(error(ours, value), error(_tangent(our_grad, x), grad))
    return result


def _truth(problem: Problem, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    memory = reference.Memory.empty(problem.memory, problem.dim)
    bank, bank_labels = problem.embeddings(problem.memory, seed=1)
    memory.bank.copy_(bank)
    memory.bank_labels.copy_(bank_labels)
    memory.count.fill_(problem.memory)
    memory.sums.copy_(reference.sums_of(memory.bank))
    mean, std, _ = reference.moments(memory.bank)
    memory.target_mean.copy_(mean)
    memory.target_std.copy_(std)
    memory.variance.zero_()
    z = x.double().requires_grad_()
    value = reference.step(
        memory,
        z,
        labels,
        Contrastive(neg_margin=problem.neg_margin),
        process_noise=PROCESS_NOISE,
        measurement_noise=MEASUREMENT_NOISE,
        normalize_embeddings=False,
    )
    (grad,) = torch.autograd.grad(value, z)
    return value.detach(), _tangent(grad, x)


def _tangent(grad: Tensor, x: Tensor) -> Tensor:
    """Without the part along x: this library normalises its input, which drops that; the baselines do not."""
    grad, x = grad.double(), x.double()
    return grad - (grad * x).sum(1, keepdim=True) * x
