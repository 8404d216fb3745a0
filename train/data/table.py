"""A table of images, ``csv:FILE``: their classes and, if it says so, which are trained on and which query which.

The columns are those of open-metric-learning's tables, in any order; others are ignored:

  label, path            the class, and a file, by its path from the folder of the table
  split                  train or validation (val and test are other words for it); without this column half of the
                         classes are tested on
  is_query, is_gallery   true or false, of an image of validation; without these columns each queries all the others
  x_1, y_1, x_2, y_2     the box that is meant, in pixels from the upper left; empty: all of the image
"""

from __future__ import annotations

import csv
import io
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import DataError, Dataset, Part, benchmark, images, split

REQUIRED = ("label", "path")
ROLES = ("is_query", "is_gallery")
SIDES = ("x_1", "y_1", "x_2", "y_2")
KNOWN = (*REQUIRED, "split", *ROLES, *SIDES)
SPLITS = {"train": "train", "validation": "test", "val": "test", "test": "test"}
WORDS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
"""As pandas writes them, too, where some cells of the column are empty."""
DELIMITERS = ",;\t"
WHOLE = (0, 0, 1 << 31, 1 << 31)
"""The box that is clipped to all of any image."""
MIN_IMAGES = 2
"""Of a class that is trained on: one seen once matches nothing."""


class Row(NamedTuple):
    """One image."""

    number: int
    """Its line in the table."""
    label: str
    path: str
    side: str
    """train, test, or nothing."""
    query: bool
    gallery: bool
    box: images.Box


def load(path: Path, *, max_classes: int | None = None) -> Dataset:
    """Read the table, and see that its images are there and start like images; see ``train.data.load``.

    Raises:
        DataError: names the line of the table, the file, or what there is too little of.
    """
    if not path.is_file():
        raise DataError(f"--data csv:{path}: no such file")
    columns, rows = _read(path)
    _check_files(path, rows)
    name = f"table {path.name}"
    if "split" not in columns:
        rows = _seen_often(path, rows)
        chosen = set(split.choose(sorted({row.label for row in rows}), max_classes))
        rows = [row for row in rows if row.label in chosen]
        return split.class_disjoint(
            name,
            [row.label for row in rows],
            [row.path for row in rows],
            pick=lambda where: _files(path, [rows[i] for i in where.tolist()]),
            mirror=True,
        )
    train = _seen_often(path, [row for row in rows if row.side == "train"])
    test = [row for row in rows if row.side == "test"]
    keep_train, keep_test = benchmark.choose((r.label for r in train), (r.label for r in test), max_classes)
    train, test = [r for r in train if r.label in keep_train], [r for r in test if r.label in keep_test]
    _check_enough(path, train, test)
    numbers = np.arange(len(test), dtype=np.int64)
    asks, found = (np.array([getattr(row, role) for row in test], bool) for role in ("query", "gallery"))
    everything = bool(asks.all() and found.all())
    return Dataset(
        name,
        _part(path, train),
        _part(path, test),
        mirror=True,
        queries=None if everything else numbers[asks],
        gallery=None if everything else numbers[found],
    )


def _read(path: Path) -> tuple[Sequence[str], list[Row]]:
    """The names of the columns, and the images."""
    text = benchmark.text(path)
    head = text.partition("\n")[0]
    delimiter = max(DELIMITERS, key=head.count)  # a comma, unless another one is there more often
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns = [name.strip() for name in next(reader, [])]
    absent = [name for name in REQUIRED if name not in columns]
    absent += [name for group in (ROLES, SIDES) if set(group) & set(columns) for name in group if name not in columns]
    if "split" not in columns and set(ROLES) & set(columns):
        absent.append("split")
    if absent:
        raise DataError(f"--data: {path}:1: no column {', '.join(absent)} among {', '.join(columns)}")
    twice = [name for name in KNOWN if columns.count(name) > 1]
    if twice:
        raise DataError(f"--data: {path}:1: two columns {', '.join(twice)}")
    rows, seen = [], benchmark.Unique("image")
    try:
        for words in reader:
            if not any(words):
                continue
            place = f"{path}:{reader.line_num}"
            if len(words) != len(columns):
                raise DataError(f"--data: {place}: {len(words)} columns, not {len(columns)}")
            row = _row(dict(zip(columns, map(str.strip, words), strict=True)), place, reader.line_num)
            seen.add(f"{row.path} {list(row.box)}" if row.box != WHOLE else row.path, place)
            rows.append(row)
    except csv.Error as error:
        raise DataError(f"--data: {path}:{reader.line_num}: {error}") from error
    if not rows:
        raise DataError(f"--data: {path}: no images, only the names of columns")
    return columns, rows


def _row(cells: dict[str, str], place: str, number: int) -> Row:
    for name in REQUIRED:
        if not cells[name]:
            raise DataError(f"--data: {place}: no {name}")
    side = ""
    if "split" in cells:
        if cells["split"].lower() not in SPLITS:
            raise DataError(f"--data: {place}: split {cells['split']!r} is not one of {', '.join(SPLITS)}")
        side = SPLITS[cells["split"].lower()]
    query, gallery = _roles(cells, side, place)
    return Row(number, cells["label"], cells["path"], side, query, gallery, _box(cells, place))


def _roles(cells: dict[str, str], side: str, place: str) -> tuple[bool, bool]:
    if side != "test" or ROLES[0] not in cells:
        for name in ROLES:
            if WORDS.get(cells.get(name, "").lower()):
                raise DataError(f"--data: {place}: {name} is {cells[name]!r}, but the image is trained on")
        return side == "test", side == "test"
    values = []
    for name in ROLES:
        if cells[name].lower() not in WORDS:
            raise DataError(f"--data: {place}: {name} must be true or false, is {cells[name]!r}")
        values.append(WORDS[cells[name].lower()])
    if not any(values):
        raise DataError(f"--data: {place}: an image of validation that is neither query nor in the gallery")
    return values[0], values[1]


def _box(cells: dict[str, str], place: str) -> images.Box:
    words = [cells.get(name, "") for name in SIDES]
    if not any(words):
        return WHOLE
    try:
        left, top, right, bottom = map(float, words)
        box = math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)
    except (ValueError, OverflowError):  # infinite ones cannot be rounded
        raise DataError(f"--data: {place}: {', '.join(SIDES)} must be four numbers, are {', '.join(words)}") from None
    if not (box[0] < box[2] and box[1] < box[3]):
        raise DataError(f"--data: {place}: x_1 must be below x_2 and y_1 below y_2, the box is {', '.join(words)}")
    return box


def _check_files(path: Path, rows: Sequence[Row]) -> None:
    """Raises DataError for files that are missing, that do not start like images, or that a box is outside of."""
    files = {row.path: path.parent / row.path for row in rows}
    absent = images.missing(files.values())
    if absent:
        how_many = f"{len(absent):,} of {len(files):,} files are missing or empty"
        raise DataError(f"--data csv:{path}: {how_many}: {images.few(absent)}")
    images.check_all(files.values())
    for row in rows:
        if row.box != WHOLE and images.clip(row.box, images.check(files[row.path])) is None:
            raise DataError(f"--data: {path}:{row.number}: the box {list(row.box)} is outside of {row.path}")


def _seen_often(path: Path, rows: Sequence[Row]) -> list[Row]:
    counts = Counter(row.label for row in rows)
    rare = [label for label, count in counts.items() if count < MIN_IMAGES]
    if rare:
        named = f"{len(rare)} classes with fewer than {MIN_IMAGES} images left out: {images.few(rare)}"
        print(f"{path}: {named}", file=sys.stderr)
    return [row for row in rows if counts[row.label] >= MIN_IMAGES]


def _check_enough(path: Path, train: Sequence[Row], test: Sequence[Row]) -> None:
    labels = {row.label for row in train}
    if len(labels) < 2:
        many = f"{len(labels)} classes of {MIN_IMAGES} images or more"
        raise DataError(f"--data csv:{path}: {many} to train on; two are needed")
    to_find = Counter(row.label for row in test if row.gallery)
    answered = any(to_find[row.label] > row.gallery for row in test if row.query)
    if not answered or len(to_find) < 2:
        why = "no query has an image of its class to find" if not answered else "the gallery is of one class only"
        raise DataError(f"--data csv:{path}: nothing can be tested: {why}")
    both = sorted(labels & {row.label for row in test})
    if both:
        named = f"{len(both)} classes are both trained on and tested on: {images.few(both)}"
        print(f"{path}: {named}", file=sys.stderr)


def _part(path: Path, rows: Sequence[Row]) -> Part:
    classes, labels = np.unique(np.asarray([row.label for row in rows]), return_inverse=True)
    return Part(_files(path, rows), labels.astype(np.int64), tuple(map(str, classes)), tuple(row.path for row in rows))


def _files(path: Path, rows: Sequence[Row]) -> images.Files:
    boxes = None if all(row.box == WHOLE for row in rows) else np.array([row.box for row in rows], np.int64)
    return images.Files([path.parent / row.path for row in rows], boxes)
