"""What tells a data set from others: every aspect of it that a run depends on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from train.data import DataError, Dataset, Part, fingerprint, images


def part(name: str, paths: list[Path] | None = None) -> Part:
    pixels = np.arange(4 * 12, dtype=np.uint8).reshape(4, 2, 2, 3)
    pictures = list(pixels) if paths is None else images.Files(paths, np.array([[0, 0, 2, 2]] * 4))
    return Part(pictures, np.array([0, 0, 1, 1]), (f"{name}a", f"{name}b"), ("1", "2", "3", "4"))


def data(paths: list[Path] | None = None) -> Dataset:
    return Dataset("x", part("train "), part("test ", paths), mirror=True)


def differences(one: Dataset, other: Dataset) -> list[str]:
    return fingerprint.differences(one.fingerprint, other.fingerprint)


def test_the_same_data_have_one_fingerprint() -> None:
    assert differences(data(), data()) == []
    stacked = replace(data(), test=replace(part("test "), images=np.stack(part("").images)))
    assert differences(data(), stacked) == [], "however they are kept"


@pytest.mark.parametrize(
    ("changes", "aspect"),
    [
        ({"labels": np.array([0, 1, 1, 1])}, "labels"),
        ({"classes": ("test a", "c")}, "class names"),
        ({"sources": ("1", "2", "34", "")}, "image names"),
        ({"images": list(np.zeros((4, 2, 2, 3), np.uint8))}, "images"),
        ({"images": list(np.arange(4 * 12, dtype=np.uint8).reshape(4, 1, 4, 3))}, "images"),
    ],
)
def test_every_aspect_counts(changes: dict[str, object], aspect: str) -> None:
    changed = replace(data(), test=replace(part("test "), **changes))  # type: ignore[arg-type]
    assert differences(data(), changed) == [aspect]


def test_queries_and_gallery_count() -> None:
    first, second = np.array([0, 1]), np.array([2, 3])
    one, other = (replace(data(), queries=q, gallery=g) for q, g in ((first, second), (second, first)))
    assert differences(one, other) == ["labels"]


def test_of_files_sizes_and_boxes_count(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        path.write_bytes(b"x" * i)
    before = data(paths)
    assert differences(before, data(paths)) == []
    moved = replace(before.test, images=images.Files(paths, np.array([[0, 0, 2, 1]] * 4)))
    assert differences(before, replace(before, test=moved)) == ["images"]
    picked = [replace(before.test, images=images.Picked(before.test.images, np.array(order)))  # type: ignore[arg-type]
              for order in ([0, 1, 2, 3], [1, 0, 2, 3])]  # fmt: skip
    assert [differences(before, replace(before, test=p)) for p in picked] == [[], ["images"]]
    before.fingerprint  # noqa: B018
    paths[2].write_bytes(b"longer")
    assert differences(before, data(paths)) == ["images"]
    paths[3].unlink()
    with pytest.raises(DataError, match=r"cannot read image .*3\.png: No such file"):
        data(paths).fingerprint  # noqa: B018
