"""Choices without a look at the test classes: a part of the training classes is tested on in their stead."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from . import images, split
from .dataset import Dataset
from .part import DataError, Part

HELD_OUT = 0.25
"""Of the training classes."""


def of(data: Dataset) -> Dataset:
    """Train on three quarters of the training classes, test on the others: every image queries all the others.

    Which classes depends on their names alone, as in ``train.data.split``.

    Raises:
        DataError: there are too few classes.
    """
    train, held_out = _parts(data, HELD_OUT)
    return replace(data, train=train, test=held_out, queries=None, gallery=None)


def beside(data: Dataset, share: float) -> Dataset:
    """The same with a share of the training classes held out as ``validation``; those of ``of`` if it is HELD_OUT.

    Raises:
        DataError: there are too few classes.
    """
    train, held_out = _parts(data, share)
    return replace(data, train=train, validation=held_out)


def _parts(data: Dataset, share: float) -> tuple[Part, Part]:
    """The training classes without a share of them, and that share: two at least."""
    order = split.shuffled(data.train.classes, "validation")
    held_out = max(2, round(share * len(order)))
    if len(order) - held_out < 2:
        raise DataError(
            f"{data.name}: {len(order)} training classes, {held_out} of them held out for validation: two or more have "
            "to be left to train on"
        )
    chosen = set(order[:held_out])
    aside = np.array([name in chosen for name in data.train.classes])
    return _classes(data.train, ~aside), _classes(data.train, aside)


def _classes(part: Part, kept: NDArray[np.bool_]) -> Part:
    """The images of the classes that are kept."""
    where = np.flatnonzero(kept[part.labels])
    return Part(
        part.images[where] if isinstance(part.images, np.ndarray) else images.Picked(part.images, where),
        (np.cumsum(kept) - 1)[part.labels[where]],
        tuple(name for name, keep in zip(part.classes, kept.tolist(), strict=True) if keep),
        tuple(part.sources[i] for i in where.tolist()),
    )
