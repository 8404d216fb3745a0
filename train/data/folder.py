"""A folder of images, one sub-folder per class. Images are decoded when asked for: memory holds file names only."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from . import DataError, Dataset, Pixels, split

MIN_IMAGES = 2
SUFFIXES = frozenset(Image.registered_extensions())


class Files(Sequence[Pixels]):
    """Image files as a sequence of pixels, uint8 [height, width, 3] each, decoded anew at every access."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Pixels: ...
    @overload
    def __getitem__(self, index: slice) -> Files: ...
    def __getitem__(self, index: int | slice) -> Pixels | Files:
        return Files(self.paths[index]) if isinstance(index, slice) else decode(self.paths[index])


def decode(path: Path) -> Pixels:
    """Pixels as a viewer shows them: turned as the camera says, transparency on white."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode == "P" or "transparency" in image.info or image.mode in ("LA", "PA", "RGBA", "La", "RGBa"):
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"--data: cannot read image {path}: {error}") from error


def load(path: Path, *, max_classes: int | None = None) -> Dataset:
    """Find the images below ``path``; sub-folders with a single image are left out, with a note."""
    if not path.is_dir():
        raise DataError(f"--data folder:{path}: no such folder")
    found = {entry.name: _images(entry) for entry in sorted(path.iterdir()) if entry.is_dir()}
    usable = [name for name, files in found.items() if len(files) >= MIN_IMAGES]
    if len(usable) < split.MIN_CLASSES:
        raise DataError(
            f"--data folder:{path}: {len(usable)} usable classes (sub-folders with {MIN_IMAGES} images or more, "
            f"of {len(found)} sub-folders); {split.MIN_CLASSES} are needed, two to train on and two to test on"
        )
    if len(usable) < len(found):
        few = len(found) - len(usable)
        print(f"{path}: {few} sub-folders with fewer than {MIN_IMAGES} images left out", file=sys.stderr)
    chosen = split.choose(usable, max_classes)
    files = [file for name in chosen for file in found[name]]
    for file in files:
        _check(file)
    return split.class_disjoint(
        f"folder {path.name}",
        [file.relative_to(path).parts[0] for file in files],
        [str(file.relative_to(path)) for file in files],
        pick=lambda where: Files([files[i] for i in where.tolist()]),
        mirror=True,
    )


def _images(folder: Path) -> list[Path]:
    """Every image file in a folder and the folders inside it, sorted; hidden files left out."""
    return sorted(
        Path(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
    )


def _check(path: Path) -> None:
    """Raise DataError unless the file starts like an image; reads its header only."""
    try:
        Image.open(path).close()
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"--data: cannot read image {path}: {error}") from error
