"""Which classes are trained on and which are tested on: fixed by the classes' names, whatever the seed of a run.

Classes are put in the order of a hash of their names, so neither a library's random generator nor the order in which
the classes were found matters: the same data gives the same split on every machine, now and later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from . import DataError, Dataset, Part, Pixels

SPLIT_SEED = 0
MIN_CLASSES = 4
"""Two to train on (or there is nothing to distinguish) and two to test on (or every neighbour is right)."""


def shuffled(keys: Sequence[str], salt: str = "") -> list[str]:
    """``keys`` in a random-looking order that depends on the keys alone."""
    return sorted(keys, key=lambda key: hashlib.sha256(f"{SPLIT_SEED}:{salt}:{key}".encode()).digest())


def choose(keys: Sequence[str], max_classes: int | None) -> list[str]:
    """At most ``max_classes`` of ``keys``, in sorted order: all of them for None."""
    return sorted(shuffled(keys, "choose")[:max_classes])


def halves(keys: Sequence[str]) -> tuple[list[str], list[str]]:
    """Training classes and test classes, sorted; the odd one out is tested on."""
    order = shuffled(keys, "halves")
    middle = len(order) // 2
    return sorted(order[:middle]), sorted(order[middle:])


def class_disjoint(
    name: str,
    keys: Sequence[str],
    sources: Sequence[str],
    pick: Callable[[NDArray[np.int64]], Sequence[Pixels]],
    *,
    titles: dict[str, str] | None = None,
    mirror: bool,
    credit: tuple[str, ...] = (),
) -> Dataset:
    """Make a Dataset out of one flat list of images.

    Args:
        keys: each image's class, as a string that identifies it.
        sources: each image's source.
        pick: gives the images at the given positions, int64 [n].
        titles: a readable name for each class; the key itself where absent.
    """
    classes = sorted(set(keys))
    if len(classes) < MIN_CLASSES:
        raise DataError(f"{name}: {len(classes)} classes; {MIN_CLASSES} are needed, two to train on and two to test on")
    array = np.asarray(keys)

    def part(members: list[str]) -> Part:
        where = np.flatnonzero(np.isin(array, members))
        labels = np.searchsorted(np.asarray(members), array[where]).astype(np.int64)
        readable = tuple((titles or {}).get(key, key) for key in members)
        return Part(pick(where), labels, readable, tuple(sources[i] for i in where.tolist()))

    train, test = (part(members) for members in halves(classes))
    return Dataset(name, train, test, mirror=mirror, credit=credit)
