"""`--data csv:FILE`: a table of images in the format of open-metric-learning, and what may be wrong with one."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import miniatures
import numpy as np
import pytest
import torch
from PIL import Image

from train import evaluate, run
from train.data import DataError, Dataset, Test, load, table
from train.data.split import IMAGES
from train.index import Index

Rows = list[dict[str, Any]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`c0 .. c3/0 .. 2.png`, 6 x 4 pixels, each of its own grey."""
    for c in range(4):
        (tmp_path / f"c{c}").mkdir()
        for i in range(3):
            Image.new("L", (6, 4), 10 * c + i).save(tmp_path / f"c{c}" / f"{i}.png")
    return tmp_path


def listed(**columns: Callable[[int, int], Any]) -> Rows:
    """A row of each image: class and path, and what columns say of class and number."""
    return [
        {"label": f"c{c}", "path": f"c{c}/{i}.png", **{name: value(c, i) for name, value in columns.items()}}
        for c in range(4)
        for i in range(3)
    ]


def with_split(**columns: Callable[[int, int], Any]) -> Rows:
    return listed(split=lambda c, _: "train" if c < 2 else "validation", **columns)


def write(folder: Path, rows: Rows, delimiter: str = ",", encoding: str = "utf-8") -> Path:
    with open(folder / "table.csv", "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return folder / "table.csv"


def read(path: Path, **how: Test) -> Dataset:
    return load(f"csv:{path}", **how)


def asked(data: Dataset) -> tuple[list[str], list[str]]:
    assert data.queries is not None and data.gallery is not None
    return tuple([data.test.sources[i] for i in where.tolist()] for where in (data.queries, data.gallery))  # type: ignore[return-value]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_split_is_taken_as_it_is(delimiter: str, encoding: str, folder: Path) -> None:
    rows = [{"note": "a, b\nc", **row} for row in with_split()]
    data = read(write(folder, rows, delimiter, encoding))
    assert data.train.classes == ("c0", "c1") and data.test.classes == ("c2", "c3")
    assert data.train.sources == ("c0/0.png", "c0/1.png", "c0/2.png", "c1/0.png", "c1/1.png", "c1/2.png")
    assert data.queries is None and data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test.images[4].shape == (4, 6, 3) and (data.test.images[4] == 31).all()


def test_without_a_split_half_of_the_classes_are_tested_on(folder: Path) -> None:
    data, as_folder = read(write(folder, listed())), load(f"folder:{folder}")
    assert (data.train.classes, data.test.classes) == (as_folder.train.classes, as_folder.test.classes)
    assert data.train.sources == as_folder.train.sources
    assert load(f"csv:{folder / 'table.csv'}", max_classes=4).summary() == data.summary()


@pytest.mark.parametrize(("yes", "no"), [("True", "False"), ("1", "0"), ("1.0", "0.0"), ("true", "FALSE")])
def test_queries_and_gallery(yes: str, no: str, folder: Path) -> None:
    """An image may be both, and then does not find itself."""

    def role(of_number: dict[int, str]) -> Callable[[int, int], str]:
        return lambda c, i: "" if c < 2 else of_number[i]

    rows = with_split(is_query=role({0: yes, 1: no, 2: yes}), is_gallery=role({0: no, 1: yes, 2: yes}))
    data = read(write(folder, rows))
    assert asked(data) == (
        ["c2/0.png", "c2/2.png", "c3/0.png", "c3/2.png"],
        [f"c{c}/{i}.png" for c in (2, 3) for i in (1, 2)],
    )
    assert evaluate.answers(data.test.labels, data.queries, data.gallery).tolist() == [2, 1, 2, 1]
    x = torch.eye(6) + 0.1
    scores = evaluate.evaluate(x, data.test.labels, queries=data.queries, gallery=data.gallery, recalls=(1,))
    assert 0 <= scores["recall@1"] <= 100
    nearest = Index(x, data.queries, data.gallery)(data.queries, 9)
    assert nearest.shape == (4, 3) and not (nearest == data.queries[:, None]).any()


def test_where_all_are_both_every_image_queries_all_the_others(folder: Path) -> None:
    def always(c: int, _: int) -> str:
        return "" if c < 2 else "True"

    data = read(write(folder, with_split(is_query=always, is_gallery=always)))
    assert data.queries is None and data.gallery is None


def test_boxes(folder: Path) -> None:
    Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6)).save(folder / "c0" / "0.png")
    box = {"x_1": lambda c, i: "1.0" if c + i == 0 else "", "y_1": lambda c, i: "2" if c + i == 0 else ""}
    box |= {"x_2": lambda c, i: "4.0" if c + i == 0 else "", "y_2": lambda c, i: "99" if c + i == 0 else ""}
    data = read(write(folder, with_split(**box)))
    assert data.train.images[0][:, :, 0].tolist() == [[13, 14, 15], [19, 20, 21]]
    assert data.train.images[1].shape == (4, 6, 3)
    twice = with_split(**box)
    twice.insert(1, twice[0] | {"x_1": 0})
    assert len(read(write(folder, twice)).train.labels) == 7, "an image may have several boxes"


def test_a_box_may_end_anywhere_and_a_label_is_spelled_either_way(folder: Path) -> None:
    far = {"x_1": lambda *_: "-1e30", "y_1": lambda *_: 0, "x_2": lambda *_: "9" * 20, "y_2": lambda *_: 4}
    rows = with_split(**far)
    for i in (0, 1):
        rows[i]["label"] = ("\u00e9", "e\u0301")[i]
    data = read(write(folder, rows))
    assert data.train.labels.tolist().count(data.train.classes.index("\u00e9")) == 2
    assert data.train.images[0].shape == (4, 6, 3)


def test_boxes_of_a_file_are_on_one_side_by_whatever_name(folder: Path) -> None:
    """Of a linked folder, too."""
    (folder / "linked").symlink_to(folder)
    rows = []
    for prefix, left in (("", 0), ("./", 1), ("linked/", 2)):
        box = {"x_1": lambda *_, left=left: left, "y_1": lambda *_: 0, "x_2": lambda *_: 6, "y_2": lambda *_: 4}
        rows += [row | {"path": prefix + row["path"]} for row in listed(**box)]
    data = read(write(folder, rows), test=Test(0.34, IMAGES))
    train, test = ({os.path.realpath(folder / source) for source in part.sources} for part in (data.train, data.test))
    assert train and test and not train & test


def test_what_is_seen_once_is_tested_on_only(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row for row in with_split() if row["path"] not in ("c3/1.png", "c3/2.png")]
    rows += [{"label": "alone", "path": "c3/1.png", "split": "train"}]
    data = read(write(folder, rows))
    assert data.train.classes == ("c0", "c1") and data.test.classes == ("c2", "c3")
    assert "1 classes with fewer than 2 images left out: 'alone'" in capsys.readouterr().err


def test_classes_on_both_sides_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = listed(split=lambda c, i: "train" if c < 2 or i == 0 else "val")
    rows[-3] |= {"label": "c0"}
    Image.new("L", (6, 4)).save(folder / "c0" / "3.png")
    data = read(write(folder, [*rows, {"label": "c0", "path": "c0/3.png", "split": "test"}]))
    assert data.train.classes == ("c0", "c1") and data.test.classes == ("c0", "c2", "c3")
    assert "1 classes are both trained on and tested on: 'c0'" in capsys.readouterr().err


def changed(number: int, **cells: object) -> Callable[[Rows], Rows]:
    return lambda rows: [row | cells if i == number else row for i, row in enumerate(rows)]


def without(*names: str) -> Callable[[Rows], Rows]:
    return lambda rows: [{name: value for name, value in row.items() if name not in names} for row in rows]


FULL = with_split(
    is_query=lambda c, i: c > 1 and i == 0, is_gallery=lambda c, i: c > 1 and i > 0,
    x_1=lambda *_: 0, y_1=lambda *_: 0, x_2=lambda *_: 6, y_2=lambda *_: 4,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("label"), "table.csv:1: no column label among path, split"),
        (without("path", "y_2"), "table.csv:1: no column path, y_2 among"),
        (without("is_query"), "no column is_query among"),
        (without("split"), "no column split among"),
        (changed(3, label=" "), "table.csv:5: no label"),
        (changed(3, path=""), "table.csv:5: no path"),
        (changed(2, split="dev"), "table.csv:4: split 'dev' is not one of train, validation, val, test"),
        (changed(6, is_query="maybe"), "table.csv:8: is_query must be true or false, is 'maybe'"),
        (changed(6, is_gallery=""), "table.csv:8: is_gallery must be true or false, is ''"),
        (changed(6, is_query="0"), "table.csv:8: an image of validation that is neither query nor in the gallery"),
        (changed(0, is_gallery="True"), "table.csv:2: is_gallery is 'True', but the image is trained on"),
        (changed(0, x_1="left"), "table.csv:2: x_1, y_1, x_2, y_2 must be four numbers, are left, 0, 6, 4"),
        (changed(0, x_1=""), "must be four numbers, are , 0, 6, 4"),
        (changed(0, x_1="nan"), "must be four numbers, are nan, 0, 6, 4"),
        (changed(0, y_2="inf"), "must be four numbers, are 0, 0, 6, inf"),
        (changed(0, x_1=6), "x_1 must be below x_2 and y_1 below y_2, the box is 6, 0, 6, 4"),
        (changed(4, x_1=7, x_2=9), r"table.csv:6: the box \[7, 0, 9, 4\] is outside of c1/1.png"),
        (changed(1, path="c0/0.png"), r"table.csv:3: image .*c0/0.png \[0, 0, 6, 4\] is in .*table.csv:2 already"),
        (changed(1, path="./c0/../c0/0.png"), r"table.csv:3: image .*c0/0.png \[0, 0, 6, 4\] is in .*table.csv:2 alr"),
        (changed(1, path="link.png", x_1="", y_1="", x_2="", y_2=""), r"image .*c0/0.png .* is in .*csv:2 already"),
        (changed(1, path="c0/9.png"), "1 of 12 files are missing or empty: '.*c0/9.png'"),
        (changed(1, path="text.png"), "cannot read image .*text.png"),
        (changed(1, path=""), "table.csv:3: no path"),
        (lambda rows: rows[6:], "0 classes of 2 images or more to train on; two are needed"),
        (lambda rows: rows[:6], "table.csv: 2 classes; 4 are needed, two to train on and two to test on"),
        (lambda rows: rows[:9], "nothing can be tested: the gallery is of one class only"),
        (lambda rows: [*rows[:7], rows[9]], "no query has an image of its class to find"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_line(change: Callable[[Rows], Rows], said: str, folder: Path) -> None:
    (folder / "text.png").write_text("no image")
    (folder / "link.png").symlink_to(folder / "c0" / "0.png")
    with pytest.raises(DataError, match=said):
        read(write(folder, change(FULL)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "table.csv:1: no column label, path among "),
        ("label,path\n", "no images, only the names of columns"),
        ("label,path,label\na,b,c\n", "table.csv:1: two columns label"),
        ("label,path\na,b\nc\n", "table.csv:3: 1 columns, not 2"),
        ('label,path\na,"b\n', "table.csv:2: unexpected end of data"),
        ('label,"path\na,b\n', "table.csv:1: unexpected end of data"),
        ('label,"path"s\na,b\n', "table.csv:1: ',' expected after"),
        ("label,path\na,c0\0/0.png\n", "table.csv:2: a zero byte, which is in no text"),
    ],
)
def test_what_is_no_table_is_named(text: str, said: str, folder: Path) -> None:
    (folder / "table.csv").write_text(text)
    with pytest.raises(DataError, match=said):
        read(folder / "table.csv")
    with pytest.raises(DataError, match=r"--data csv:.*none.csv: no such file"):
        read(folder / "none.csv")


def test_numbers_are_labels_and_a_path_may_be_absolute(folder: Path) -> None:
    rows = with_split()
    rows = [row | {"label": int(row["label"][1:]), "path": folder / row["path"]} for row in rows]
    (folder / "elsewhere").mkdir()
    data = read(write(folder / "elsewhere", rows))
    assert data.train.classes == ("0", "1") and (data.test.images[0] == 20).all()
    assert table.load(folder / "elsewhere" / "table.csv").summary() == data.summary()


def test_a_table_trains(tmp_path: Path) -> None:
    """Of queries that are in the gallery, too."""
    shapes = miniatures.make_shapes(tmp_path / "shapes")
    rows: Rows = []
    for c, of_class in enumerate(sorted(shapes.iterdir())):
        for i, file in enumerate(sorted(of_class.iterdir())):
            roles = {"is_query": "", "is_gallery": ""} if c < 4 else {"is_query": i < 2, "is_gallery": i > 0}
            split = "train" if c < 4 else "validation"
            rows.append({"label": c, "path": file.relative_to(shapes), "split": split, **roles})
    words = (
        "--data", f"csv:{write(shapes, rows)}", "--out", tmp_path / "out", "--backbone", "convnet", "--image-size", 32,
        "--memory-size", 16, "--batch-size", 8, "--samples-per-class", 2, "--steps", 3, "--eval-every", 2,
        "--threads", 1,
    )  # fmt: skip
    assert run.main([str(word) for word in words]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["data"]["queries"], metrics["data"]["gallery"]) == (8, 12)
    assert 0 <= metrics["recall@1"] <= 100 and (tmp_path / "out" / "neighbours.png").exists()
