"""Icons: what a name means, which drawings take part, and a cache that is whole or goes on; npm is not needed."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import miniatures
import numpy as np
import pytest

from train import run
from train.data import DataError, Dataset, cache, fingerprint, icon_names, iconify, icons, load, mapped, npm, parts, svg

Sets = list[dict[str, Any]]


def styles(*names: str, prefixes: str = "", suffixes: str = "") -> icon_names.Styles:
    return icon_names.Styles(
        {
            "icons": dict.fromkeys(names),
            "prefixes": dict.fromkeys(prefixes.split(), ""),
            "suffixes": {"": "Regular"} | dict.fromkeys(suffixes.split(), ""),
        }
    )


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words", "variants", "style"),
    [
        ("home", "home", 0, ""),
        ("home-outline", "home", 0, "outline"),
        ("home-filled", "home", 0, "fill"),
        ("home-bold", "home", 0, "bold"),
        ("home-20-solid", "home", 0, "fill"),
        ("home-line-duotone", "home", 0, "duotone outline"),
        ("home-sharp", "home", 0, ""),
        ("home-2", "home", 1, ""),
        ("home-two", "home", 1, ""),
        ("home-03-bold", "home", 1, "bold"),
        ("home-alt-2", "home", 2, ""),
        ("home2", "home", 1, ""),
        ("dice-2", "dice 2", 0, ""),
        ("number-circle-two-bold", "number circle two", 0, "bold"),
        ("replay-30", "replay 30", 0, ""),
        ("traffic-light", "traffic light", 0, ""),
        ("traffic-light-bold", "traffic light", 0, "bold"),
        ("traffic-light-light", "traffic light", 0, ""),
        ("h1", "h1", 0, ""),
        ("2", "2", 0, ""),
        ("fill", "fill", 0, ""),
    ],
)
def test_a_name_is_read(name: str, words: str, variants: int, style: str) -> None:
    known = [name, "home", "home-bold", "traffic-light", "traffic-light-bold", "number-circle-two", "home-03"]
    own = styles(*known, suffixes="bold line-duotone sharp 20-solid")
    own.suffixes.append("light")
    assert own.read(name) == (tuple(words.split()), variants, style)


def test_bold_is_a_weight_where_there_are_others() -> None:
    assert styles("a", "a-bold", suffixes="bold thin").read("a-bold").style == ""


def test_a_prefix_is_a_style_too() -> None:
    assert styles("a", prefixes="round outline").read("outline-a") == (("a",), 0, "outline")
    assert styles("a", prefixes="round outline").read("round-a") == (("a",), 0, "")


def test_spellings_synonyms_and_orders_agree() -> None:
    names = [("light", "bulb"), ("lightbulb",), ("lightbulb",), ("gear",), ("cog",), ("check", "circle")]
    vocabulary = icon_names.Vocabulary([*names, ("circle", "check"), ("circle", "tick")])
    keys = [vocabulary.key(words) for words in [("light", "bulb"), ("lightbulb",), ("gear",), ("cog",)]]
    assert keys == ["bulb", "bulb", "settings", "settings"]
    assert vocabulary.key(("circle", "check")) == vocabulary.key(("check", "circle")) == "check circle"
    assert vocabulary.key(("circle", "tick")) == "check circle"


# ---- the format -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alias", "turned"),
    [
        ({"hFlip": True}, lambda image: image[:, ::-1]),
        ({"vFlip": True}, lambda image: image[::-1]),
        ({"rotate": 1}, lambda image: np.rot90(image, -1)),
        ({"rotate": 2, "hFlip": True}, lambda image: np.rot90(image[:, ::-1], 2)),
        ({"rotate": 3, "vFlip": True}, lambda image: np.rot90(image[::-1], 1)),
    ],
)
def test_an_alias_may_turn_and_mirror(alias: dict[str, Any], turned: Callable[[Any], Any]) -> None:
    body = '<path d="M3 2h20v4H9v5z"/>'
    content: dict[str, Any] = {"icons": {"a": {"body": body, "left": 2, "width": 26}}, "height": 13}
    content["aliases"] = {"b": {"parent": "a"} | alias}
    a, b = (svg.draw(iconify.svg_of(content, name), 64).astype(int) for name in "ab")
    assert np.abs(turned(a) - b).mean() < 0.5 < np.abs(a - b).mean()
    assert iconify.is_drawn(content, "b")


@pytest.mark.parametrize("aliases", [{"b": {"parent": "c"}}, {"b": {"parent": "c"}, "c": {"parent": "b"}}])
def test_an_alias_of_nothing(aliases: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"x:b: an alias of an icon that does not exist: '[bc]'"):
        iconify.svg_of({"prefix": "x", "icons": {}, "aliases": aliases}, "b")


# ---- the data set ---------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a package into a cache folder, as if it had been fetched."""

    def put(sets: Sets | None = None) -> Path:
        content = miniatures.icon_sets() if sets is None else sets
        monkeypatch.setattr(icons, "INTEGRITY", miniatures.make_icons(tmp_path / "cache", icons.PACKAGE, content))
        monkeypatch.setattr(icons, "CLASSES", 7)
        monkeypatch.setattr(icons, "IMAGES", 28)
        monkeypatch.setattr(npm, "pack", lambda *_: pytest.fail("asked npm"))
        return tmp_path / "cache"

    return put


def sources(data: Dataset) -> dict[str, list[str]]:
    """The drawings of each class, by its name."""
    found: dict[str, list[str]] = {}
    for part in (data.train, data.test):
        for label, source in zip(part.labels.tolist(), part.sources, strict=True):
            found.setdefault(part.classes[label], []).append(source)
    return found


def test_icons_are_what_two_designers_draw_under_one_name(package: Callable[..., Path]) -> None:
    data = load("icons", cache_dir=package())
    expected = {
        name: sorted([f"one:{name}", f"one:{name}-outline", f"two:{name}-fill", f"two:{name}-line"])
        for name in miniatures.ICONS
    }
    expected["cloud"][0] = "copies:cloud-3"  # the same drawing, which counts once
    expected["drum"][0] = "copies:drum"
    expected["home"] = [*expected.pop("house")[:2], "two:home-fill", "two:home-line"]
    del expected["bell"]  # three are left: one of them is called bell alarm elsewhere
    assert sources(data) == expected
    assert not data.mirror and data.queries is None
    assert data.credit_of(["two:bell-fill", "one:egg", "one:fan"]) == data.credit[1:]
    assert data.credit == (
        "Copies by Author of copies, ISC", "One by Author of one, MIT", "Two by Author of two, CC-BY-4.0",
    )  # fmt: skip


def test_brands_and_empty_drawings_are_left_out(package: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    sets = miniatures.icon_sets()
    for one, brand in zip(sets, ("egg", "gate", "fan-square"), strict=False):
        one["icons"] |= {f"{name}-logo": miniatures.icon(9) for name in ("other", "third")}
        one["icons"][f"{brand}-circle"] = miniatures.icon(10)
    sets += [miniatures.icon_set(name, "CC0-1.0", {key: {"body": ""} for key in ("egg", "gate")})
             for name in sorted(icons.BRAND_SETS)[:3]]  # fmt: skip
    monkeypatch.setattr(icons, "EMPTY", ("one:fan",))
    survey = icons.look(sets)
    titles, _ = icons.choose_drawings(survey, None)
    assert set(titles.values()) == {"anchor", "cloud", "drum", "home"}
    assert all(icons._is_brand(one.name, survey.brands) == (one.icon.split("-")[0] in {"egg", "gate", "other", "third"})
               for one in survey.found)  # fmt: skip


def test_icons_are_grey_on_white_in_their_proportions(package: Callable[..., Path]) -> None:
    sets = miniatures.icon_sets()
    sets[1]["icons"]["fan-fill"] = {"body": '<rect width="48" height="24" fill="#f00"/>', "width": 48}
    data = load("icons", cache_dir=package(sets))
    part = data.train if "two:fan-fill" in data.train.sources else data.test
    image = part.images[part.sources.index("two:fan-fill")]
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8 and isinstance(part.images, mapped.Mapped)
    assert (image == image[:, :, :1]).all() and set(image[17:47].ravel().tolist()) <= {76, 77}, "the grey of red"
    assert image[:15].min() > 250 and image[49:].min() > 250
    anchor = data.train if "one:anchor" in data.train.sources else data.test
    assert anchor.images[anchor.sources.index("one:anchor")].min() == 0, "black, of no colour of its own"


def test_a_second_load_draws_and_fetches_nothing(package: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = package()
    first = load("icons", cache_dir=folder)
    monkeypatch.setattr(icons, "_make", lambda *_: pytest.fail("drew again"))
    again = load("icons", cache_dir=folder)
    assert fingerprint.differences(first.fingerprint, again.fingerprint) == []
    few = load("icons", cache_dir=folder, max_classes=5)
    assert len(sources(few)) == 5 and sources(few).items() < sources(first).items()


def test_the_fingerprint_of_the_miniature_is_the_same_for_ever(package: Callable[..., Path]) -> None:
    found = load("icons", cache_dir=package()).fingerprint
    names = ("summary", "class names", "labels", "image names")  # pixels may differ with resvg
    assert {name: found[name] for name in names} == {
        "summary": "train: 12 images of 3 classes, test: 16 images of 4 classes",
        "class names": "5cf271acb1b2e5f2e0d6b65ad42fbabe",
        "labels": "d1e5cbfb56e627bd0d66d59613e2edd9",
        "image names": "15e4e3ae0658fb55d6f0800b243c4cc5",
    }


def test_few_classes_are_drawn_alone(package: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = package()
    drawn = count_drawings(monkeypatch)
    few = load("icons", cache_dir=folder, max_classes=4)
    assert len(drawn) == 16 == len(few.train.labels) + len(few.test.labels)
    every = load("icons", cache_dir=folder)
    for name, found in sources(few).items():
        assert sources(every)[name] == found
    assert sorted(path.name.count("-4.") for path in folder.iterdir()) == [0, 0, 0, 1, 1]


def count_drawings(monkeypatch: pytest.MonkeyPatch, last: int = 1000) -> list[str]:
    """What is drawn from now on; the process is interrupted after ``last``."""
    drawn: list[str] = []
    plain = svg.draw

    def draw(text: str, size: int) -> Any:
        if len(drawn) == last:
            raise KeyboardInterrupt
        drawn.append(text)
        return plain(text, size)

    monkeypatch.setattr(svg, "draw", draw)
    return drawn


def test_a_drawing_that_was_ended_goes_on(
    package: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = package()
    monkeypatch.setattr(parts, "PART", 8)
    with monkeypatch.context() as patch:
        count_drawings(patch, last=20)
        with pytest.raises(KeyboardInterrupt):
            load("icons", cache_dir=folder)
    assert not list(folder.glob("icons*")), "no half cache"
    (place,) = folder.glob(".icons*.parts")
    assert len(list(place.iterdir())) == 2
    next(place.iterdir()).write_bytes(b"damaged")
    with monkeypatch.context() as patch:
        assert load("icons", cache_dir=folder) and len(count_drawings(patch)) == 0
    assert "1 of 4 parts are drawn already" in capsys.readouterr().err
    assert sorted(path.suffix for path in folder.iterdir()) == [".npy", ".npz", ".tgz"], "parts are gone"


def test_parts_of_other_drawings_are_not_used(package: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(mapped, "save", lambda *_: pytest.fail("no space"))
        with pytest.raises(pytest.fail.Exception):
            load("icons", cache_dir=package())
    sets = miniatures.icon_sets()
    for number, name in enumerate(miniatures.ICONS):
        sets[0]["icons"][name] = miniatures.icon(number, shift=7)
    folder = package(sets)
    monkeypatch.setattr(icons, "IMAGES", 34)  # bell is a class now, and what was the same in two sets counts
    monkeypatch.setattr(icons, "CLASSES", 8)
    drawn = count_drawings(monkeypatch)
    load("icons", cache_dir=folder)
    assert len(drawn) == 34


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damaged_images_are_drawn_anew(
    damage: str, package: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = package()
    before = load("icons", cache_dir=folder).fingerprint
    (path,) = folder.glob("*.npy")
    content = bytearray(path.read_bytes())
    path.unlink()
    content[200] ^= 1
    if damage != "gone":
        path.write_bytes(content[: 100 if damage == "cut" else None])
    assert load("icons", cache_dir=folder).fingerprint == before
    assert "cached icons are damaged and will be made again" in capsys.readouterr().err


def test_another_process_may_have_been_faster(package: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = package()
    plain, calls = icons._make, []

    def late(*arguments: Any) -> cache.Arrays:
        calls.append(plain(*arguments))
        raise cache.CorruptCache("the parts are gone")

    monkeypatch.setattr(icons, "_make", late)
    assert load("icons", cache_dir=folder) and len(calls) == 1


def test_an_icon_that_cannot_be_drawn_is_named(package: Callable[..., Path]) -> None:
    sets = miniatures.icon_sets()
    sets[1]["icons"]["gate-fill"] = {"body": '<path d="M0 0'}
    folder = package(sets)
    with pytest.raises(DataError, match="--data: two:gate-fill cannot be drawn: "):
        load("icons", cache_dir=folder)
    assert not list(folder.glob("icons*"))


def test_the_full_set_must_be_complete(package: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = package()
    monkeypatch.setattr(icons, "IMAGES", 29)
    with pytest.raises(DataError, match="icons: 28 images of 7 classes, not 29 of 7"):
        load("icons", cache_dir=folder)


def test_another_package_than_the_pinned_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pack(specs: list[str], place: Path) -> list[Path]:
        miniatures.make_icons(place, *specs, miniatures.icon_sets())
        return list(place.glob("*.tgz"))

    monkeypatch.setattr(npm, "pack", pack)
    with pytest.raises(DataError, match=r"@iconify/json@.* is not the package that is meant: its integrity is sha512-"):
        load("icons", cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_fetch_is_whole_and_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def pack(specs: list[str], place: Path) -> list[Path]:
        calls.append(specs)
        (place / "half").write_text("")
        if len(calls) == 1:
            raise KeyboardInterrupt
        miniatures.make_icons(place, *specs, [])
        return list(place.glob("*.tgz"))

    monkeypatch.setattr(npm, "pack", pack)
    integrity = miniatures.make_icons(tmp_path / "other", "@a/b@1.0", [])
    with pytest.raises(KeyboardInterrupt):
        npm.fetch("@a/b@1.0", integrity, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(npm, "_integrity", lambda path: integrity)  # a .tgz has the time in it
    for _ in range(2):
        assert npm.fetch("@a/b@1.0", integrity, tmp_path / "cache") == tmp_path / "cache" / "a-b-1.0.tgz"
    assert len(calls) == 2


def test_images_go_to_another_process_by_name(package: Callable[..., Path]) -> None:
    images = load("icons", cache_dir=package()).train.images
    assert isinstance(images, mapped.Mapped)
    sent = pickle.dumps(images)
    assert len(sent) < 4000
    assert all(np.array_equal(one, other) for one, other in zip(images, pickle.loads(sent), strict=True))
    assert np.array_equal(images[2:5][1], images[3])


def test_a_miniature_trains(
    package: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XBN_CACHE", str(package()))
    small = "--image-size 32 --batch-size 8 --memory-size 16 --embedding-dim 8 --steps 4 --threads 1 --workers 0"
    arguments = ["--recipe", "icons", *small.split(), "--out", str(tmp_path / "out")]
    assert run.main(arguments) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["data"]["credit"][1] == "One by Author of one, MIT"
    told = "icons, train: 12 images of 3 classes, test: 16 images of 4 classes\n"
    assert f"{told}  Copies by Author of copies, ISC\n" in capsys.readouterr().out
    monkeypatch.setattr(run, "CREDIT_SHOWN", 2)
    assert run.main([*arguments, "--overwrite"]) == 0
    assert f"{told}  by 3 makers; metrics.json will name them and their licences\n" in capsys.readouterr().out
