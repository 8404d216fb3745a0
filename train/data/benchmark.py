"""What public benchmarks have in common: lists of images whose counts are known, and files that must be there.

They cannot be redistributed, so none is fetched. What is wrong with a copy is reported before any training: a list that
is missing, cut short or broken in a line, an image that is not there, a class both trained on and tested on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import images, split
from .part import DataError, Part

SHOWN = 3
"""Missing files that a message names."""


@dataclass(frozen=True)
class Source:
    """Which data set it is, for messages."""

    kind: str
    """Its word in ``--data KIND:PATH``."""
    title: str
    layout: str
    """What PATH holds."""
    where: str
    """Where to get it."""

    def error(self, path: Path, problem: str) -> DataError:
        """What is wrong with the copy in ``path``, and what a right one looks like."""
        return DataError(
            f"--data {self.kind}:{path}: {problem}\n  {self.title} is expected as {self.layout}; get it at {self.where}"
        )


class Row(NamedTuple):
    """One image of a list."""

    key: str
    """Its class."""
    path: str
    """Relative to the folder of images."""


def text(path: Path) -> str:
    """A text in UTF-8, without the byte order mark that some editors begin it with.

    Raises:
        DataError: names the file that cannot be read, or is no text.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--data: cannot read {path}: {error}") from error
    before, zero, _ = content.partition("\0")
    if zero:  # the system takes no such name of a file
        line = before.count("\n") + 1
        raise DataError(f"--data: {path}:{line}: a zero byte, which is in no text")
    return content


def lines(path: Path, header: Sequence[str], fields: int) -> Iterator[tuple[int, list[str]]]:
    """The words of each line after the header, with the number of the line; empty lines are skipped.

    Args:
        path: a text file.
        header: the first lines, any number of blanks between their words; an empty one stands for any text.
        fields: the words of every other line.

    Raises:
        DataError: names the file and the line.
    """
    rows = text(path).splitlines()
    for number, expected in enumerate(header, 1):
        found = rows[number - 1] if number <= len(rows) else ""
        if expected and found.split() != expected.split():
            raise DataError(f"--data: {path}:{number}: expected {expected!r}, found {found[:80]!r}")
    for number, row in enumerate(rows[len(header) :], len(header) + 1):
        words = row.split()
        if words and len(words) != fields:
            raise DataError(f"--data: {path}:{number}: {len(words)} words, not {fields}: {row[:80]!r}")
        if words:
            yield number, words


class Unique:
    """Refuses what comes a second time."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.seen: dict[str, str] = {}

    def add(self, value: str, place: str) -> None:
        """Note a value and where it stands; raises DataError if it stood elsewhere before."""
        before = self.seen.setdefault(value, place)
        if before != place:
            raise DataError(f"--data: {place}: {self.what} {value} is in {before} already")


def check_counts(source: Source, path: Path, found: dict[str, int], published: dict[str, int]) -> None:
    """Raise DataError where counts differ: scores on another selection could not be compared with published ones."""
    wrong = [f"{found[name]:,} {name}, not {count:,}" for name, count in published.items() if found[name] != count]
    if wrong:
        raise source.error(path, f"not the lists as published: {'; '.join(wrong)}")


def check_disjoint(source: Source, path: Path, train: Iterable[str], test: Iterable[str]) -> None:
    """Raise DataError if a class is on both sides."""
    both = sorted(set(train) & set(test))
    if both:
        raise source.error(path, f"{len(both)} classes are both trained on and tested on: {', '.join(both[:SHOWN])}")


def check_files(source: Source, path: Path, files: Collection[Path]) -> None:
    """Raise DataError if files are missing or empty; looks at folders, not into files."""
    absent = images.missing(files)
    if absent:
        names = ", ".join(str(file) for file in absent[:SHOWN])
        more = ", ..." if len(absent) > SHOWN else ""
        raise source.error(path, f"{len(absent):,} of {len(files):,} files are missing or empty: {names}{more}")


def choose(train: Iterable[str], test: Iterable[str], max_classes: int | None) -> tuple[set[str], set[str]]:
    """The classes used of each side, about half of ``max_classes`` of each: all of them for None."""
    sides = sorted(set(train)), sorted(set(test))
    if max_classes is None:
        return set(sides[0]), set(sides[1])
    half = max_classes // 2
    return set(split.choose(sides[0], half)), set(split.choose(sides[1], max_classes - half))


def make_part(folder: Path, rows: Sequence[Row], titles: Mapping[str, str] | None = None) -> Part:
    """The images of a list in its order, read from ``folder``; classes are named by their keys unless titled."""
    classes, labels = np.unique(np.asarray([row.key for row in rows]), return_inverse=True)
    return Part(
        images.Files([folder / row.path for row in rows]),
        labels.astype(np.int64),
        tuple((titles or {}).get(key, key) for key in map(str, classes)),
        tuple(row.path for row in rows),
    )
