"""A table of images, ``csv:FILE``: their classes and, if it says so, which are trained on and which query which.

The columns are those of open-metric-learning's tables, in any order; others are ignored:

  label, path            the class, and a file, by its path from the folder of the table
  split                  train or validation (val and test are other words for it); without this column, or where all
                         are train, half of the classes are tested on
  is_query, is_gallery   true or false, of an image of validation; without these columns each queries all the others
  x_1, y_1, x_2, y_2     the box that is meant, in pixels from the upper left; empty: all of the image
"""

from __future__ import annotations

import csv
import io
import math
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .. import terminal
from . import benchmark, images, own, split
from .dataset import Dataset
from .own import FAR, WHOLE, Image
from .part import DataError
from .split import DEFAULT, Test

REQUIRED = ("label", "path")
ROLES = ("is_query", "is_gallery")
SIDES = ("x_1", "y_1", "x_2", "y_2")
KNOWN = (*REQUIRED, "split", *ROLES, *SIDES)
SPLITS = {"train": True, "validation": False, "val": False, "test": False}
"""Whether it is trained on."""
WORDS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
"""As pandas writes them, too, where some cells of the column are empty."""
DELIMITERS = ",;\t"


class Row(NamedTuple):
    """A line of the table."""

    number: int
    trained_on: bool
    image: Image


def load(path: Path, *, max_classes: int | None = None, test: Test = DEFAULT) -> Dataset:
    """Read the table, and see that its images are there and start like images; see ``train.data.load``.

    Raises:
        DataError: names the line of the table, the file, or what there is too little of.
    """
    spec, name = f"csv:{path}", f"table {path.name}"
    if not path.is_file():
        raise DataError(f"--data {spec}: no such file")
    columns, rows = _read(path)
    _check_files(path, rows)
    if not all(row.trained_on for row in rows):
        test.refuse(spec, "its column split")
        train, tested_on = ([row.image for row in rows if row.trained_on == side] for side in (True, False))
        return own.dataset(spec, name, train, tested_on, max_classes)
    if "split" in columns and not test.given:
        terminal.note(f"{spec}: no line is of validation, so half of the classes are tested on")
    usable = own.seen_often(spec, [row.image for row in rows])
    chosen = set(split.choose(sorted({image.label for image in usable}), max_classes))
    usable = [image for image in usable if image.label in chosen]
    return split.divide(
        name,
        [image.label for image in usable],
        [image.source for image in usable],
        pick=lambda where: own.files([usable[i] for i in where.tolist()]),
        test=test,
        files=[image.file for image in usable],
        mirror=True,
    )


def _read(path: Path) -> tuple[Sequence[str], list[Row]]:
    """The names of the columns, and the images."""
    text = benchmark.text(path)
    head = text.partition("\n")[0]
    delimiter = max(DELIMITERS, key=head.count)  # a comma, unless another one is there more often
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise DataError(f"--data: {path}:1: {error}") from error
    absent = [name for name in REQUIRED if name not in columns]
    absent += [name for group in (ROLES, SIDES) if set(group) & set(columns) for name in group if name not in columns]
    if "split" not in columns and set(ROLES) & set(columns):
        absent.append("split")
    if absent:
        raise DataError(f"--data: {path}:1: no column {', '.join(absent)} among {', '.join(columns)}")
    twice = [name for name in KNOWN if columns.count(name) > 1]
    if twice:
        raise DataError(f"--data: {path}:1: two columns {', '.join(twice)}")
    rows = []
    try:
        for words in reader:
            if not any(words):
                continue
            place = f"{path}:{reader.line_num}"
            if len(words) != len(columns):
                raise DataError(f"--data: {place}: {len(words)} columns, not {len(columns)}")
            cells = dict(zip(columns, map(str.strip, words), strict=True))
            trained_on, image = _image(cells, path.parent, place)
            rows.append(Row(reader.line_num, trained_on, image))
    except csv.Error as error:
        raise DataError(f"--data: {path}:{reader.line_num}: {error}") from error
    if not rows:
        raise DataError(f"--data: {path}: no images, only the names of columns")
    return columns, rows


def _image(cells: dict[str, str], folder: Path, place: str) -> tuple[bool, Image]:
    """Whether it is trained on, and the image."""
    for name in REQUIRED:
        if not cells[name]:
            raise DataError(f"--data: {place}: no {name}")
    word = cells.get("split", "train").lower()
    if word not in SPLITS:
        raise DataError(f"--data: {place}: split {cells['split']!r} is not one of {', '.join(SPLITS)}")
    trained_on = SPLITS[word]
    roles = _roles(cells, trained_on, place)
    label, source = (unicodedata.normalize("NFC", cells[name]) for name in REQUIRED)
    return trained_on, Image(label, folder / cells["path"], source, _box(cells, place), *roles)


def _roles(cells: dict[str, str], trained_on: bool, place: str) -> tuple[bool, bool]:
    """Whether it is a query, and in the gallery."""
    if ROLES[0] not in cells:
        return True, True
    if trained_on:
        for name in ROLES:
            if WORDS.get(cells[name].lower()):
                raise DataError(f"--data: {place}: {name} is {cells[name]!r}, but the image is trained on")
        return False, False
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
        left, top = (max(math.floor(side), -FAR) for side in (left, top))
        right, bottom = (min(math.ceil(side), FAR) for side in (right, bottom))
    except (ValueError, OverflowError):  # infinite ones cannot be rounded
        raise DataError(f"--data: {place}: {', '.join(SIDES)} must be four numbers, are {', '.join(words)}") from None
    if not (left < right and top < bottom):
        raise DataError(f"--data: {place}: x_1 must be below x_2 and y_1 below y_2, the box is {', '.join(words)}")
    return int(left), int(top), int(right), int(bottom)


def _check_files(path: Path, rows: Sequence[Row]) -> None:
    """Raises DataError for files that are missing or do not start like images, for boxes outside of them, and for what
    comes twice, be it under another name."""
    files = list(dict.fromkeys(row.image.file for row in rows))
    absent = images.missing(files)
    if absent:
        how_many = f"{len(absent):,} of {len(files):,} files are missing or empty"
        raise DataError(f"--data csv:{path}: {how_many}: {images.few(absent)}")
    sizes = dict(zip(files, images.check_all(files), strict=True))
    real = {file: os.path.realpath(file) for file in files}
    seen = benchmark.Unique("image")
    for number, _, image in rows:
        box = images.clip(image.box, sizes[image.file])
        if box is None:
            raise DataError(f"--data: {path}:{number}: the box {list(image.box)} is outside of {image.source}")
        seen.add(f"{real[image.file]} {list(box)}", f"{path}:{number}")
