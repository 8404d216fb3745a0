"""Small data sets in the layout of the public ones, made of real emoji; two drawings of one stand for two photographs.

Each ``make`` fills a folder and returns the counts that its loader would call published; ``make_shapes`` the folder.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from train.config import Config
from train.data import Dataset, Part, Pixels

TRAIN_CLASSES, TEST_CLASSES = 8, 6
PER_CLASS = 4


SHAPES = range(3, 11)
COLOURS = ("red", "green", "blue", "black")


def make_shapes(path: Path) -> Path:
    """A folder data set: polygons of 3 .. 10 corners, each class in four colours."""
    for corners in SHAPES:
        (path / f"corners-{corners:02}").mkdir(parents=True)
        for i, colour in enumerate(COLOURS):
            image = Image.new("RGB", (32, 32), "white")
            ImageDraw.Draw(image).regular_polygon((16, 16, 13), corners, rotation=7 * i, fill=colour)
            image.save(path / f"corners-{corners:02}" / f"{colour}.png")
    return path


def settings(shapes: Path, out: Path, **changes: Any) -> Config:
    """Those of a run of a second on a folder data set."""
    small: dict[str, Any] = {
        "data": f"folder:{shapes}", "out": out, "backbone": "convnet", "image_size": 32, "embedding_dim": 8,
        "memory_size": 24, "batch_size": 8, "samples_per_class": 2, "steps": 12, "eval_every": 5, "lr_warmup": 2,
        "threads": 1,
    }  # fmt: skip
    return Config(**small | changes)


def make_run(shapes: Path, out: Path, *words: object) -> Path:
    """A run of three steps on a folder data set, finished; returns its folder, ``out``."""
    from train import run

    arguments = (
        "--data", f"folder:{shapes}", "--out", out, "--backbone", "convnet", "--image-size", 32, "--augment", "photo",
        "--memory-size", 16, "--batch-size", 8, "--samples-per-class", 2, "--steps", 3, "--threads", 1,
        "--embedding-dim", 12, *words,
    )  # fmt: skip
    assert run.main([str(word) for word in arguments]) == 0
    return out


def drawings(part: Part, classes: int) -> Iterator[tuple[int, list[Pixels]]]:
    """PER_CLASS images of each of the first classes."""
    for label in range(classes):
        yield label, [part.images[i] for i in np.flatnonzero(part.labels == label)[:PER_CLASS].tolist()]


def write(path: Path, pixels: Pixels) -> None:
    """A JPEG, a little wider than high."""
    path.parent.mkdir(parents=True, exist_ok=True)
    photo = Image.new("RGB", (pixels.shape[1] + 8, pixels.shape[0]), "white")
    photo.paste(Image.fromarray(pixels), (4, 0))
    photo.save(path, quality=95)


def make_sop(path: Path, emoji: Dataset) -> dict[str, int]:
    """Ebay_train.txt, Ebay_test.txt, and a folder for each of two kinds of product."""
    image_id = class_id = 0
    counts = {}
    for side, part, classes in (("train", emoji.train, TRAIN_CLASSES), ("test", emoji.test, TEST_CLASSES)):
        rows = ["image_id class_id super_class_id path"]
        for label, images in drawings(part, classes):
            class_id += 1
            super_class = label % 2
            for i, pixels in enumerate(images):
                image_id += 1
                name = f"{('bicycle_final', 'mug_final')[super_class]}/{110000 + class_id}_{i}.JPG"
                write(path / name, pixels)
                rows.append(f"{image_id} {class_id} {super_class + 1} {name}")
        (path / f"Ebay_{side}.txt").write_text("\n".join(rows) + "\n")
        counts |= {f"{side} images": len(rows) - 1, f"{side} classes": classes}
    return counts


def make_inshop(path: Path, emoji: Dataset, images_in: str = "", list_in: str = "Eval") -> dict[str, int]:
    """The list of partitions and the images of each item in a folder of its own."""
    rows = []
    item = 0
    for side, part, classes in (("train", emoji.train, TRAIN_CLASSES), ("test", emoji.test, TEST_CLASSES)):
        for label, images in drawings(part, classes):
            item += 1
            for i, pixels in enumerate(images):
                name = f"img/{('WOMEN/Dresses', 'MEN/Denim')[label % 2]}/id_{item:08}/{i + 1:02}_1_front.jpg"
                write(path / images_in / name, pixels)
                status = "train" if side == "train" else ("query" if i % 2 else "gallery")
                rows.append(f"{name:<75}id_{item:08}  {status}")
    (path / list_in).mkdir(parents=True, exist_ok=True)
    header = [str(len(rows)), "image_name item_id evaluation_status"]
    (path / list_in / "list_eval_partition.txt").write_text("\n".join([*header, *rows]) + "\n")
    test = TEST_CLASSES * PER_CLASS
    return {
        "train images": TRAIN_CLASSES * PER_CLASS,
        "train items": TRAIN_CLASSES,
        "queries": test // 2,
        "gallery images": test - test // 2,
    }


def garment(box: list[int], style: int, category: str = "skirt") -> dict[str, Any]:
    """An item of an annotation, with what else there is in one."""
    return {"bounding_box": box, "style": style, "category_name": category, "category_id": 9, "scale": 2,
            "segmentation": [[box[0], box[1], box[2], box[3]]], "landmarks": [0, 0, 0]}  # fmt: skip


def make_deepfashion2(path: Path, emoji: Dataset) -> dict[str, int]:
    """Photographs of two garments each: the pair's garment with style 1, and a companion with style 2 or none.

    A pair has two photographs of users and two of shops. In ``validation`` the companions have no style.
    """
    counts = {}
    for side, part, classes in (("train", emoji.train, TRAIN_CLASSES), ("validation", emoji.test, TEST_CLASSES)):
        (path / side / "annos").mkdir(parents=True)
        (path / side / "image").mkdir()
        found = dict(drawings(part, classes))
        number = 0
        for pair in range(classes // 2):
            for i in range(PER_CLASS):
                number += 1
                photo = Image.new("RGB", (160, 90), (200, 220, 240))
                photo.paste(Image.fromarray(found[2 * pair][i]), (5, 10))
                photo.paste(Image.fromarray(found[2 * pair + 1][i]), (90, 20))
                photo.save(path / side / "image" / f"{number:06}.jpg", quality=95)
                annotation = {
                    "source": "user" if i % 2 else "shop",
                    "pair_id": pair + 1,
                    "item1": garment([5, 10, 69, 74], 1, "skirt" if i < 2 else "shorts"),
                    "item2": garment([90, 20, 154, 84], 2 if side == "train" else 0, "sling"),
                }
                (path / side / "annos" / f"{number:06}.json").write_text(json.dumps(annotation))
        counts[side] = number
    return counts


ICONS = ("anchor", "bell", "cloud", "drum", "egg", "fan", "gate", "house")


def icon(number: int, *, filled: bool = True, shift: float = 0) -> dict[str, Any]:
    """A drawing of an icon: a bar, its place says which; it is not symmetric in any way."""
    bar = f'x="{1 + shift}" y="{2 + 2 * number}" width="{8 + number}" height="1.5"'
    paint = 'fill="currentColor"' if filled else 'fill="none" stroke="currentColor" stroke-width=".3"'
    return {"body": f"<rect {bar} {paint}/>"}


def icon_set(prefix: str, licence: str, icons: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A set as the package has it."""
    info = {"name": prefix.title(), "author": {"name": f"Author of {prefix}"}, "license": {"title": licence}}
    info["license"] |= {"spdx": licence.replace(" ", "-")} if licence != "unclear" else {}
    return {"prefix": prefix, "info": info | more.pop("info", {}), "icons": icons, "width": 24, "height": 24, **more}


def icon_sets() -> list[dict[str, Any]]:
    """Sets of two designers that share eight things, with all that must not become an image, and sets left out."""
    one = {name: icon(i) for i, name in enumerate(ICONS)}
    one |= {f"{name}-outline": icon(i, filled=False) for i, name in enumerate(ICONS)}
    one["bell-2"] = icon(1, shift=0.5)  # a variant
    one["old-fan"] = icon(5) | {"hidden": True}
    one["arrow-right"] = icon(8)
    aliases = {"ring": {"parent": "bell"}, "ringer": {"parent": "ring"}}
    aliases |= {"arrow-left": {"parent": "arrow-right", "hFlip": True}, "arrow-down": {"parent": "sign"}}
    aliases |= {"sign": {"parent": "arrow-right", "rotate": 1}}
    two = {f"{name}-line": icon(i, filled=False, shift=2) for i, name in enumerate(ICONS)}
    two |= {f"{name}-fill": icon(i, shift=2) for i, name in enumerate(ICONS)}
    two["home-line"], two["home-fill"] = two.pop("house-line"), two.pop("house-fill")
    two["bell-alarm"] = icon(1)  # what another set calls bell
    two["wide-fill"] = icon(2) | {"width": 48}
    styles = {"fill": "Filled", "line": "Outline"}
    return [
        icon_set("one", "MIT", one, aliases=aliases),
        icon_set("two", "CC-BY-4.0", two, suffixes=styles),
        icon_set("copies", "ISC", {"cloud-3": icon(2), "drum": icon(3)}),
        icon_set("nc", "CC-BY-NC-4.0", {name: icon(i, shift=3) for i, name in enumerate(ICONS)}),
        icon_set("unknown", "unclear", {name: icon(i, shift=4) for i, name in enumerate(ICONS)}),
        icon_set("trade", "MIT", {name: icon(i, shift=5) for i, name in enumerate(ICONS)}, info={"category": "Logos"}),
    ]


def make_icons(folder: Path, spec: str, sets: list[dict[str, Any]]) -> str:
    """What npm would fetch as ``spec``, in ``folder``; returns its integrity."""
    name, version = spec.lstrip("@").replace("/", "-").rsplit("@", 1)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for content in [*sets, {"prefix": "../collections"}]:
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/json/{content['prefix']}.json")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return f"sha512-{base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()}"


def after(steps: int) -> Callable[[], bool]:
    """Asks to stop after so many steps."""
    left: Iterator[bool] = iter([False] * (steps - 1) + [True])
    return lambda: next(left)


def same(a: Any, b: Any) -> bool:
    """Two states or metrics of runs: equal bit for bit, except for times."""
    if isinstance(a, Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if "seconds" not in str(key))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
