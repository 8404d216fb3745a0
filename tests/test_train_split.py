"""What is trained on and what is tested on, where data have no split of their own: `--test-share`, `--test-of`."""

from __future__ import annotations

import itertools
import os
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.data import DataError, Dataset, load, split, validation
from train.data.split import IMAGES

CLASSES, PER_CLASS = 6, 5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`c0 .. c5/0 .. 4.png`, and tables of them."""
    path = tmp_path_factory.mktemp("images")
    for c in range(CLASSES):
        (path / f"c{c}").mkdir()
        for i in range(PER_CLASS):
            Image.new("L", (6, 4), 10 * c + i).save(path / f"c{c}" / f"{i}.png")
    rows = [f"c{c},c{c}/{i}.png" for c in range(CLASSES) for i in range(PER_CLASS)]
    (path / "plain.csv").write_text("\n".join(["label,path", *rows]) + "\n")
    (path / "table.csv").write_text("\n".join(["label,path,split", *(f"{row},train" for row in rows)]) + "\n")
    return path


def images_of(data: Dataset) -> tuple[set[str], set[str]]:
    return set(data.train.sources), set(data.test.sources)


def test_a_share_of_the_classes_grows_by_adding_and_a_half_is_what_it_always_was() -> None:
    for count in (4, 5, 8, 101):
        keys = [f"class {i}" for i in range(count)]
        order = split.shuffled(keys, "halves")
        assert split.by_class(keys) == (sorted(order[: count // 2]), sorted(order[count // 2 :]))
        tested = [set(split.by_class(keys, share)[1]) for share in (0.01, 0.25, 0.5, 0.99)]
        assert all(one <= other for one, other in itertools.pairwise(tested))
        assert len(tested[0]) == 2 and len(tested[-1]) == count - 2


def test_a_share_of_the_images_leaves_two_of_each_class_and_asks_two_or_none() -> None:
    sizes = {"one": 1, "two": 2, "three": 3, "four": 4, "ten": 10, "hundred": 100}
    pairs = [(name, f"{name}/{i}.png") for name, size in sizes.items() for i in range(size)]
    for share, expected in ((0.01, [0, 0, 0, 2, 2, 2]), (0.3, [0, 0, 0, 2, 3, 30]), (0.99, [0, 0, 0, 2, 8, 98])):
        tested = split.by_image(*zip(*pairs, strict=True), share)
        counts = Counter(pair[0] for pair, held_out in zip(pairs, tested.tolist(), strict=True) if held_out)
        assert [counts[name] for name in sizes] == expected
        shuffled = random.Random(0).sample(pairs, len(pairs))
        again = split.by_image(*zip(*shuffled, strict=True), share)
        assert {pair for pair, held_out in zip(shuffled, again.tolist(), strict=True) if held_out} == {
            pair for pair, held_out in zip(pairs, tested.tolist(), strict=True) if held_out
        }, "whatever the order"


def test_the_images_held_out_are_the_same_for_ever() -> None:
    names = list("abcdefgh")
    held_out = split.by_image(["x"] * 8, names, 0.5)
    assert [name for name, it_is in zip(names, held_out.tolist(), strict=True) if it_is] == ["b", "c", "d", "g"]


def test_what_comes_from_one_file_is_on_one_side() -> None:
    sources = [f"{i // 3}.png" for i in range(30)]
    tested = split.by_image(["x"] * 30, sources, 0.4)
    assert all(len(set(tested[i : i + 3].tolist())) == 1 for i in range(0, 30, 3)) and tested.sum() == 12
    assert not split.by_image(["x"] * 30, ["one.png"] * 30, 0.4).any()


@pytest.mark.parametrize("spec", ["folder:{}", "csv:{}/plain.csv", "csv:{}/table.csv"])
def test_data_without_a_split_are_divided_as_asked(spec: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = spec.format(root)
    usual = load(spec)
    said = capsys.readouterr().err
    assert ("no line is of validation, so half of the classes are tested on" in said) == ("table" in spec)
    assert images_of(usual) == images_of(load(spec, test=split.Test(0.5)))
    assert usual.tested and usual.summary() == "train: 15 images of 3 classes, test: 15 images of 3 classes"

    few = load(spec, test=split.Test(0.3))
    assert len(few.train.classes) == 4 and set(few.test.classes) < set(usual.test.classes)

    known = load(spec, test=split.Test(0.4, IMAGES))
    assert known.train.classes == known.test.classes and len(known.train.classes) == CLASSES
    assert Counter(known.test.labels.tolist()) == dict.fromkeys(range(CLASSES), 2)
    train, test = images_of(known)
    assert not train & test and len(train | test) == CLASSES * PER_CLASS
    shown = {int(image[0, 0, 0]) for image in known.test.images}
    assert shown == {10 * int(source[1]) + int(source[3]) for source in known.test.sources}, "pixels, labels, names"
    assert known.fingerprint["labels"] != usual.fingerprint["labels"]

    every = load(spec, test=split.Test(0.0))
    assert not every.tested and len(every.train.sources) == CLASSES * PER_CLASS and every.test.classes == ()
    assert every.summary() == "train: 30 images of 6 classes, no test" and every.fingerprint
    assert len(load(spec, max_classes=4, test=split.Test(0.0)).train.classes) == 4
    assert "no line is of validation" not in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="not every file system takes such names")
def test_names_that_are_not_utf8_are_divided_too(tmp_path: Path) -> None:
    for c in range(2):
        (tmp_path / f"c{c}").mkdir()
        for i in range(4):
            Image.new("L", (6, 4), 10 * c + i).save(tmp_path / f"c{c}" / f"{i}.png")
        (tmp_path / f"c{c}" / "0.png").rename(os.fsdecode(bytes(tmp_path / f"c{c}") + b"/caf\xe9.png"))
    train, test = images_of(load(f"folder:{tmp_path}", test=split.Test(0.5, IMAGES)))
    assert len(train) == len(test) == 4 and {os.fsdecode(b"c0/caf\xe9.png")} < train | test


def test_two_classes_are_enough_where_no_class_is_tested_on(tmp_path: Path) -> None:
    for c in range(2):
        (tmp_path / f"c{c}").mkdir()
        for i in range(3):
            Image.new("L", (6, 4), 10 * c + i).save(tmp_path / f"c{c}" / f"{i}.png")
    assert len(load(f"folder:{tmp_path}", test=split.Test(0.0)).train.labels) == 6
    with pytest.raises(DataError, match="4 are needed, two to train on and two to test on"):
        load(f"folder:{tmp_path}")
    with pytest.raises(
        DataError, match=r"0 classes have the 4 images that --test-of images needs, 2 to train on and 2"
    ):
        load(f"folder:{tmp_path}", test=split.Test(of=IMAGES))
    for c in range(2):
        Image.new("L", (6, 4), 10 * c + 3).save(tmp_path / f"c{c}" / "3.png")
    assert load(f"folder:{tmp_path}", test=split.Test(of=IMAGES)).test.labels.tolist() == [0, 0, 1, 1]
    (tmp_path / "c1").rename(tmp_path / ".c1")
    with pytest.raises(DataError, match=r"1 usable classes .*; 2 are needed, to train on"):
        load(f"folder:{tmp_path}", test=split.Test(0.0))


@pytest.mark.parametrize(
    ("test", "asked"),
    [
        (split.Test(0.3), "--test-share 0.3"),
        (split.Test(0.0), "--test-share 0"),
        (split.Test(of=IMAGES), "--test-of images"),
        (split.Test(0.5, IMAGES), "--test-share 0.5 --test-of images"),
    ],
)
def test_a_split_of_their_own_stays(test: split.Test, asked: str, tmp_path: Path) -> None:
    for side in ("train", "val"):
        for c in range(2):
            (tmp_path / side / f"c{c}").mkdir(parents=True)
            for i in range(2):
                Image.new("L", (6, 4), i).save(tmp_path / side / f"c{c}" / f"{i}.png")
    rows = [f"c{c},{side}/c{c}/{i}.png,{side}" for side in ("train", "val") for c in range(2) for i in range(2)]
    (tmp_path / "table.csv").write_text("\n".join(["label,path,split", *rows]) + "\n")
    for spec, what in (
        (f"folder:{tmp_path}", "its sub-folders train and val"),
        (f"csv:{tmp_path / 'table.csv'}", "its column split"),
        ("sop:/nowhere", "that of the benchmark"),
        ("inshop:/nowhere", "that of the benchmark"),
        ("deepfashion2:/nowhere", "that of the benchmark"),
    ):
        with pytest.raises(DataError, match=f"^{asked}: --data {spec} has a split of its own, {what}; leave it out$"):
            load(spec, test=test)


def test_emoji_by_image_are_held_out_by_vendor(few_emoji: Dataset, emoji_cache: Path) -> None:
    known = load("emoji", cache_dir=emoji_cache, max_classes=40, test=split.Test(0.3, IMAGES))
    assert len(known.train.classes) == 40 and set(known.test.classes) <= set(known.train.classes)
    assert min(Counter(known.train.labels.tolist()).values()) >= 2 <= min(Counter(known.test.labels.tolist()).values())
    assert len(known.train.labels) + len(known.test.labels) == len(few_emoji.train.labels) + len(few_emoji.test.labels)
    every = load("emoji", cache_dir=emoji_cache, max_classes=40, test=split.Test(0.0))
    assert len(every.train.classes) == 40 and not every.tested and every.fingerprint


def test_validation_is_held_out_of_the_training_classes_alone(few_emoji: Dataset) -> None:
    study, beside = validation.of(few_emoji), validation.beside(few_emoji, validation.HELD_OUT)
    assert beside.validation is not None and beside.validation.classes == study.test.classes
    assert beside.train.classes == study.train.classes and beside.test is few_emoji.test
    assert not set(beside.train.classes) & set(beside.validation.classes)
    assert len(beside.train.labels) + len(beside.validation.labels) == len(few_emoji.train.labels)
    assert beside.summary().endswith(f", validation: {len(beside.validation.labels)} images of 5 classes")
    assert beside.fingerprint["labels"] != few_emoji.fingerprint["labels"]
    assert list(beside.parts) == ["train", "test", "validation"] and list(few_emoji.parts) == ["train", "test"]
    assert len(validation.beside(few_emoji, 0.01).validation.classes) == 2  # type: ignore[union-attr]
    with pytest.raises(DataError, match="20 training classes, 19 of them held out for validation: two or more have to"):
        validation.beside(few_emoji, 0.95)
    assert np.bincount(beside.validation.labels).min() > 0
