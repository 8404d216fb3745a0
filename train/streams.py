"""The random streams of a run. Each number drawn is a function of the seed and the step, so a run can stop and go on
anywhere, and every method sees the same batches."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from xbn_ext import sampler


class Stream(IntEnum):
    """Independent random streams of one run."""

    INITIALISATION = 0
    BATCHES = sampler.STREAM
    AUGMENTATION = 2
    DROPOUT = 3


def torch_seed(seed: int, stream: Stream, step: int = 0) -> int:
    """The seed of a torch generator for one purpose at one step, 64 bits."""
    return torch_seeds(seed, stream, step, 1)[0]


def torch_seeds(seed: int, stream: Stream, step: int, count: int) -> list[int]:
    """So many of them, for generators that do not depend on one another, nor on how many there are."""
    seeds: list[int] = np.random.SeedSequence([seed, stream, step]).generate_state(count, np.uint64).tolist()
    return seeds
