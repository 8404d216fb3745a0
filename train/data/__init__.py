"""The one function that loads a data set: ``load("emoji")``, ``load("folder:PATH")`` and others.

The data layer knows numpy and PIL only, so that the processes that draw pictures start without torch.
"""

from __future__ import annotations

from pathlib import Path

from . import deepfashion2, emoji, folder, icons, inshop, sop, split, table
from .dataset import Dataset
from .part import DataError, Part, Pixels
from .split import Test

__all__ = ["KINDS", "PUBLIC", "DataError", "Dataset", "Part", "Pixels", "check_spec", "load", "place"]

PUBLIC = ("emoji", "icons")
"""Those that are fetched."""
KINDS = ("folder", "csv", "sop", "inshop", "deepfashion2")
"""Those that are somewhere on this machine: ``KIND:PATH``."""


def check_spec(spec: str) -> None:
    """Raise DataError unless ``spec`` names a kind of data set, in UTF-8, and a known home folder; touches no file."""
    kind, _, path = spec.partition(":")
    if not (spec in PUBLIC or (kind in KINDS and path)):
        allowed = " or ".join([*(f"'{name}'" for name in PUBLIC), *(f"'{kind}:PATH'" for kind in KINDS)])
        raise DataError(f"--data {spec}: expected {allowed}")
    try:
        spec.encode()
    except UnicodeEncodeError:  # no picture could show its name, nor a report
        raise DataError(f"--data {spec!r}: is not UTF-8: rename it") from None
    if "\0" in spec:
        raise DataError(f"--data {spec!r}: has a null character, which no name has")
    if path:
        place(spec)


def place(spec: str) -> Path:
    """The folder or file that ``KIND:PATH`` names.

    Raises:
        DataError: PATH begins with the home folder of a user whose home is not known.
    """
    path = spec.partition(":")[2]
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(f"--data {spec}: the home folder {Path(path).parts[0]} is not known here") from error


def load(
    spec: str, *, cache_dir: Path | None = None, max_classes: int | None = None, test: Test | None = None
) -> Dataset:
    """Load the data set that ``spec`` names.

    Args:
        spec: ``"emoji"``; ``"icons"``; ``"folder:PATH"`` with one sub-folder per class; ``"csv:FILE"``, a table of
            images; or ``"sop:PATH"``, ``"inshop:PATH"``, ``"deepfashion2:PATH"``, a copy of that benchmark.
        cache_dir: folder for downloaded data and indices; None means ``$XBN_CACHE``, else ``~/.cache/xbn_ext``.
        max_classes: use only this many classes, train and test together, always the same ones.
        test: what is tested on, for data without a split of their own; None: half of the classes.

    Raises:
        DataError: what is wrong with the data, and where; or ``test`` asks something of data with a split.
    """
    check_spec(spec)
    try:
        return _load(spec, cache_dir, max_classes, test or split.DEFAULT)
    except OSError as error:  # a folder on the way there may not be entered, a name is too long
        raise DataError(f"--data {spec}: {error}") from error


def _load(spec: str, cache_dir: Path | None, max_classes: int | None, test: Test) -> Dataset:
    kind = spec.partition(":")[0]
    if kind == "emoji":
        return emoji.load(cache_dir=cache_dir, max_classes=max_classes, test=test)
    if kind == "icons":
        return icons.load(cache_dir=cache_dir, max_classes=max_classes, test=test)
    path = place(spec)
    if kind == "folder":
        return folder.load(path, max_classes=max_classes, test=test)
    if kind == "csv":
        return table.load(path, max_classes=max_classes, test=test)
    test.refuse(spec, "that of the benchmark")
    if kind == "sop":
        return sop.load(path, max_classes=max_classes)
    if kind == "inshop":
        return inshop.load(path, max_classes=max_classes)
    return deepfashion2.load(path, cache_dir=cache_dir, max_classes=max_classes)
