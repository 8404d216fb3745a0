"""What tells a data set from others of the same name: digests of its classes, labels and images.

Of image files the names and sizes are looked at, not the pixels, so that 100,000 files take a second: a file that was
replaced by one of the same size is not noticed. Images in memory are looked at in full.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from . import images
from .part import DataError, Part, Pixels

Fingerprint = dict[str, str]
"""``summary``, the counts in words, and a digest of each aspect of a data set, by its name."""


def of(summary: str, sides: Sequence[Part], positions: Sequence[NDArray[np.int64] | None]) -> Fingerprint:
    """The fingerprint of a data set: of its parts, and which test images are queries and gallery.

    Raises:
        DataError: names an image that is not there any more.
    """
    asked = [np.zeros(0, np.int64) if where is None else where for where in positions]
    return {
        "summary": summary,
        "class names": _digest(name.encode() for part in sides for name in (*part.classes, "")),
        "labels": _digest([*(part.labels.tobytes() for part in sides), *(where.tobytes() for where in asked)]),
        "image names": _digest(os.fsencode(name) for part in sides for name in (*part.sources, "")),
        "images": _digest(content for part in sides for content in _contents(part)),
    }


def differences(one: Fingerprint, other: Fingerprint) -> list[str]:
    """The names of the aspects in which two data sets differ."""
    return [name for name in one if name != "summary" and one[name] != other.get(name)]


def _digest(parts: Iterable[bytes | memoryview]) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "little"))
        sha.update(part)
    return sha.hexdigest()[:32]


def _contents(part: Part) -> Iterable[bytes | memoryview]:
    """Pixels where they are in memory, else the sizes of files, in bytes, and the boxes in them."""
    found = _files(part.images) if not isinstance(part.images, np.ndarray) else None
    if found is None:
        for image in part.images:
            yield str(image.shape).encode()
            yield np.ascontiguousarray(image).view(np.uint8).reshape(-1).data
        return
    try:
        sizes = [os.stat(path).st_size for path in found.paths]
    except OSError as error:
        raise DataError(f"--data: cannot read image {error.filename}: {error.strerror}") from error
    yield np.array(sizes, np.int64).tobytes()
    yield b"" if found.boxes is None else found.boxes.tobytes()


def _files(pictures: Sequence[Pixels]) -> images.Files | None:
    """The files of a sequence of images, None if it has none."""
    if isinstance(pictures, images.Files):
        return pictures
    if isinstance(pictures, images.Picked):
        inner = _files(pictures.images)
        return None if inner is None else _picked(inner, pictures.where)
    return None


def _picked(files: images.Files, where: NDArray[np.int64]) -> images.Files:
    boxes = None if files.boxes is None else files.boxes[where]
    return images.Files([files.paths[i] for i in where.tolist()], boxes)
