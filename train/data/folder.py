"""A folder of images, one sub-folder per class."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from PIL import Image

from . import DataError, Dataset, images, split

MIN_IMAGES = 2
SUFFIXES = frozenset(Image.registered_extensions())


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
        images.check(file)
    return split.class_disjoint(
        f"folder {path.name}",
        [file.relative_to(path).parts[0] for file in files],
        [str(file.relative_to(path)) for file in files],
        pick=lambda where: images.Files([files[i] for i in where.tolist()]),
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
