"""What one folder of DeepFashion2 holds: read from its 32,000 to 192,000 JSON files, then from a stored index.

The index is stored with the names, sizes and times of all files it was made from, and is made again when any differs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from tqdm import tqdm

from .. import terminal
from . import cache, images
from .images import Box
from .part import DataError

VERSION = 1
"""To be raised when what is stored changes."""
SOURCES = ("user", "shop")


class Garment(NamedTuple):
    """One garment in one photograph."""

    image: str
    """Relative to the folder of the data set: ``validation/image/000001.jpg``."""
    item: str
    """Which of the photograph's garments: ``item1`` ..."""
    box: Box
    """Inside the image."""
    shop: bool
    """Photographed by a shop; else by a user."""
    pair: int
    style: int
    """0: the only one of its kind."""
    category: str

    @property
    def key(self) -> str:
        """Its class: pair and style, which start again in each folder; or itself if it has no style."""
        side = self.image.partition("/")[0]
        own = "" if self.style else f", {Path(self.image).stem} {self.item}"
        return _in_utf8(f"{side} pair {self.pair} style {self.style}{own}")


class Index(NamedTuple):
    """The garments of one folder."""

    garments: list[Garment]
    images: int
    """Annotated ones."""
    degenerate: int
    """Garments left out because no pixel of their box is in the image."""


def read(folder: Path, cache_dir: Path | None) -> Index:
    """The garments of ``folder``, which has ``annos`` and ``image``, in the order of their files.

    Raises:
        DataError: names the annotation that is broken, or the image that is missing or broken.
    """
    state = _state(folder)
    place = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:12]
    path = cache.folder(cache_dir) / f"deepfashion2-{folder.name}-{place}.npz"
    try:
        stored = cache.read(path)
    except cache.CorruptCache as error:
        terminal.note(f"the stored index is damaged and will be made again: {error}")
        stored = None
    if stored is not None and str(stored["state"]) == state:
        return _unpack(stored)
    index = _scan(folder)
    try:
        cache.save(path, _pack(index, state))
    except OSError as error:
        terminal.note(f"the index could not be stored and will be made again next time: {error}")
    return index


def _state(folder: Path) -> str:
    """A digest that differs when a file was added, removed, renamed or written to."""
    sha = hashlib.sha256(f"{VERSION}".encode())
    for name in ("annos", "image"):
        with os.scandir(folder / name) as entries:
            files = [(entry.name, entry.stat()) for entry in entries]
        for file, stat in sorted(files, key=lambda pair: pair[0]):
            sha.update(f"{name}/{file} {stat.st_size} {stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return sha.hexdigest()


def _scan(folder: Path) -> Index:
    annotations = sorted((folder / "annos").glob("*.json"))
    absent = images.missing([_image_of(path) for path in annotations])
    if absent:
        raise DataError(f"--data: {len(absent):,} annotations have no image, or an empty one, the first {absent[0]}")
    garments: list[Garment] = []
    degenerate = 0
    for path in tqdm(annotations, f"reading {folder.name}", unit=" files", leave=False, disable=None):
        found = _garments(path, _load(path))
        size = images.check(_image_of(path)) if found else (0, 0)
        for garment in found:
            box = images.clip(garment.box, size)
            if box is None:
                degenerate += 1
            else:
                garments.append(garment._replace(box=box))
    return Index(garments, len(annotations), degenerate)


def _image_of(annotation: Path) -> Path:
    return annotation.parent.parent / "image" / f"{annotation.stem}.jpg"


def _load(path: Path) -> dict[str, Any]:
    try:
        if path.is_fifo():
            raise OSError("it is a pipe")  # to open it would wait for a writer
        content = json.loads(path.read_bytes(), parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"--data: cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"--data: {path}: expected a JSON object")
    return content


def _in_utf8(text: str) -> str:
    """Half a character, which JSON allows, or a byte of a file's name is what Python shows of it."""
    return text.encode(errors="backslashreplace").decode()


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number")


def _whole(value: object) -> TypeGuard[int]:
    """Whether it is a whole number that the index can hold; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _garments(path: Path, content: dict[str, Any]) -> list[Garment]:
    """What an annotation tells; garments of users without a style are left out: no query asks for them."""
    source, pair = content.get("source"), content.get("pair_id")
    if source not in SOURCES:
        raise DataError(f"--data: {path}: source {source!r} is neither user nor shop")
    if not _whole(pair):
        raise DataError(f"--data: {path}: pair_id {pair!r} is not a number")
    image = f"{path.parent.parent.name}/image/{path.stem}.jpg"
    garments = []
    for item in sorted(name for name in content if name.startswith("item")):
        values = content[item] if isinstance(content[item], dict) else {}
        style, box = values.get("style"), values.get("bounding_box")
        if not _whole(style) or style < 0:
            raise DataError(f"--data: {path}: style {style!r} of {item} is not a number")
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, float) or _whole(v) for v in box):
            raise DataError(f"--data: {path}: bounding_box {box!r} of {item} is not four numbers")
        if not all(map(math.isfinite, box)):  # 1e400, which JSON allows
            raise DataError(f"--data: {path}: bounding_box {box!r} of {item} is not finite")
        whole = (math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3]))
        category = _in_utf8(str(values.get("category_name", "?")))
        if source == "shop" or style > 0:
            garments.append(Garment(image, _in_utf8(item), whole, source == "shop", pair, style, category))
    return garments


def _pack(index: Index, state: str) -> cache.Arrays:
    columns = {name: np.array([getattr(g, name) for g in index.garments]) for name in Garment._fields}
    counts = np.array([index.images, index.degenerate])
    return {**columns, "counts": counts, "state": np.array(state)}


def _unpack(arrays: cache.Arrays) -> Index:
    columns = {name: arrays[name].tolist() for name in Garment._fields}
    columns["box"] = [tuple(box) for box in columns["box"]]
    garments = [Garment(*values) for values in zip(*columns.values(), strict=True)]
    count, degenerate = arrays["counts"].tolist()
    return Index(garments, count, degenerate)
