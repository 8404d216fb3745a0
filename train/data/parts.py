"""Draw many icons, part by part: where a drawing was ended, the next one goes on with the part that is missing."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .. import terminal
from . import cache, mapped, svg

PART = 2048
"""Images drawn before they are kept: some ten seconds of two cores."""
_NAME = "images"


def draw(sketches: Sequence[svg.Sketch], size: int, path: Path) -> str:
    """Draw on white, in grey, into the file ``path``, for ``mapped.Mapped``; returns its SHA-256.

    Parts are kept in a folder next to it until the caller calls ``forget``.

    Raises:
        DataError: as ``svg.drawn``.
        CorruptCache: another process, which was faster, has removed the parts.
    """
    place = _folder(path)
    place.mkdir(parents=True, exist_ok=True)
    parts = [sketches[start : start + PART] for start in range(0, len(sketches), PART)]
    files = [place / f"{_digest(part, size)}.npz" for part in parts]
    todo = [(file, part) for file, part in zip(files, parts, strict=True) if _stored(file) is None]
    if 0 < len(todo) < len(parts):
        terminal.note(f"{len(parts) - len(todo)} of {len(parts)} parts are drawn already")
    images = svg.drawn([sketch for _, part in todo for sketch in part], size, grey=True)
    for file, part in todo:
        cache.save(file, {_NAME: np.stack(list(islice(images, len(part))))})
    return mapped.save(path, len(sketches), map(_there, files))


def forget(path: Path) -> None:
    """Remove the parts of ``path``."""
    shutil.rmtree(_folder(path), ignore_errors=True)


def _folder(path: Path) -> Path:
    return path.with_name(f".{path.stem}.parts")


def _digest(part: Sequence[svg.Sketch], size: int) -> str:
    """What a part is called: parts of other sketches are not taken for it."""
    return hashlib.sha256("\0".join([str(size), *(sketch.svg for sketch in part)]).encode()).hexdigest()[:16]


def _stored(file: Path) -> NDArray[np.uint8] | None:
    """A part, None if it is not there, or damaged."""
    try:
        arrays = cache.read(file)
    except cache.CorruptCache:
        return None
    return None if arrays is None else arrays[_NAME].astype(np.uint8, copy=False)


def _there(file: Path) -> NDArray[np.uint8]:
    part = _stored(file)
    if part is None:
        raise cache.CorruptCache(f"{file} is gone")
    return part
