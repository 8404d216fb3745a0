"""Which images make up a batch: some classes, several images of each, as a pure function of seed and step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import checks

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

STREAM = 1
"""Keeps the batches apart from what else a run draws by its seed and step."""


def dealt(count: int, among: int) -> list[slice]:
    """How so many things, one after the other, are dealt out: as even as possible, the first have one more."""
    each, more = divmod(count, among)
    starts = [part * each + min(part, more) for part in range(among + 1)]
    return [slice(starts[part], starts[part + 1]) for part in range(among)]


class ClassBalancedSampler:
    """Batches of P classes with K images each, for `DataLoader(batch_sampler=...)`: K of a class are each other's
    positives. Classes are drawn evenly, whatever their size.

    An image appears twice in a batch only where its class has fewer than K images, and then as seldom as possible. A
    batch is a function of the seed and the step: `batch(step)` gives any of them. One iteration has
    `num_batches` steps, the next one goes on from there.

    Examples:
        >>> sampler = ClassBalancedSampler(labels, batch_size=64, samples_per_class=4)
        >>> for images, labels in DataLoader(dataset, batch_sampler=sampler): ...

    Args:
        labels: the class of each image of the data set, integers `[N]`: a tensor, a list, an array, or what can be made
            one, such as a column of a table; in the order of its rows.
        batch_size: P·K, the whole batch of all ranks. A multiple of K; there must be P classes.
        samples_per_class: K, which others call m.
        seed: of the batches, 0 or more.
        num_batches: steps of one iteration, which is `len(sampler)`. None: as many as make N images.
        num_replicas: how many ranks share a batch, each with the same arguments and a `rank` of its own. They get
            consecutive parts of it, as even as possible, which in the order of the ranks are the batch of one process.
        rank: 0 to num_replicas - 1.

    Attributes:
        step: which step the next batch drawn is of. Set it to resume. A DataLoader with workers draws ahead: where
            an iteration is left in the middle, count the steps that you have taken yourself.

    Raises:
        TypeError: `labels` are no integers.
        ValueError: there are too few classes; or an argument is out of its range.
    """

    def __init__(
        self,
        labels: Tensor | NDArray[Any] | Sequence[int],
        batch_size: int,
        samples_per_class: int,
        *,
        seed: int = 0,
        num_batches: int | None = None,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        self.batch_size = checks.whole("batch_size", batch_size, 1)
        self.samples_per_class = checks.whole("samples_per_class", samples_per_class, 1)
        self.seed, self.step = seed, 0
        self._members = _members(labels)
        self._classes_per_batch, remainder = divmod(self.batch_size, self.samples_per_class)
        if remainder or self._classes_per_batch > len(self._members):
            largest = self.samples_per_class * len(self._members)
            raise ValueError(
                f"batch_size {batch_size} with samples_per_class {samples_per_class} needs "
                f"{batch_size / samples_per_class:g} training classes and there are {len(self._members)}: "
                f"choose batch_size {largest} or less, a multiple of {samples_per_class}"
            )
        images = sum(map(len, self._members))
        self._length = max(images // self.batch_size, 1)
        if num_batches is not None:
            self._length = checks.whole("num_batches", num_batches, 1)
        rank, num_replicas = checks.whole("rank", rank, 0), checks.whole("num_replicas", num_replicas, 1)
        if not rank < num_replicas <= self.batch_size:
            raise ValueError(
                f"rank must be below num_replicas, and that at most batch_size ({batch_size}), got rank {rank} of "
                f"{num_replicas}"
            )
        self._part = dealt(self.batch_size, num_replicas)[rank]

    def batch(self, step: int) -> list[int]:
        """This rank's part of the batch of a step, class after class: positions in the data set."""
        import numpy as np

        rng = np.random.default_rng([self.seed, STREAM, checks.whole("step", step, 0)])
        chosen = rng.choice(len(self._members), self._classes_per_batch, replace=False)
        images: list[int] = np.concatenate([self._draw(rng, self._members[c]) for c in chosen]).tolist()
        return images[self._part]

    def _draw(self, rng: np.random.Generator, members: NDArray[np.int64]) -> NDArray[np.int64]:
        """K of a class, in rounds of all its images."""
        import numpy as np

        rounds = -(-self.samples_per_class // len(members))
        return np.concatenate([rng.permutation(members) for _ in range(rounds)])[: self.samples_per_class]

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        """The batches from `step` to the end of the iteration that it is in."""
        end = (self.step // self._length + 1) * self._length
        while self.step < end:
            self.step += 1
            yield self.batch(self.step - 1)

    @property
    def seed(self) -> int:
        """Setting it raises ValueError unless it is an integer >= 0."""
        return self._seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self._seed = checks.whole("seed", seed, 0)

    @property
    def step(self) -> int:
        """The number of the next batch. Setting it raises ValueError unless it is an integer >= 0."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        self._step = checks.whole("step", step, 0)

    def state_dict(self) -> dict[str, int]:
        """Seed and step."""
        return {"seed": self.seed, "step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on where another sampler of the same labels and sizes was. Raises KeyError if a number is missing,
        ValueError if it is no step or no seed."""
        seed, step = (checks.whole(name, state[name], 0) for name in ("seed", "step"))
        self.seed, self.step = seed, step


def _members(labels: Tensor | NDArray[Any] | Sequence[int]) -> list[NDArray[np.int64]]:
    """Of each class its images, ascending, in the order of the labels."""
    import numpy as np  # here, since `import xbn_ext` does without it

    if isinstance(labels, np.ma.MaskedArray):
        raise TypeError("labels must not be masked: give those that there are")
    if not isinstance(labels, Tensor) and hasattr(labels, "__array__"):  # torch would read a table by its index
        labels = np.asarray(labels)
        labels = np.array(labels, labels.dtype.newbyteorder("="))  # of any strides, and perhaps not to be written
    try:
        given = labels if isinstance(labels, Tensor) else torch.as_tensor(labels, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:  # words, lists of several lengths
        raise TypeError(f"labels must be integers: {error}") from None
    if not given.numel():
        raise ValueError("labels are empty")
    checks.integers("labels", given, given.numel(), "N")
    if given.is_meta:
        raise ValueError("labels are on the meta device, which holds no values")
    of_images = given.detach().cpu().numpy()
    order = np.argsort(of_images, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(of_images[order])) + 1)
