"""What a folder of images may hold besides images: links, hidden folders, other files, odd names."""

from __future__ import annotations

import os
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from train.config import Config
from train.data import DataError, Dataset, images, load, tree

CLASSES, IMAGES = 4, 3


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four classes of three images each."""
    for c in range(CLASSES):
        for i in range(IMAGES):
            paint(tmp_path / "set" / f"c{c}" / f"{i}.png", 10 * c + i)
    return tmp_path / "set"


def paint(path: Path, colour: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (6, 4), colour).save(path)
    return path


def sources(data: Dataset) -> list[str]:
    """The names of all images, each with the class that it is in."""
    return sorted(
        f"{part.classes[label]}: {source}"
        for part in (data.train, data.test)
        for label, source in zip(part.labels.tolist(), part.sources, strict=True)
    )


ALL = [f"c{c}: c{c}/{i}.png" for c in range(CLASSES) for i in range(IMAGES)]


def link(path: Path, target: Path) -> None:
    path.symlink_to(target, target_is_directory=target.is_dir())


# ---- links ----------------------------------------------------------------------------------------------------------


def test_links_to_folders_are_followed(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paint(tmp_path / "pool" / "deep" / "x.png", 1)
    paint(tmp_path / "more" / "y.png", 2)
    paint(tmp_path / "other" / "z.png", 3)
    paint(tmp_path / "other" / "zz.png", 4)
    link(root / "c0" / "pool", tmp_path / "pool")
    link(tmp_path / "pool" / "deep" / "more", tmp_path / "more")
    link(root / "other", tmp_path / "other")
    link(root / "c1" / "w.png", paint(tmp_path / "w.png", 5))
    found = sources(load(f"folder:{root}"))
    added = ["c0: c0/pool/deep/more/y.png", "c0: c0/pool/deep/x.png", "c1: c1/w.png"]
    assert found == sorted([*ALL, *added, "other: other/z.png", "other: other/zz.png"])
    assert capsys.readouterr().err == ""


def test_an_image_comes_once_and_where_it_really_is(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    link(root / "a", root / "c0")
    link(root / "c0" / "a-sibling", root / "c1")
    link(root / "c1" / "a.png", root / "c1" / "0.png")
    link(root / "c1" / "b.png", root / "c2" / "0.png")
    os.link(root / "c3" / "0.png", root / "c3" / "z.png")
    assert sources(load(f"folder:{root}")) == ALL
    said = capsys.readouterr().err
    assert "2 folders that are read already under another name left out: 'a', 'c0/a-sibling'" in said
    assert "3 files that are read already under another name left out: 'c1/a.png', 'c1/b.png', 'c3/z.png'" in said


def test_loops_of_links_end(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    link(root / "c0" / "up", root)
    link(root / "c1" / "itself", root / "c1")
    paint(tmp_path / "far" / "inside" / "x.png", 1)
    link(root / "c2" / "a-part", tmp_path / "far" / "inside")
    link(root / "c2" / "far", tmp_path / "far")
    link(tmp_path / "far" / "back", tmp_path / "far")
    (root / "c3" / "circle").symlink_to(root / "c3" / "circle")
    assert sources(load(f"folder:{root}")) == sorted([*ALL, "c2: c2/a-part/x.png"])
    said = capsys.readouterr().err
    assert "4 folders that are read already under another name left out" in said
    assert "1 links to nothing left out: 'c3/circle'" in said


def test_links_to_nothing(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "gone").symlink_to(tmp_path / "nowhere")
    assert sources(load(f"folder:{root}")) == ALL
    assert "1 links to nothing left out: 'gone'" in capsys.readouterr().err
    (root / "c2" / "x.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"cannot read image .*c2/x\.png: .*No such file"):
        load(f"folder:{root}")


# ---- hidden folders and copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [".ipynb_checkpoints", ".thumbnails", "@eaDir", "__MACOSX", "#recycle"])
def test_hidden_folders_and_copies_are_left_out(name: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(root / "c0", root / name)
    shutil.copytree(root / "c0", root / "c0" / name)
    shutil.copytree(root / "c0", root / "c1" / "deep" / name)
    shutil.copy(root / "c0" / "0.png", root / "c0" / "._0.png")
    assert sources(load(f"folder:{root}")) == ALL
    said = capsys.readouterr().err
    assert f"3 hidden folders left out: '{name}', 'c0/{name}', 'c1/deep/{name}'" in said
    assert "1 hidden files left out: 'c0/._0.png'" in said


def test_a_data_set_may_itself_be_hidden(root: Path, tmp_path: Path) -> None:
    root.rename(tmp_path / ".set")
    assert sources(load(f"folder:{tmp_path / '.set'}")) == ALL


# ---- files that are no images ---------------------------------------------------------------------------------------


def test_files_that_cannot_be_decoded_are_counted_and_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.HEIC", "b.heic", "licence.pdf", "features.h5", "clip.mpg", "README"):
        (root / "c0" / name).write_bytes(b"\x89HDF\r\n\x1a\n")
    (root / "labels.csv").touch()
    os.mkfifo(root / "c1" / "pipe.png")
    assert sources(load(f"folder:{root}")) == ALL
    said = capsys.readouterr().err
    assert f"{root}: 6 files that Pillow does not decode here left out (2 .heic, 1 without a suffix, 1 .mpg, " in said
    assert "): 'c0/README', 'c0/a.HEIC', 'c0/b.heic', ...\n" in said
    assert "1 files outside the sub-folders left out: 'labels.csv'" in said
    assert "1 pipes and devices left out: 'c1/pipe.png'" in said


def test_classes_of_few_images_are_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paint(root / "lone" / "0.png", 1)
    (root / "empty").mkdir()
    assert sources(load(f"folder:{root}")) == ALL
    assert "2 sub-folders with fewer than 2 images left out: 'empty', 'lone'" in capsys.readouterr().err


def test_all_unreadable_images_are_told_at_once(root: Path) -> None:
    for c in range(CLASSES):
        (root / f"c{c}" / "0.png").write_bytes(b"")
    (root / "c0" / "1.png").write_bytes(b"\x89HDF\r\n\x1a\n")  # of a format that Pillow recognises and does not decode
    with pytest.raises(
        DataError, match=r"cannot read image .*c0/0\.png: .*; nor '.*c0/1\.png', .*, \.\.\. \(5 in all\)"
    ):
        load(f"folder:{root}")


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_an_image_cut_short_is_told_at_the_start(kind: str, root: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = root / "c0" / f"x.{kind}"
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole + b"some cameras write more here")
    assert images.check(path) == (64, 64)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"cannot read image .*c0/x\.{kind}"):
        load(f"folder:{root}")


def test_a_folder_that_cannot_be_read_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def scandir(path: Path) -> object:
        if path == root / "c2":
            raise PermissionError("Permission denied")
        return real(path)

    monkeypatch.setattr(tree.os, "scandir", scandir)
    with pytest.raises(DataError, match=r"cannot read folder .*c2: Permission denied"):
        load(f"folder:{root}")


@pytest.mark.parametrize("place", ["", "c2", "c2/deep.png"])
def test_a_folder_that_may_not_be_entered_is_named(place: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its x permission: what is in it is listed, and no more."""
    paint(root / "c2" / "deep.png" / "in" / "x.png", 1)
    (root / "private").mkdir()
    (root / "c0" / "link").symlink_to(root / "private" / "in")
    shut, real = root / place if place else root / "private", os.stat

    def stat(path: object, *arguments: Any, **named: Any) -> os.stat_result:
        if isinstance(path, str | Path) and shut in Path(os.path.realpath(path)).parents:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(DataError, match=rf"--data folder:{root}: .*Permission denied"):
        load(f"folder:{root}")


@pytest.mark.parametrize("kind", ["folder", "sop", "inshop", "deepfashion2"])
def test_a_place_that_cannot_be_looked_at_is_named(kind: str, root: Path) -> None:
    with pytest.raises(DataError, match=rf"--data {kind}:{root}.*File name too long"):
        load(f"{kind}:{root / ('x' * 300)}")


# ---- names ----------------------------------------------------------------------------------------------------------


def test_a_name_is_the_same_in_both_spellings_of_unicode(root: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "cañón") for form in ("NFC", "NFD"))
    found = []
    for name in (composed, decomposed):
        (root / "c3").rename(root / name)
        (root / name / "0.png").rename(root / name / f"{name}.png")
        found.append(sources(load(f"folder:{root}")))
        shutil.move(root / name / f"{name}.png", root / name / "0.png")
        (root / name).rename(root / "c3")
    assert found[0] == found[1] and f"{composed}: {composed}/{composed}.png" in found[0]
    (root / "c2").rename(root / composed)
    (root / "c3").rename(root / decomposed)
    with pytest.raises(DataError, match=r"two sub-folders are 'cañón', in two spellings of Unicode"):
        load(f"folder:{root}")


def test_the_folder_one_is_in_has_a_name(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for at, place in ((root, "."), (root / "c0", "..")):
        monkeypatch.chdir(at)
        assert load(f"folder:{place}").name == f"folder {root.name}"
        assert Config(data=f"folder:{place}").folder == Path(f"runs/{root.name}-axbn-0")


def test_odd_names(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "c3").rename(root / "c\n3")
    (root / "c0" / "a\nb.txt").touch()
    assert "c\n3: c\n3/0.png" in sources(load(f"folder:{root}"))
    assert capsys.readouterr().err.count("\n") == 1, "a line for each reason"
    os.rename(root / "c2", os.fsencode(root) + b"/c\xff")
    with pytest.raises(DataError, match=r"'c\\udcff' is not UTF-8: rename this sub-folder"):
        load(f"folder:{root}")


# ---- an own split ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tested_on", [["test"], ["validation"], ["val"], ["val", "test"]])
def test_two_folders_are_a_split(tested_on: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for side, classes in (("train", "ab"), *((name, "bcd") for name in tested_on)):
        for name in classes:
            for i in range(2):
                paint(tmp_path / side / name / "deeper" / f"{i}.png", 10 * len(side) + i)
    paint(tmp_path / "train" / "once" / "0.png", 0)
    paint(tmp_path / ".hidden" / "x" / "0.png", 0)
    data = load(f"folder:{tmp_path}")
    assert data.train.classes == ("a", "b") and data.test.classes == ("b", "c", "d") and data.queries is None
    assert data.test.sources[:2] == ("b/deeper/0.png", "b/deeper/1.png")
    assert (data.test.images[1] == 10 * len(tested_on[-1]) + 1).all(), "test comes before val"
    said = capsys.readouterr().err
    assert "1 classes with fewer than 2 images left out: 'once'" in said
    assert "1 classes are both trained on and tested on: 'b'" in said
    assert ("val left out, test is tested on" in said) == (len(tested_on) == 2)
    assert (
        load(f"folder:{tmp_path}", max_classes=4)
        .summary()
        .startswith("train: 4 images of 2 classes, test: 4 images of 2")
    )


def test_a_split_with_nothing_to_train_on_or_to_find_is_named(tmp_path: Path) -> None:
    for i in range(4):
        paint(tmp_path / "train" / f"c{i % 2}" / f"{i}.png", i)
        paint(tmp_path / "test" / f"d{i}" / f"{i}.png", i)
    with pytest.raises(DataError, match=r"--data folder:.*nothing can be tested: no query has an image of its class"):
        load(f"folder:{tmp_path}")
    shutil.rmtree(tmp_path / "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="0 classes of 2 images or more to train on; two are needed"):
        load(f"folder:{tmp_path}")


def test_an_image_on_both_sides_is_named_and_a_run_may_write_beside_them(tmp_path: Path) -> None:
    for side in ("train", "test"):
        for i in range(4):
            paint(tmp_path / side / f"c{i % 2}" / f"{i}.png", i)
    (tmp_path / "tensorboard").mkdir()
    assert load(f"folder:{tmp_path}").test.classes == ("c0", "c1")
    link(tmp_path / "test" / "c0" / "link.png", tmp_path / "train" / "c0" / "0.png")
    with pytest.raises(DataError, match=r"1 images are in both folders: '.*train/c0/0.png'"):
        load(f"folder:{tmp_path}")


def test_train_and_test_may_be_classes_among_others(root: Path) -> None:
    for name in ("train", "test"):
        for i in range(2):
            paint(root / name / f"{i}.png", i)
    data = load(f"folder:{root}")
    assert {"train", "test"} <= {*data.train.classes, *data.test.classes}
