"""Image files as sequences of pixels, decoded when asked for: memory holds file names only."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from . import DataError, Pixels

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are just outside."""
_UNREADABLE = (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError)
_ORIENTATION = 0x0112
_QUARTER_TURNS = (5, 6, 7, 8)


class Files(Sequence[Pixels]):
    """Image files, or a box in each, as pixels uint8 [height, width, 3], decoded anew at every access."""

    def __init__(self, paths: Sequence[Path], boxes: NDArray[np.int64] | None = None) -> None:
        """Read nothing.

        Args:
            paths: N files; a file may come several times.
            boxes: [N, 4], of each image its ``Box``, which is clipped to the image; None: all of each image.
        """
        if boxes is not None and boxes.shape != (len(paths), 4):
            raise ValueError(f"{len(paths)} files and boxes of shape {boxes.shape}")
        self.paths, self.boxes = tuple(paths), boxes

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Pixels: ...
    @overload
    def __getitem__(self, index: slice) -> Files: ...
    def __getitem__(self, index: int | slice) -> Pixels | Files:
        if isinstance(index, slice):
            return Files(self.paths[index], None if self.boxes is None else self.boxes[index])
        if self.boxes is None:
            return decode(self.paths[index])
        left, top, right, bottom = self.boxes[index].tolist()
        return decode(self.paths[index], (left, top, right, bottom))


class Picked(Sequence[Pixels]):
    """Some images of a sequence, in their order there or in another."""

    def __init__(self, images: Sequence[Pixels], where: NDArray[np.int64]) -> None:
        self.images, self.where = images, where

    def __len__(self) -> int:
        return len(self.where)

    @overload
    def __getitem__(self, index: int) -> Pixels: ...
    @overload
    def __getitem__(self, index: slice) -> Picked: ...
    def __getitem__(self, index: int | slice) -> Pixels | Picked:
        if isinstance(index, slice):
            return Picked(self.images, self.where[index])
        return self.images[int(self.where[index])]


def decode(path: Path, box: Box | None = None) -> Pixels:
    """Pixels as a viewer shows them: turned as the camera says, transparency on white; then ``box``, clipped.

    Raises:
        DataError: names the file that is no image, or in which nothing of the box lies.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if box is not None:
                inside = clip(box, image.size)
                if inside is None:
                    raise DataError(f"--data: {path}: the box {list(box)} is outside of its {image.size} pixels")
                image = image.crop(inside)
            if image.mode == "P" or "transparency" in image.info or image.mode in ("LA", "PA", "RGBA", "La", "RGBa"):
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(image.convert("RGB"))
    except DataError:
        raise
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def check(path: Path) -> tuple[int, int]:
    """Width and height that ``decode`` would give; reads the file's header only.

    Raises:
        DataError: names the file that does not start like an image.
    """
    try:
        with Image.open(path) as file:
            turned = file.getexif().get(_ORIENTATION) in _QUARTER_TURNS
            return (file.height, file.width) if turned else (file.width, file.height)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def clip(box: Box, size: tuple[int, int]) -> Box | None:
    """The part of a box inside an image of this width and height, None if there is none."""
    left, top = max(0, box[0]), max(0, box[1])
    right, bottom = min(size[0], box[2]), min(size[1], box[3])
    return (left, top, right, bottom) if left < right and top < bottom else None


def missing(paths: Iterable[Path]) -> list[Path]:
    """Those that are not there, in order: each folder is listed once, so 100,000 files take a second."""
    by_folder: dict[Path, dict[str, Path]] = defaultdict(dict)
    for path in paths:
        by_folder[path.parent][path.name] = path
    absent: list[Path] = []
    for folder, wanted in by_folder.items():
        try:
            with os.scandir(folder) as entries:
                there = {entry.name for entry in entries}
        except OSError:
            there = set()
        absent += [path for name, path in wanted.items() if name not in there]
    return absent


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"--data: cannot read image {path}: {error}")
