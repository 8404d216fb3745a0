"""A folder of images, one sub-folder per class."""

from __future__ import annotations

import sys
from pathlib import Path

from . import DataError, Dataset, images, split
from .tree import Tree

MIN_IMAGES = 2


def load(path: Path, *, max_classes: int | None = None) -> Dataset:
    """Find the images below ``path``, and see that they start like images.

    Every file and folder that is left out is counted on stderr: what is hidden, what Pillow does not decode here,
    second links to one image or folder, sub-folders with a single image.

    Raises:
        DataError: there are too few classes; or names a folder or image that cannot be read.
    """
    if not path.is_dir():
        raise DataError(f"--data folder:{path}: no such folder")
    tree = Tree(path)
    for note in tree.notes():
        print(note, file=sys.stderr)
    usable = [name for name, files in tree.classes.items() if len(files) >= MIN_IMAGES]
    if len(usable) < split.MIN_CLASSES:
        raise DataError(
            f"--data folder:{path}: {len(usable)} usable classes (sub-folders with {MIN_IMAGES} images or more, "
            f"of {len(tree.classes)} sub-folders); {split.MIN_CLASSES} are needed, two to train on and two to test on"
        )
    few = [name for name in tree.classes if name not in set(usable)]
    if few:
        named = f"{len(few)} sub-folders with fewer than {MIN_IMAGES} images left out: {images.few(few)}"
        print(f"{path}: {named}", file=sys.stderr)
    chosen = split.choose(usable, max_classes)
    files = [(name, file) for name in chosen for file in tree.classes[name]]
    images.check_all(file for _, file in files)
    return split.class_disjoint(
        f"folder {path.name}",
        [name for name, _ in files],
        [tree.source(file) for _, file in files],
        pick=lambda where: images.Files([files[i][1] for i in where.tolist()]),
        mirror=True,
    )
