"""Data with a split of its owner's, by a table or by two folders; and with queries and a gallery, by a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import terminal
from . import benchmark, images
from .dataset import Dataset
from .part import DataError, Part

FAR = 1 << 31
"""Pixels: no image is as wide."""
WHOLE = (0, 0, FAR, FAR)
"""The box that is clipped to all of any image."""
MIN_IMAGES = 2
"""Of a class that is trained on: one seen once matches nothing."""


class Image(NamedTuple):
    """One image, or a box in one."""

    label: str
    file: Path
    source: str
    """The name of the file, the same on every machine."""
    box: images.Box = WHOLE
    query: bool = True
    """Of an image that is tested on: whether it queries the gallery."""
    gallery: bool = True
    """And whether it is in there."""


def dataset(
    spec: str, name: str, train: Sequence[Image], test: Sequence[Image], max_classes: int | None = None
) -> Dataset:
    """These images as a data set. Where all are both queries and gallery, every image queries all the others.

    What is left out of training, and how many classes are on both sides, is said on stderr.

    Args:
        spec: ``KIND:PATH``, for messages.
        name: of the data set.
        train: images in the order of the data set.
        test: the same of those that are tested on.
        max_classes: use only this many classes.

    Raises:
        DataError: there are too few classes, or no query has anything to find.
    """
    train = seen_often(spec, train)
    keep_train, keep_test = benchmark.choose((i.label for i in train), (i.label for i in test), max_classes)
    train, test = [i for i in train if i.label in keep_train], [i for i in test if i.label in keep_test]
    _check_enough(spec, train, test)
    numbers = np.arange(len(test), dtype=np.int64)
    queries, gallery = np.array([i.query for i in test]), np.array([i.gallery for i in test])
    everything = bool(queries.all() and gallery.all())
    return Dataset(
        name,
        _part(train),
        _part(test),
        mirror=True,
        queries=None if everything else numbers[queries],
        gallery=None if everything else numbers[gallery],
    )


def seen_often(spec: str, given: Sequence[Image]) -> list[Image]:
    """Those of classes with as many images as training needs; the others are counted on stderr."""
    counts = Counter(image.label for image in given)
    rare = [label for label, count in counts.items() if count < MIN_IMAGES]
    if rare:
        _note(spec, f"{len(rare)} classes with fewer than {MIN_IMAGES} images left out", rare)
    return [image for image in given if counts[image.label] >= MIN_IMAGES]


def files(given: Sequence[Image]) -> images.Files:
    """Their pixels."""
    boxes = None if all(i.box == WHOLE for i in given) else np.array([i.box for i in given], np.int64)
    return images.Files([image.file for image in given], boxes)


def _check_enough(spec: str, train: Sequence[Image], test: Sequence[Image]) -> None:
    labels = {image.label for image in train}
    if len(labels) < 2:
        few = f"{len(labels)} classes of {MIN_IMAGES} images or more"
        raise DataError(f"--data {spec}: {few} to train on; two are needed")
    to_find = Counter(image.label for image in test if image.gallery)
    if not any(to_find[image.label] > image.gallery for image in test if image.query):
        raise DataError(f"--data {spec}: nothing can be tested: no query has an image of its class to find")
    if len(to_find) < 2:
        raise DataError(f"--data {spec}: nothing can be tested: the gallery is of one class only")
    both = sorted(labels & {image.label for image in test})
    if both:
        _note(spec, f"{len(both)} classes are both trained on and tested on", both)


def _part(given: Sequence[Image]) -> Part:
    classes, labels = np.unique(np.asarray([image.label for image in given]), return_inverse=True)
    return Part(files(given), labels.astype(np.int64), tuple(map(str, classes)), tuple(image.source for image in given))


def _note(spec: str, what: str, names: Sequence[str]) -> None:
    terminal.note(f"{spec}: {what}: {images.few(names)}")
