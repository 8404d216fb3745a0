"""What a data set is, and the one function that loads one: ``load("emoji")``, ``load("folder:PATH")`` and others.

The data layer knows numpy and PIL only, so that the processes that draw pictures start without torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .split import Test

Pixels = NDArray[np.uint8]
"""One image: [height, width, 3], RGB."""


class DataError(ValueError):
    """The data cannot be used; the message says which argument, folder or file is at fault."""


@dataclass(frozen=True)
class Part:
    """One side of the split: images and, for each, a label that indexes ``classes``."""

    images: Sequence[Pixels] | NDArray[np.float32]
    """N images, each uint8 [height, width, 3]; sizes may differ. Or features in their place, [N, F]."""
    labels: NDArray[np.int64]
    """[N], values 0 .. len(classes)-1, every class present."""
    classes: tuple[str, ...]
    """Readable class names."""
    sources: tuple[str, ...]
    """Where each of the N images comes from: a vendor, or a file name."""

    def __post_init__(self) -> None:
        if not len(self.images) == len(self.labels) == len(self.sources):
            raise ValueError(f"{len(self.images)} images, {len(self.labels)} labels, {len(self.sources)} sources")


@dataclass(frozen=True)
class Dataset:
    """Two parts and how a test is done. They share no class, except where a user has it so."""

    name: str
    train: Part
    test: Part
    """Without images where nothing is tested."""
    mirror: bool
    """True if a mirrored image still shows its class (not so for arrows, letters and flags)."""
    credit: tuple[str, ...] = ()
    """Who made the pictures and under which licence, one line each."""
    makers: Mapping[str, str] = field(default_factory=dict)
    """Where there are many: the line of credit of the sources that begin with ``NAME:``, by that name; else empty."""
    queries: NDArray[np.int64] | None = None
    """[Q], positions of the test images that query ``gallery``; None: every test image queries all the others."""
    gallery: NDArray[np.int64] | None = None
    """[G], positions of the test images to be found, a query never by itself; None together with ``queries``."""
    recalls: tuple[int, ...] = (1, 10, 100)
    """Each K of Recall@K that is reported, ascending from 1."""
    validation: Part | None = None
    """Of other classes than ``train``, to choose by: every image queries all the others."""

    def __post_init__(self) -> None:
        if (self.queries is None) != (self.gallery is None):
            raise ValueError("queries and gallery go together")
        if self.recalls[:1] != (1,) or list(self.recalls) != sorted(set(self.recalls)):
            raise ValueError(f"recalls {self.recalls}: must ascend from 1")

    @property
    def tested(self) -> bool:
        """Whether there is anything to test on."""
        return len(self.test.labels) > 0

    @property
    def parts(self) -> dict[str, Part]:
        """By name: train, test and, if there is one, validation."""
        beside = {} if self.validation is None else {"validation": self.validation}
        return {"train": self.train, "test": self.test, **beside}

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """What tells it from other data: see ``train.data.fingerprint``."""
        from . import fingerprint

        return fingerprint.of(self)

    def credit_of(self, sources: Iterable[str]) -> tuple[str, ...]:
        """The lines of credit of some images, by their sources; all lines, if it is not known who made which."""
        if not self.makers:
            return self.credit
        return tuple(self.makers[name] for name in sorted({source.partition(":")[0] for source in sources}))

    def summary(self) -> str:
        """The counts, on one line."""
        sides = {side: f"{len(p.labels):,} images of {len(p.classes):,} classes" for side, p in self.parts.items()}
        counts = [f"{side}: {count}" if side != "test" or self.tested else "no test" for side, count in sides.items()]
        if self.queries is not None and self.gallery is not None:
            counts.append(f"{len(self.queries):,} queries against a gallery of {len(self.gallery):,}")
        return ", ".join(counts)


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
    from . import split

    check_spec(spec)
    try:
        return _load(spec, cache_dir, max_classes, test or split.DEFAULT)
    except OSError as error:  # a folder on the way there may not be entered, a name is too long
        raise DataError(f"--data {spec}: {error}") from error


def _load(spec: str, cache_dir: Path | None, max_classes: int | None, test: Test) -> Dataset:
    kind = spec.partition(":")[0]
    if kind == "emoji":
        from . import emoji

        return emoji.load(cache_dir=cache_dir, max_classes=max_classes, test=test)
    if kind == "icons":
        from . import icons

        return icons.load(cache_dir=cache_dir, max_classes=max_classes, test=test)
    path = place(spec)
    if kind == "folder":
        from . import folder

        return folder.load(path, max_classes=max_classes, test=test)
    if kind == "csv":
        from . import table

        return table.load(path, max_classes=max_classes, test=test)
    test.refuse(spec, "that of the benchmark")
    if kind == "sop":
        from . import sop

        return sop.load(path, max_classes=max_classes)
    if kind == "inshop":
        from . import inshop

        return inshop.load(path, max_classes=max_classes)
    from . import deepfashion2

    return deepfashion2.load(path, cache_dir=cache_dir, max_classes=max_classes)
