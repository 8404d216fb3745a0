"""DeepFashion2: garments in photographs of shops and of users, each cut out by its box, to be matched across the two.

Garments of the folder ``train`` are trained on; in ``validation``, those of users query those of shops (Ge et al.,
arXiv 1901.07973). A garment's identity is the ``pair_id`` of its photograph with its own ``style``, where that is more
than 0; photographs of one identity may name its category differently. Garments of shops with style 0, which match
nothing, stay in the gallery, each a class of its own. Here garments are cut out by the annotated boxes, where the
challenge also has them detected.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .. import terminal
from . import benchmark, deepfashion2_index, images
from .benchmark import Source
from .dataset import Dataset
from .deepfashion2_index import Garment
from .part import Part

SOURCE = Source(
    "deepfashion2",
    "DeepFashion2",
    "the unpacked folders train/annos, train/image, validation/annos and validation/image",
    "https://github.com/switchablenorms/DeepFashion2, which has a form to fill in for the password",
)
SIDES = ("train", "validation")
PUBLISHED = {"train": 191961, "validation": 32153}
"""Annotated images of the release."""
RECALLS = (1, 10, 20)
MIN_IMAGES = 2
"""To train on; a garment seen once matches nothing."""


def load(path: Path, *, cache_dir: Path | None = None, max_classes: int | None = None) -> Dataset:
    """Find the garments, in a stored index if the folders are as they were, and see that their images are there.

    ``max_classes`` chooses among the identities trained on and those queried; the gallery has no others then. See
    ``train.data.load`` for the arguments.
    """
    for side in SIDES:
        for name in ("annos", "image"):
            if not (path / side / name).is_dir():
                raise SOURCE.error(path, f"there is no folder {side}/{name}")
    found = {side: deepfashion2_index.read(path / side, cache_dir) for side in SIDES}
    for side, index in found.items():
        if index.images != PUBLISHED[side]:
            _note(f"{side} has {index.images:,} annotations, not the {PUBLISHED[side]:,} of the release: "
                  "scores cannot be compared with others'")  # fmt: skip
        if index.degenerate:
            _note(f"{side}: {index.degenerate:,} garments left out, no pixel of whose box is in the image")
    train = _seen_often([g for g in found["train"].garments if g.style > 0])
    queries, gallery = _queries_and_gallery(found["validation"].garments)
    if min(len({g.key for g in side}) for side in (train, queries)) < 2:
        raise SOURCE.error(path, "two identities to train on and two to query are needed")
    keep = benchmark.choose((g.key for g in train), (g.key for g in queries), max_classes)
    train = [g for g in train if g.key in keep[0]]
    if max_classes is not None:
        queries, gallery = ([g for g in side if g.key in keep[1]] for side in (queries, gallery))
    numbers = np.arange(len(queries) + len(gallery), dtype=np.int64)
    return Dataset(
        SOURCE.title,
        _part(path, train),
        _part(path, [*queries, *gallery]),
        mirror=True,
        queries=numbers[: len(queries)],
        gallery=numbers[len(queries) :],
        recalls=RECALLS,
    )


def _seen_often(garments: list[Garment]) -> list[Garment]:
    counts = Counter(garment.key for garment in garments)
    rare = sum(count < MIN_IMAGES for count in counts.values())
    if rare:
        _note(f"train: {rare:,} identities with fewer than {MIN_IMAGES} images left out")
    return [garment for garment in garments if counts[garment.key] >= MIN_IMAGES]


def _queries_and_gallery(garments: list[Garment]) -> tuple[list[Garment], list[Garment]]:
    gallery = [garment for garment in garments if garment.shop]
    asked = [garment for garment in garments if not garment.shop and garment.style > 0]
    there = {garment.key for garment in gallery}
    queries = [garment for garment in asked if garment.key in there]
    if len(queries) < len(asked):
        _note(f"validation: {len(asked) - len(queries):,} garments of users left out, which no shop shows")
    return queries, gallery


def _part(path: Path, garments: Sequence[Garment]) -> Part:
    """Garments in the order given, one class for each identity."""
    categories: dict[str, set[str]] = defaultdict(set)
    for garment in garments:
        categories[garment.key].add(garment.category)
    classes, labels = np.unique(np.asarray([garment.key for garment in garments]), return_inverse=True)
    return Part(
        images.Files([path / g.image for g in garments], np.array([g.box for g in garments], np.int64)),
        labels.astype(np.int64),
        tuple(f"{key} ({', '.join(sorted(categories[key]))})" for key in map(str, classes)),
        tuple(f"{garment.image} {garment.item}" for garment in garments),
    )


def _note(text: str) -> None:
    terminal.note(f"DeepFashion2, {text}")
