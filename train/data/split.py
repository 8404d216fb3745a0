"""What is trained on and what is tested on: fixed by the names of classes and images, whatever the seed of a run.

They are put in the order of a hash of their names, so neither a library's random generator nor the order in which they
were found matters: the same data gives the same split on every machine, now and later.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .dataset import Dataset
from .part import DataError, Part, Pixels

SPLIT_SEED = 0
MIN_CLASSES = 4
"""Two to train on (or there is nothing to distinguish) and two to test on (or every neighbour is right)."""
KEPT = 2
"""Images of a class that are trained on: one seen once matches nothing."""
ASKED = 2
"""Images of a class that are tested on: one alone finds nothing."""
CLASSES, IMAGES = "classes", "images"
SHARE = 0.5
"""Of the classes, or of the images of each: what is tested on if nothing is said."""


class Test(NamedTuple):
    """What to test on, where data have no split of their own."""

    share: float | None = None
    """0 <= share < 1; 0: nothing is tested, all is for training; None: SHARE."""
    of: str = CLASSES
    """CLASSES: that share of the classes, which are not trained on. IMAGES: that share of the images of each class."""

    @property
    def given(self) -> tuple[str, ...]:
        """What was asked for, as on the command line."""
        share = () if self.share is None else (f"--test-share {self.share:g}",)
        return (*share, *(() if self.of == CLASSES else (f"--test-of {self.of}",)))

    @property
    def least_classes(self) -> int:
        """Classes that are needed."""
        return MIN_CLASSES if self.of == CLASSES and self.share != 0 else 2

    @property
    def needed(self) -> str:
        """That in words."""
        aim = "two to train on and two to test on" if self.least_classes == MIN_CLASSES else "to train on"
        return f"{self.least_classes} are needed, {aim}"

    def refuse(self, spec: str, split: str) -> None:
        """Raise DataError if something was asked for of data that have a ``split`` of their own."""
        if self.given:
            raise DataError(f"{' '.join(self.given)}: --data {spec} has a split of its own, {split}; leave it out")


DEFAULT = Test()


def shuffled(keys: Sequence[str], salt: str = "") -> list[str]:
    """``keys`` in a random-looking order that depends on the keys alone; names of files need not be UTF-8."""

    def order(key: str) -> bytes:
        return hashlib.sha256(f"{SPLIT_SEED}:{salt}:{key}".encode(errors="surrogateescape")).digest()

    return sorted(keys, key=order)


def choose(keys: Sequence[str], max_classes: int | None) -> list[str]:
    """At most ``max_classes`` of ``keys``, in sorted order: all of them for None."""
    return sorted(shuffled(keys, "choose")[:max_classes])


def by_class(keys: Sequence[str], share: float = SHARE) -> tuple[list[str], list[str]]:
    """Training classes and test classes, sorted; of a half, the odd one out is tested on. Two of each at least."""
    order = shuffled(keys, "halves")
    tested = max(2, min(_rounded(share * len(order)), len(order) - 2))
    return sorted(order[:-tested]), sorted(order[-tested:])


def by_image(keys: Sequence[str], sources: Sequence[str], share: float) -> NDArray[np.bool_]:
    """Which images are tested on, bool [n]: about that share of each class.

    A class keeps KEPT images to train on and has ASKED to test on at least, or is trained on alone. What comes from
    one file is on one side.

    Args:
        keys: each image's class.
        sources: each image's source.
        share: of the images of a class.
    """
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for key, source in zip(keys, sources, strict=True):
        counts[key][source] += 1
    tested = {key: set(_held_out(key, of_class, share)) for key, of_class in counts.items()}
    return np.array([source in tested[key] for key, source in zip(keys, sources, strict=True)], dtype=bool)


def _held_out(key: str, counts: Counter[str], share: float) -> list[str]:
    """The sources of a class that are tested on; ``counts`` has how many images are of each."""
    most = counts.total() - KEPT
    wanted = min(max(ASKED, _rounded(share * counts.total())), most)
    chosen: list[str] = []
    count = 0
    for source in shuffled(sorted(counts), f"images of {key}"):
        if count < wanted and count + counts[source] <= most:
            chosen.append(source)
            count += counts[source]
    return chosen if count >= ASKED else []


def _rounded(number: float) -> int:
    return int(number + 0.5)


def divide(
    name: str,
    keys: Sequence[str],
    sources: Sequence[str],
    pick: Callable[[NDArray[np.int64]], Sequence[Pixels]],
    *,
    test: Test,
    files: Sequence[Path] | None = None,
    titles: dict[str, str] | None = None,
    mirror: bool,
    credit: tuple[str, ...] = (),
) -> Dataset:
    """Make a Dataset out of one flat list of images.

    Args:
        name: of the data set.
        keys: each image's class, as a string that identifies it.
        sources: each image's source.
        pick: gives the images at the given positions, int64 [n].
        test: what is tested on.
        files: each image's, if it is of one: what comes from one, by whatever name, is on one side.
        titles: a readable name for each class; the key itself where absent.
        mirror: as of Dataset, and so is ``credit``.

    Raises:
        DataError: there are too few classes, or too few images to test on.
    """
    classes = sorted(set(keys))
    if len(classes) < test.least_classes:
        raise DataError(f"{name}: {len(classes)} classes; {test.needed}")
    array = np.asarray(keys)

    def part(where: NDArray[np.int64]) -> Part:
        members, labels = np.unique(array[where], return_inverse=True)
        readable = tuple((titles or {}).get(key, key) for key in map(str, members))
        return Part(pick(where), labels.astype(np.int64), readable, tuple(sources[i] for i in where.tolist()))

    tested = _tested(classes, keys, sources if files is None else _by_file(sources, files), test)
    train, tested_on = part(np.flatnonzero(~tested)), part(np.flatnonzero(tested))
    if test.share != 0 and len(tested_on.classes) < 2:
        raise DataError(
            f"{name}: {len(tested_on.classes)} classes have the {KEPT + ASKED} images that --test-of images needs, "
            f"{KEPT} to train on and {ASKED} to test on; two are needed"
        )
    return Dataset(name, train, tested_on, mirror=mirror, credit=credit)


def _by_file(sources: Sequence[str], files: Sequence[Path]) -> list[str]:
    """Sources, that of the first image of a file for all of it."""
    first: dict[str, str] = {}
    return [first.setdefault(os.path.realpath(file), source) for source, file in zip(sources, files, strict=True)]


def _tested(classes: Sequence[str], keys: Sequence[str], sources: Sequence[str], test: Test) -> NDArray[np.bool_]:
    """Which images are tested on, bool [n]."""
    share = SHARE if test.share is None else test.share
    if share == 0:
        return np.zeros(len(keys), dtype=bool)
    if test.of == IMAGES:
        return by_image(keys, sources, share)
    return np.isin(np.asarray(keys), by_class(classes, share)[1])
