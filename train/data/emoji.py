"""Emoji drawn by eight vendors: 17,714 images of 3,298 classes, to be matched across drawing styles.

Each vendor draws an emoji once, so a class has four to eight images, and recognising one from another is retrieval
across styles. The sets come from npm as SVG, are drawn once at 64 x 64 on white, and are kept in a checked file.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import terminal
from . import cache, emoji_names, iconify, npm, split, svg
from .dataset import Dataset
from .emoji_names import IconSet
from .part import DataError
from .split import DEFAULT, Test

PACKAGES = {  # vendor: version of the npm package @iconify-json/VENDOR
    "twemoji": "1.2.5",
    "noto": "1.2.9",
    "openmoji": "1.2.29",
    "fluent-emoji-flat": "1.2.6",
    "fluent-emoji-high-contrast": "1.2.6",
    "emojione": "1.2.3",
    "emojione-v1": "1.2.3",
    "fxemoji": "1.2.2",
}
SIZE = 64
MIN_IMAGES = 4
CLASSES, IMAGES = 3298, 17714
RECIPE = f"1 {SIZE} {MIN_IMAGES} {sorted(PACKAGES.items())}"  # raise the first number when the drawing changes


class Drawing(NamedTuple):
    """One vendor's picture of one emoji."""

    key: str
    vendor: str
    icon: str


def load(*, cache_dir: Path | None = None, max_classes: int | None = None, test: Test = DEFAULT) -> Dataset:
    """The emoji, from the cache or else fetched and drawn (a minute); see ``train.data.load`` for the arguments."""
    arrays = _cached(cache.folder(cache_dir), max_classes)
    keys = [str(key) for key in arrays["keys"]]
    images = arrays["images"]
    if max_classes is None and (len(set(keys)), len(images)) != (CLASSES, IMAGES):
        raise DataError(f"emoji: {len(images):,} images of {len(set(keys)):,} classes, not {IMAGES:,} of {CLASSES:,}")
    chosen = set(split.choose(sorted(set(keys)), max_classes))
    kept = np.array([key in chosen for key in keys])
    images, keys = images[kept], [key for key in keys if key in chosen]
    return split.divide(
        "emoji",
        keys,
        [str(vendor) for vendor in arrays["vendors"][kept]],
        pick=lambda where: images[where],
        test=test,
        titles=dict(zip(map(str, arrays["title_keys"]), map(str, arrays["titles"]), strict=True)),
        mirror=False,
        credit=tuple(str(line) for line in arrays["credit"]),
    )


def code_points(*, cache_dir: Path | None = None, max_classes: int | None = None) -> dict[str, str]:
    """The code points of each class by its readable name: hexadecimal, joined by '-', without U+FE0F."""
    arrays = _cached(cache.folder(cache_dir), max_classes)
    return dict(zip(map(str, arrays["titles"]), map(str, arrays["title_keys"]), strict=True))


def _cached(folder: Path, max_classes: int | None) -> cache.Arrays:
    """The stored arrays of all classes, else of the chosen ones, else new ones, which are then stored."""
    fingerprint = hashlib.sha256(RECIPE.encode()).hexdigest()[:8]
    every = folder / f"emoji-{fingerprint}.npz"
    wanted = every if max_classes is None else folder / f"emoji-{fingerprint}-{max_classes}.npz"
    for path in dict.fromkeys((every, wanted)):
        try:
            arrays = cache.read(path)
        except cache.CorruptCache as error:
            terminal.note(f"cached emoji are damaged and will be made again: {error}")
            continue
        if arrays is not None:
            return arrays
    arrays = _make(max_classes)
    try:
        cache.save(wanted, arrays)
    except OSError as error:
        terminal.note(f"the emoji could not be cached and will be made again next time: {error}")
    return arrays


def _make(max_classes: int | None) -> cache.Arrays:
    """Fetch the packages, find out which icon draws which emoji, and draw those of the chosen classes."""
    terminal.note(f"fetching {len(PACKAGES)} emoji sets from npm")
    with tempfile.TemporaryDirectory(prefix="xbn-emoji-") as folder:
        specs = [f"@iconify-json/{vendor}@{version}" for vendor, version in PACKAGES.items()]
        files = [npm.read_json(tgz, ("icons", "chars", "info")) for tgz in npm.pack(specs, Path(folder))]
    sets = [IconSet(vendor, **content) for vendor, content in zip(PACKAGES, files, strict=True)]
    drawings = choose_drawings(sets, max_classes)
    titles = emoji_names.titles(sets)
    by_vendor = {icon_set.vendor: icon_set for icon_set in sets}
    chosen = sorted({drawing.key for drawing in drawings})
    sketches = [svg.Sketch(f"{d.vendor}:{d.icon}", iconify.svg_of(by_vendor[d.vendor].icons, d.icon)) for d in drawings]
    return {
        "images": svg.draw_all(sketches, SIZE),
        "keys": np.array([drawing.key for drawing in drawings]),
        "vendors": np.array([drawing.vendor for drawing in drawings]),
        "title_keys": np.array(chosen),
        "titles": np.array([titles[key] for key in chosen]),
        "credit": np.array([iconify.credit(icon_set.info) for icon_set in sets]),
    }


def choose_drawings(sets: Sequence[IconSet], max_classes: int | None) -> list[Drawing]:
    """The pictures of every class that enough vendors draw, or of ``max_classes`` of them, sorted."""
    known = emoji_names.known_names(sets)
    found = [
        Drawing(key, icon_set.vendor, icon)
        for icon_set in sets
        for key, icon in emoji_names.icons_by_class(icon_set, known).items()
    ]
    counts = Counter(drawing.key for drawing in found)
    chosen = set(split.choose([key for key, count in counts.items() if count >= MIN_IMAGES], max_classes))
    return sorted(drawing for drawing in found if drawing.key in chosen)
