"""What a data set is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from . import fingerprint
from .part import Part


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
        return fingerprint.of(self.summary(), tuple(self.parts.values()), (self.queries, self.gallery))

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
