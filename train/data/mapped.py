"""Many small images in one file, grey, read where they are asked for: little of them is in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from . import cache
from .part import Pixels

BLOCK = 1 << 20
"""Bytes read at once."""


class Mapped(Sequence[Pixels]):
    """Images of a file that ``save`` wrote, each uint8 [height, width, 3], all three channels alike."""

    def __init__(self, path: Path, where: NDArray[np.int64]) -> None:
        """Read nothing.

        Args:
            path: the file, uint8 [N, height, width].
            where: [M], the images that are meant, 0 .. N-1.
        """
        self.path, self.where = path, where
        self._grey = _open(path)

    def __len__(self) -> int:
        return len(self.where)

    @overload
    def __getitem__(self, index: int) -> Pixels: ...
    @overload
    def __getitem__(self, index: slice) -> Mapped: ...
    def __getitem__(self, index: int | slice) -> Pixels | Mapped:
        if isinstance(index, slice):
            return Mapped(self.path, self.where[index])
        return np.repeat(np.asarray(self._grey[self.where[index]])[:, :, None], 3, axis=2)

    def __reduce__(self) -> tuple[type[Mapped], tuple[Path, NDArray[np.int64]]]:
        """For other processes, which open the file themselves: the pixels would be copied otherwise."""
        return Mapped, (self.path, self.where)


def save(path: Path, count: int, blocks: Iterable[NDArray[np.uint8]]) -> str:
    """Write images [n, height, width], block by block, ``count`` in all; returns the file's SHA-256.

    It is whole under its name or not there.
    """
    with cache.writing(path) as file:
        done = 0
        for block in blocks:
            if not done:
                header = {"descr": "|u1", "fortran_order": False, "shape": (count, *block.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(block).data)
            done += len(block)
        if done != count:
            raise ValueError(f"{done} images, not {count}")
        file.flush()
        return _digest(Path(file.name))


def check(path: Path, digest: str) -> None:
    """Raise CorruptCache unless the file is there and its SHA-256 is ``digest``."""
    try:
        found = _digest(path)
    except OSError as error:
        raise cache.CorruptCache(f"{path}: {error}") from error
    if found != digest:
        raise cache.CorruptCache(f"{path}: its SHA-256 is not the one stored")


def _digest(path: Path) -> str:
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            sha.update(block)
    return sha.hexdigest()


def _open(path: Path) -> NDArray[np.uint8]:
    grey: NDArray[np.uint8] = np.load(path, mmap_mode="r", allow_pickle=False)
    return grey
