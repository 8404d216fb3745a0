"""The memory in plain PyTorch, as a user would write it: what this library is compared with.

On any device. All state is tensors that are written in place, and nothing waits for the device, except the losses in
dense.py and chunked.py that need the indices of their positives: a step can be captured in a CUDA graph.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xbn_ext.dtypes import compute_dtype
from xbn_ext.filter import Drift, make_filter
from xbn_ext.losses import Circle, MultiSimilarity, NTXent, PairLoss
from xbn_ext.reference import batch_loss
from xbn_ext.reference.losses import pair_loss

from .chunked import chunked_loss
from .dense import dense_loss

PROCESS_NOISE, MEASUREMENT_NOISE, EMA_MOMENTUM, EPS = 1e-2, 1.0, 0.1, 1e-6


def differentiated(loss: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and dLoss/dx. The leaf is new each time, since autograd ties a leaf to the stream of its first use."""
    z = x.detach().requires_grad_()
    value = loss(z)
    (grad,) = torch.autograd.grad(value, z)
    return value.detach(), grad


class TorchMemory:
    """Tuned: in place, with the fewest passes over the bank and no second bank.

    `bank [M, D]` and `bank_labels [M]` are taken over and written; `target` is the mean and the std `[D]` that the
    filter starts from, those of the bank if None.
    """

    def __init__(
        self,
        bank: Tensor,
        bank_labels: Tensor,
        loss: PairLoss,
        drift: Drift = "axbn",
        target: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.bank, self.labels, self.pair_loss = bank, bank_labels, loss
        self.compute = compute_dtype(bank.dtype)
        self.filter = make_filter(drift, PROCESS_NOISE, MEASUREMENT_NOISE, EMA_MOMENTUM)
        self.mean, self.std = target or self.bank_moments()
        self.variance = torch.zeros((), dtype=self.compute, device=bank.device)
        self.head = torch.zeros((), dtype=torch.int64, device=bank.device)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std `[D]` of a batch."""
        std, mean = torch.std_mean(x, 0, correction=0)
        return mean, std

    def track(self, x: Tensor) -> None:
        """The filter's step on the moments of the batch."""
        if self.filter is None:
            return
        mean, std = self.moments(x)
        assert self.filter.process_noise is not None, "written for fixed noises"
        if math.isinf(self.filter.process_noise):
            gain: float | Tensor = 1.0
        elif self.filter.fixed_gain is not None:
            gain = self.filter.fixed_gain
        else:
            prior = self.variance + self.filter.process_noise
            gain = prior / (prior + self.filter.measurement_noise)
            self.variance.copy_(gain * self.filter.measurement_noise)
        self.mean.lerp_(mean, gain)
        self.std.lerp_(std, gain)

    def bank_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and std `[D]` of the bank, in one call. On a CPU it takes most of a step: see `Chunked`."""
        std, mean = torch.std_mean(self.bank.to(self.compute), 0, correction=0)
        return mean, std

    def transform(self) -> None:
        """Moves the bank to the filter's moments."""
        mean, std = self.bank_moments()
        scale = self.std / std.clamp(min=EPS)
        shift = self.mean - scale * mean
        if self.bank.dtype == self.compute:
            torch.addcmul(shift, self.bank, scale, out=self.bank)
        else:
            self.bank.copy_(torch.addcmul(shift, self.bank.to(self.compute), scale))

    def enqueue(self, x: Tensor, labels: Tensor) -> None:
        """Stores every row of the batch, finite or not."""
        slots = (self.head + torch.arange(len(x), device=x.device)) % len(self.bank)
        self.bank.index_copy_(0, slots, x.to(self.bank.dtype))
        self.labels.index_copy_(0, slots, labels)
        self.head.add_(len(x)).remainder_(len(self.bank))

    def memory_loss(self, z: Tensor, labels: Tensor) -> Tensor:
        """The norms divide the similarities, so that no second bank is made."""
        bank = self.bank.to(self.compute)
        norm = torch.linalg.vector_norm(bank, dim=1).clamp_(min=EPS)
        return dense_loss(self.pair_loss, (z @ bank.T).div_(norm), labels[:, None] == self.labels)

    def rank(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss against the bank, and its gradient `[B, D]`."""
        return differentiated(lambda z: self.memory_loss(z, labels), x)

    def moved_rank(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Moves the bank; loss against it and of the batch against itself, and the gradient `[B, D]`."""
        if self.filter is not None:
            self.transform()
        return differentiated(lambda z: self.memory_loss(z, labels) + batch_loss(z, labels, self.pair_loss), x)

    def step(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One training step: loss and gradient `[B, D]`."""
        self.track(x)
        result = self.moved_rank(x, labels)
        self.enqueue(x, labels)
        return result


class Eager(TorchMemory):
    """As one would first write it, from the papers' formulas."""

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean(0), x.std(0, correction=0)

    def transform(self) -> None:
        bank = self.bank.to(self.compute)
        standardised = (bank - bank.mean(0)) / bank.std(0, correction=0)
        self.bank.copy_(standardised * self.std + self.mean)

    def enqueue(self, x: Tensor, labels: Tensor) -> None:
        slots = (self.head + torch.arange(len(x), device=x.device)) % len(self.bank)
        self.bank[slots] = x.to(self.bank.dtype)
        self.labels[slots] = labels
        self.head.copy_((self.head + len(x)) % len(self.bank))

    def memory_loss(self, z: Tensor, labels: Tensor) -> Tensor:
        s = z @ F.normalize(self.bank.to(self.compute), dim=1).T
        positive = labels[:, None] == self.labels[None, :]
        return pair_loss(self.pair_loss, s, positive, torch.ones_like(positive))


class Compiled(TorchMemory):
    """torch.compile of what is tuned, transform and loss apart: in one graph, the moved bank would be a copy.

    Of the losses that go through the indices of their positives, which break a graph, the formulas as first written are
    compiled where that is faster: their masks are fused.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        logging.getLogger("torch._dynamo").setLevel(logging.ERROR)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _compiled_moments(x)

    def transform(self) -> None:
        _compiled_transform(self.bank, self.mean, self.std)

    def memory_loss(self, z: Tensor, labels: Tensor) -> Tensor:
        return _compiled_loss(self.pair_loss, z, labels, self.bank, self.labels)


class Chunked(TorchMemory):
    """Tuned, a chunk of the bank at a time: its moments, and the loss with its gradient in closed form."""

    def bank_moments(self) -> tuple[Tensor, Tensor]:
        """On a CPU, torch.std_mean over rows takes 20 times as long as these sums do."""
        if self.bank.device.type != "cpu":
            return super().bank_moments()
        sums = torch.zeros(2, self.bank.shape[1], dtype=self.compute)
        for rows in self.bank.split(2048):
            rows = rows.to(self.compute)
            sums[0] += rows.sum(0)
            sums[1] += (rows * rows).sum(0)
        mean, mean_square = sums / len(self.bank)
        return mean, (mean_square - mean * mean).clamp_(min=0).sqrt_()

    def rank(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return chunked_loss(self.pair_loss, x, labels, self.bank, self.labels, rows=self.rows(len(x)), eps=EPS)

    def rows(self, B: int) -> int:
        """Of a chunk: what is fastest on a CPU, so that it stays in the caches; similarities of 24 MB on CUDA."""
        return 1024 * torch.get_num_threads() if self.bank.device.type == "cpu" else max(1024, 6_000_000 // B)

    def moved_rank(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.filter is not None:
            self.transform()
        loss, grad = self.rank(x, labels)
        own, own_grad = differentiated(lambda z: batch_loss(z, labels, self.pair_loss), x)
        return loss + own, grad.add_(own_grad)


# --- What is compiled: functions of tensors, each one graph ---------------------------------------------------


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.to(compute_dtype(x.dtype))
    mean, mean_square = x.mean(0), (x * x).mean(0)
    return mean, (mean_square - mean * mean).clamp(min=0).sqrt()


def _transform(bank: Tensor, to_mean: Tensor, to_std: Tensor) -> None:
    mean, std = _moments(bank)
    scale = to_std / std.clamp(min=EPS)
    bank.copy_(bank.to(scale.dtype) * scale + (to_mean - scale * mean))


def _loss(loss: PairLoss, z: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor) -> Tensor:
    bank = bank.to(z.dtype)
    s = (z @ bank.T) / torch.linalg.vector_norm(bank, dim=1).clamp(min=EPS)
    positive = labels[:, None] == bank_labels
    if isinstance(loss, (NTXent, Circle)) or (isinstance(loss, MultiSimilarity) and loss.mining is None):
        return pair_loss(loss, s, positive, torch.ones_like(positive))
    return dense_loss(loss, s, positive)


_compiled_moments = torch.compile(_moments)
_compiled_transform = torch.compile(_transform)
_compiled_loss = torch.compile(_loss)
