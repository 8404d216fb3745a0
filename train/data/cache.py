"""Arrays kept in one checked file: whole or absent, never half written, never silently changed."""

from __future__ import annotations

import hashlib
import os
import secrets
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from .part import DataError

Arrays = dict[str, NDArray[np.generic]]
_DIGEST = "sha256"


class CorruptCache(Exception):
    """The file is there and is not what was written."""


def folder(chosen: Path | None) -> Path:
    """``chosen``, else ``$XBN_CACHE``, else ``~/.cache/xbn_ext``.

    Raises:
        DataError: there is no home folder.
    """
    place = chosen or Path(os.environ.get("XBN_CACHE") or "~/.cache/xbn_ext")
    try:
        return place if chosen else place.expanduser()
    except RuntimeError as error:
        raise DataError(f"--cache: {place} cannot be found, as there is no home folder; choose a folder") from error


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, under a name of its own, renamed at the end: an interruption or a second writer leaves one whole
    file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save(path: Path, arrays: Arrays) -> None:
    """Write them as ``writing`` does."""
    digest: Arrays = {_DIGEST: np.frombuffer(_digest(arrays), np.uint8)}
    with writing(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays, **digest)


def read(path: Path) -> Arrays | None:
    """The arrays, None if there is no such file; raises CorruptCache if their SHA-256 is not the one stored."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays: Arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise CorruptCache(f"{path}: {error}") from error
    stored = arrays.pop(_DIGEST, None)
    if stored is None or stored.tobytes() != _digest(arrays):
        raise CorruptCache(f"{path}: the SHA-256 of its content is not the one stored in it")
    return arrays


def _digest(arrays: Arrays) -> bytes:
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha.update(f"{name} {array.dtype.str} {array.shape};".encode())
        sha.update(array.view(np.uint8).data if array.size else b"")
    return sha.digest()
