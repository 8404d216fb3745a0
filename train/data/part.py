"""What a data set is made of: images, each of a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
