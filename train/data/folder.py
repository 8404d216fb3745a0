"""A folder of images, one sub-folder per class; or two such folders, to train on and to test on."""

from __future__ import annotations

import os
from pathlib import Path

from .. import terminal
from . import images, own, split
from .dataset import Dataset
from .formats import SUFFIXES
from .own import MIN_IMAGES
from .part import DataError
from .split import DEFAULT, Test
from .tree import Tree, hidden

EVENTS = "tensorboard"
"""The sub-folder that a run makes of its ``--out``, which may be the folder of the data."""
TESTED_ON = ("test", "validation", "val")
"""Beside ``train``, the first of these that is there."""


def load(path: Path, *, max_classes: int | None = None, test: Test = DEFAULT) -> Dataset:
    """Find the images below ``path``, and see that they start like images.

    Every file and folder that is left out is counted on stderr: what is hidden, what Pillow does not decode here,
    second links to one image or folder, sub-folders with a single image.

    Raises:
        DataError: there are too few classes; or names a folder or image that cannot be read.
    """
    if not path.is_dir():
        raise DataError(f"--data folder:{path}: no such folder")
    sides = _divided(path)
    if sides is not None:
        test.refuse(f"folder:{path}", f"its sub-folders {' and '.join(side.name for side in sides)}")
        train, tested_on = (_images(side) for side in sides)
        both = {os.path.realpath(image.file) for image in train} & {os.path.realpath(image.file) for image in tested_on}
        if both:
            raise DataError(f"--data folder:{path}: {len(both)} images are in both folders: {images.few(sorted(both))}")
        return own.dataset(f"folder:{path}", f"folder {name_of(path)}", train, tested_on, max_classes)
    tree = _tree(path)
    usable = [name for name, files in tree.classes.items() if len(files) >= MIN_IMAGES]
    if len(usable) < test.least_classes:
        raise DataError(
            f"--data folder:{path}: {len(usable)} usable classes (sub-folders with {MIN_IMAGES} images or more, "
            f"of {len(tree.classes)} sub-folders); {test.needed}"
        )
    few = [name for name in tree.classes if name not in set(usable)]
    if few:
        named = f"{len(few)} sub-folders with fewer than {MIN_IMAGES} images left out: {images.few(few)}"
        terminal.note(f"{path}: {named}")
    chosen = split.choose(usable, max_classes)
    files = [(name, file) for name in chosen for file in tree.classes[name]]
    images.check_all(file for _, file in files)
    return split.divide(
        f"folder {name_of(path)}",
        [name for name, _ in files],
        [tree.source(file) for _, file in files],
        pick=lambda where: images.Files([files[i][1] for i in where.tolist()]),
        test=test,
        files=[file for _, file in files],
        mirror=True,
    )


def name_of(path: Path) -> str:
    """The name of a folder, of "." and ".." too."""
    return Path(os.path.abspath(path)).name or str(path)


def pictures(path: Path) -> list[Path]:
    """All images below ``path``, whatever their folders, in the order of their names; what is hidden is left out, and
    so are links to folders.

    Raises:
        DataError: there are no images, or a folder cannot be read.
    """

    def refuse(error: OSError) -> None:  # else it would be passed over
        raise DataError(f"cannot read folder {error.filename}: {error.strerror}")

    found = []
    for place, folders, names in os.walk(path, onerror=refuse):
        folders[:] = [name for name in folders if not hidden(name)]
        found += [Path(place, name) for name in names if not hidden(name)]
    suffixed = (file for file in found if file.suffix.lower() in SUFFIXES)
    files = sorted(file for file in suffixed if os.path.isfile(file) or not os.path.exists(file))  # no pipe
    if not files:
        raise DataError(f"{path}: no pictures in it")
    return files


def _tree(path: Path) -> Tree:
    tree = Tree(path)
    for note in tree.notes():
        terminal.note(note)
    return tree


def _divided(path: Path) -> tuple[Path, Path] | None:
    """The folders to train on and to test on, where there are no others; None where each sub-folder is a class."""
    names = {entry.name for entry in path.iterdir() if entry.is_dir() and not hidden(entry.name)} - {EVENTS}
    tested_on = [name for name in TESTED_ON if name in names]
    if not tested_on or names - set(TESTED_ON) != {"train"}:
        return None
    if tested_on[1:]:
        terminal.note(f"{path}: {' and '.join(tested_on[1:])} left out, {tested_on[0]} is tested on")
    return path / "train", path / tested_on[0]


def _images(path: Path) -> list[own.Image]:
    tree = _tree(path)
    found = [own.Image(name, file, tree.source(file)) for name, files in sorted(tree.classes.items()) for file in files]
    images.check_all(image.file for image in found)
    return found
