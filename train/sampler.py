"""Which images make up a step: classes drawn evenly, several images of each, as a pure function of seed and step.

No state means that every method sees the same batches in the same order, and that a run can stop and go on anywhere.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Stream(IntEnum):
    """Independent random streams of one run."""

    INITIALISATION = 0
    BATCHES = 1
    AUGMENTATION = 2
    DROPOUT = 3


def random_stream(seed: int, stream: Stream, step: int = 0) -> np.random.SeedSequence:
    """The source of randomness for one purpose at one step."""
    return np.random.SeedSequence([seed, stream, step])


def torch_seed(seed: int, stream: Stream, step: int = 0) -> int:
    """The same as a 64-bit seed for a torch generator."""
    return torch_seeds(seed, stream, step, 1)[0]


def torch_seeds(seed: int, stream: Stream, step: int, count: int) -> list[int]:
    """So many of them, for generators that do not depend on one another, nor on how many there are."""
    seeds: list[int] = random_stream(seed, stream, step).generate_state(count, np.uint64).tolist()
    return seeds


class ClassBalancedSampler:
    """Batches of P classes with K images each; ``sampler(step)`` gives the positions of its P*K images.

    An image appears twice in a batch only where its class has fewer than K images, and then as seldom as possible.
    """

    def __init__(self, labels: NDArray[np.int64], batch_size: int, samples_per_class: int, seed: int) -> None:
        self.members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        self.classes_per_batch, remainder = divmod(batch_size, samples_per_class)
        self.samples_per_class = samples_per_class
        self.seed = seed
        if remainder or self.classes_per_batch > len(self.members):
            largest = samples_per_class * len(self.members)
            raise ValueError(
                f"--batch-size {batch_size} with --samples-per-class {samples_per_class} needs "
                f"{batch_size / samples_per_class:g} training classes and there are {len(self.members)}: "
                f"choose --batch-size {largest} or less, a multiple of {samples_per_class}"
            )

    def __call__(self, step: int) -> NDArray[np.int64]:
        """Positions [P*K] of the images of a step, class after class."""
        rng = np.random.default_rng(random_stream(self.seed, Stream.BATCHES, step))
        chosen = rng.choice(len(self.members), self.classes_per_batch, replace=False)
        return np.concatenate([self._draw(rng, self.members[c]) for c in chosen])

    def _draw(self, rng: np.random.Generator, members: NDArray[np.int64]) -> NDArray[np.int64]:
        rounds = -(-self.samples_per_class // len(members))
        return np.concatenate([rng.permutation(members) for _ in range(rounds)])[: self.samples_per_class]
