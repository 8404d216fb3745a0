"""Draw many icons, part by part: where a drawing was ended, the next one goes on with the part that is missing."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import cache, mapped, svg

PART = 2048
"""Images drawn before they are kept: some ten seconds of two cores."""
_NAME = "images"


def draw(sketches: Sequence[svg.Sketch], size: int, path: Path) -> str:
    """Draw on white, in grey, into the file ``path``, for ``mapped.Mapped``; returns its SHA-256.

    Parts are kept in a folder next to it until the caller calls ``forget``. They are of the same sketches, or ``path``
    has another name.

    Raises:
        DataError: as ``svg.drawn``.
        CorruptCache: another process, which was faster, has removed the parts.
    """
    place = _folder(path)
    place.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(sketches), PART)
    missing = [start for start in starts if _stored(place, start) is None]
    if missing and len(missing) < len(starts):
        print(f"{len(starts) - len(missing)} of {len(starts)} parts are drawn already", file=sys.stderr)
    todo = [sketches[start : start + PART] for start in missing]
    images = svg.drawn([sketch for part in todo for sketch in part], size, grey=True)
    for start, part in zip(missing, todo, strict=True):
        cache.save(place / f"{start}.npz", {_NAME: np.stack(list(islice(images, len(part))))})
    return mapped.save(path, len(sketches), _all(place, starts))


def forget(path: Path) -> None:
    """Remove the parts of ``path``."""
    shutil.rmtree(_folder(path), ignore_errors=True)


def _folder(path: Path) -> Path:
    return path.with_name(f".{path.stem}.parts")


def _stored(place: Path, start: int) -> NDArray[np.uint8] | None:
    """A part, None if it is not there, or damaged."""
    try:
        arrays = cache.read(place / f"{start}.npz")
    except cache.CorruptCache:
        return None
    return None if arrays is None else arrays[_NAME].astype(np.uint8, copy=False)


def _all(place: Path, starts: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
    for start in starts:
        part = _stored(place, start)
        if part is None:
            raise cache.CorruptCache(f"{place / f'{start}.npz'} is gone")
        yield part
