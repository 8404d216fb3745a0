"""How stale is the memory? Past batches are embedded again, and the memory's rows compared with the truth.

A *probe* keeps the very pixels of a training batch, the memory slots its rows went to and the embeddings as they were
first stored. Embedding the same pixels with today's network, in the same mode as then, shows where
the rows ought to be. Two distances to there are reported: from the row as first stored ("uncorrected": what plain XBM
would hold) and from the row as it stands in the memory now ("in_memory": after moment matching). Of each there is the
part that rows have in common ("shared"): errors that point the same way add up in a gradient, others cancel out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .model import Embedder, without_traces
from .ranks import ALONE, Ranks

PROBES, MANY_PROBES = 4, 16
"""Probes alive at a time, spread over the time a row stays in the memory; many where embedding one again is cheap."""
MEASUREMENTS = 24
"""About so many over a whole run; each costs a few forward passes."""


def probes(frozen: bool) -> int:
    """How many are alive at a time in a run with a frozen backbone, or with a live one."""
    return MANY_PROBES if frozen else PROBES


class Probe(NamedTuple):
    """One past batch of B images, or a process's part of it."""

    step: int
    slots: Tensor
    """[B] int64: rows of the memory."""
    images: Tensor
    """[B, 3, H, W] uint8, or [B, F], as the network saw them."""
    stored: Tensor
    """[B, D] of unit length, as first stored."""


class Staleness(NamedTuple):
    """Mean cosine distances of one probe, measured after ``step`` steps.

    The cosine distance of unit vectors is half the square of their difference, the row's error. So its shared part is
    half the mean inner product of the errors of two different rows; less than 0 only by chance.
    """

    step: int
    age: int
    """Steps of training since its rows were stored."""
    uncorrected: float
    in_memory: float
    shared_uncorrected: float
    shared_in_memory: float


def lifetime(memory_size: int, batch_size: int, accumulate: int) -> int:
    """Of how many steps the ends see a row in the memory; the rows of a step's last batch."""
    return (memory_size // batch_size - 1) // accumulate + 1


class DriftMeter:
    """Records probes during training and measures them when asked. Of several processes each has its part of them."""

    def __init__(
        self, memory_size: int, batch_size: int, probes: int = PROBES, ranks: Ranks = ALONE, accumulate: int = 1
    ) -> None:
        """Probes are the last of the ``accumulate`` batches of a step; ages and intervals are in steps."""
        self.lifetime = lifetime(memory_size, batch_size, accumulate)
        self.interval = max(1, self.lifetime // probes)
        self.memory_size, self.batch_size, self.ranks = memory_size, batch_size, ranks
        self.probes: list[Probe] = []

    def every(self, steps: int) -> int:
        """Steps between measurements in a run of so many: those after which probes are of several ages."""
        return self.interval * max(1, steps // MEASUREMENTS // self.interval)

    def wants(self, step: int) -> bool:
        """True if the batch of this step should become a probe."""
        return step % self.interval == 0

    def record(self, step: int, head: int, images: Tensor, embeddings: Tensor) -> None:
        """Keep a batch that was just stored from slot ``head`` on: images [B, 3, H, W], embeddings [B, D]."""
        self._forget(step)
        first = head + self.ranks.part(self.batch_size).start
        slots = (first + torch.arange(len(images))) % self.memory_size
        self.probes.append(Probe(step, slots, images.cpu().clone(), F.normalize(embeddings.detach(), dim=1).cpu()))

    def measure(self, step: int, model: Embedder, memory: Tensor) -> list[Staleness]:
        """Distances of every probe still in the memory [count, D], after ``step`` steps; oldest first."""
        self._forget(step)
        results = []
        was_training = model.training
        model.train()
        for probe in self.probes:
            with without_traces(model):
                now = F.normalize(model(probe.images.to(memory.device)), dim=1)
            rows = memory[probe.slots.to(memory.device)]
            errors = torch.stack([now - F.normalize(of.to(now), dim=1) for of in (probe.stored, rows)])
            whole = self._whole(errors.transpose(0, 1))
            results.append(Staleness(step, step - probe.step, *_distances(whole), *_shared(whole)))
        model.train(was_training)
        return results

    def _forget(self, step: int) -> None:
        """Drop probes whose rows newer batches have replaced."""
        self.probes = [probe for probe in self.probes if step - probe.step <= self.lifetime]

    def state_dict(self) -> dict[str, Any]:
        """The probes, those of all processes as one, for a checkpoint."""
        return {"probes": [_mapped(self._whole, probe)._asdict() for probe in self.probes]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the probes of a checkpoint."""

        def own(whole: Tensor) -> Tensor:
            return whole[self.ranks.part(len(whole))].clone()

        self.probes = [_mapped(own, Probe(**probe)) for probe in state["probes"]]

    def _whole(self, own: Tensor) -> Tensor:
        return self.ranks.joined(own, self.ranks.parts(self.batch_size))


def _mapped(change: Callable[[Tensor], Tensor], probe: Probe) -> Probe:
    return Probe(probe.step, change(probe.slots), change(probe.images), change(probe.stored))


def _distances(errors: Tensor) -> list[float]:
    """Mean cosine distances [*] of errors [B, *, D] of unit vectors."""
    distances: list[float] = (errors.square().sum(-1).mean(0) / 2).tolist()
    return distances


def _shared(errors: Tensor) -> list[float]:
    """Of them what any two rows have in common."""
    pairs = len(errors) * (len(errors) - 1)
    products = errors.sum(0).square().sum(-1) - errors.square().sum(-1).sum(0)  # of each row with each other one
    shared: list[float] = (products / (2 * pairs)).tolist()
    return shared
