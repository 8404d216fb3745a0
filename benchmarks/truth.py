"""What a kernel returns, against xbn_ext.reference in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from xbn_ext import reference
from xbn_ext.testing import error

from .comparisons import THEIRS
from .implementations import filled, make
from .problem import Problem
from .torch_memory import EMA_MOMENTUM, MEASUREMENT_NOISE, PROCESS_NOISE


def errors(problem: Problem, names: list[str]) -> dict[str, float]:
    """By implementation the largest relative error of anything that its first call returns. Of a gradient, the part
    across x: a step of this library and pytorch-metric-learning normalise what they are given, which drops the part
    along x.
    """
    x, labels = problem.embeddings(problem.batch, seed=5)
    truths: dict[bool, tuple[Tensor, ...]] = {}
    result = {}
    for name in names:
        alone = problem.kernel == "step" and name == THEIRS
        if alone not in truths:
            truths[alone] = _truth(problem, alone, x.cpu(), labels.cpu())
        results = [t.cpu() for t in make(name, problem)(x, labels)]
        if problem.kernel in ("loss", "step"):
            results[1] = _tangent(results[1], x.cpu())
        result[name] = max(error(result, truth) for result, truth in zip(results, truths[alone], strict=True))
    return result


def _truth(problem: Problem, alone: bool, x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """`alone`: a step as pytorch-metric-learning has it, which stores the batch, and ranks it against the memory."""
    memory = filled(problem, torch.float64)
    for key, t in vars(memory).items():
        setattr(memory, key, t.cpu())
    z = x.to(torch.float64, copy=True).requires_grad_()
    if problem.kernel == "moments":
        return reference.moments(z.detach())[:2]
    if problem.kernel == "transform":
        reference.transform_(memory.bank, memory.sums, memory.scale, memory.shift, memory.count)
        return (memory.bank,)
    if problem.kernel == "enqueue":
        reference.enqueue_(
            memory.bank, memory.bank_labels, memory.sums, memory.head, memory.count, z.detach(), labels, None,
            memory.scale, memory.shift,
        )  # fmt: skip
        return memory.bank, memory.bank_labels
    if problem.kernel == "loss":
        loss = reference.memory_loss(z, labels, memory.bank, memory.bank_labels, problem.pair_loss)
    else:
        loss = reference.step(
            memory, z, labels, problem.pair_loss,
            drift="none" if alone else problem.drift,
            process_noise=PROCESS_NOISE, measurement_noise=MEASUREMENT_NOISE, ema_momentum=EMA_MOMENTUM,
            normalize_embeddings=False, batch_weight=0.0 if alone else 1.0, enqueue="before" if alone else "after",
        )  # fmt: skip
    (grad,) = torch.autograd.grad(loss, z)
    return loss.detach(), _tangent(grad, x)


def _tangent(grad: Tensor, x: Tensor) -> Tensor:
    grad, x = grad.double(), x.double()
    return grad - (grad * x).sum(1, keepdim=True) * x
