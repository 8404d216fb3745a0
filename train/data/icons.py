"""Icons of many designers: what one calls `umbrella`, others do; a class is what an icon shows.

The sets come from npm as one package. ``icon_names`` says what a name means; here is decided which sets and drawings
take part. Drawn once in grey, at 64 x 64 on white, they are kept in one file that is read where images are asked for.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import terminal
from . import cache, icon_names, iconify, npm, parts, split, svg
from .dataset import Dataset
from .icon_names import Name
from .mapped import Mapped, check
from .part import DataError
from .split import DEFAULT, Test

PACKAGE = "@iconify/json@2.2.535"
INTEGRITY = "sha512-nAV60ACUSHwnsb6fsp+letHlNkrwO4vzBtcC6B4EDHErQQfezk7E3nJdnwJjve6OCfMNO0uVT5Vrgna9/NCmXw=="
LICENCES = {"Apache-2.0", "BSD-3-Clause", "CC-BY-3.0", "CC-BY-4.0", "CC0-1.0", "ISC", "MIT", "Unlicense"}
"""Each allows to use, change and pass on the drawings, for any purpose; CC BY asks to name their author."""
KINDS_LEFT_OUT = {  # categories and tags of Iconify's, and why
    "Logos": "trade marks: every set has copies of one drawing",
    "Emoji": "what --data emoji has",
    "Contains Animations": "some drawings begin empty",
}
SETS_LEFT_OUT = {  # by name, and why
    "catppuccin devicon devicon-plain file-icons gcp k8s material-icon-theme skill-icons unjs vscode-icons": "as Logos",
    "fa-brands fa6-brands": "as Logos",
    "cif circle-flags flag flagpack": "flags: every set has copies of one drawing",
    "fluent-emoji": "as Emoji",
    "bx bxs fa-regular fa-solid fa6-regular fa6-solid heroicons-outline heroicons-solid": "a later version is here",
    "iconmind": "many of its drawings do not show what they are named",
    "famicons material-symbols-light mi": "a copy of another set, or thinner",
}
_LEFT_OUT = {name for names in SETS_LEFT_OUT for name in names.split()}
BRAND_SETS = {"bxl", "cib", "fa7-brands", "logos", "simple-icons", "streamline-logos", "thesvg"}
BRAND_COUNT = 3
"""What as many of them have by the same name is a trade mark, and no class."""
FRAMES = ("circle", "square")
"""Words that a brand's name may come with."""
EMPTY = ("flowbite:pizza-slice-outline", "reicon:phone-update-duotone")
"""Icons that draw nothing."""
SAME_DESIGNER = {"Material Design Authors": "Google"}
MIN_DESIGNERS, MIN_IMAGES = 2, 4
SIZE = 64
CLASSES, IMAGES = 6333, 83107
RECIPE = f"1 {PACKAGE} {SIZE}"  # raise the first number when names are read, or drawings chosen or drawn, otherwise


class Drawing(NamedTuple):
    """One drawing of a class."""

    key: str
    set: str
    icon: str


class Found(NamedTuple):
    """One icon of a set that takes part."""

    set: str
    icon: str
    name: Name
    digest: bytes
    """Of the drawing."""


class Survey(NamedTuple):
    """What the package has."""

    found: list[Found]
    info: dict[str, dict[str, Any]]
    """Of each set that takes part, what it says of itself."""
    brands: Counter[str]
    """In how many of the brand sets a name is."""


def load(*, cache_dir: Path | None = None, max_classes: int | None = None, test: Test = DEFAULT) -> Dataset:
    """The icons, from the cache or else fetched and drawn (minutes); see ``train.data.load`` for the arguments."""
    path, arrays = _cached(cache.folder(cache_dir), max_classes)
    names = [str(name) for name in arrays["names"]]
    keys = [names[i] for i in arrays["labels"].tolist()]
    if max_classes is None and (len(names), len(keys)) != (CLASSES, IMAGES):
        raise DataError(f"icons: {len(keys):,} images of {len(names):,} classes, not {IMAGES:,} of {CLASSES:,}")
    chosen = set(split.choose(names, max_classes))
    kept = np.flatnonzero([key in chosen for key in keys])
    sources = [str(source) for source in arrays["sources"][kept]]
    lines = dict(zip(map(str, arrays["sets"]), map(str, arrays["credit"]), strict=True))
    makers = {name: lines[name] for name in sorted({source.partition(":")[0] for source in sources})}
    data = split.divide(
        "icons",
        [keys[i] for i in kept.tolist()],
        sources,
        pick=lambda where: Mapped(path, kept[where]),
        test=test,
        titles=dict(zip(names, map(str, arrays["titles"]), strict=True)),
        mirror=False,
        credit=tuple(makers.values()),
    )
    return replace(data, makers=makers)


def _cached(folder: Path, max_classes: int | None) -> tuple[Path, cache.Arrays]:
    """The file of images and what is known of them: of all classes, else of the chosen ones, else made now."""
    fingerprint = hashlib.sha256(RECIPE.encode()).hexdigest()[:8]
    every = folder / f"icons-{fingerprint}.npz"
    wanted = every if max_classes is None else folder / f"icons-{fingerprint}-{max_classes}.npz"
    for path in dict.fromkeys((every, wanted)):
        arrays = _whole(path)
        if arrays is not None:
            return path.with_suffix(".npy"), arrays
    try:
        arrays = _make(folder, wanted, max_classes)
    except cache.CorruptCache:  # another process was faster and has tidied up
        arrays = _whole(wanted) or _make(folder, wanted, max_classes)
    return wanted.with_suffix(".npy"), arrays


def _whole(path: Path) -> cache.Arrays | None:
    """What is stored, None if it is not there, or damaged."""
    try:
        arrays = cache.read(path)
        if arrays is not None:
            check(path.with_suffix(".npy"), str(arrays["sha256 of images"]))
    except cache.CorruptCache as error:
        terminal.note(f"cached icons are damaged and will be made again: {error}")
        return None
    return arrays


def _make(folder: Path, path: Path, max_classes: int | None) -> cache.Arrays:
    """Fetch the package, find out which icon shows what, draw those of the chosen classes, and store all that."""
    tgz = npm.fetch(PACKAGE, INTEGRITY, folder)
    terminal.note("reading icon sets")
    survey = look(iconify.sets(tgz))
    titles, drawings = choose_drawings(survey, max_classes)
    images = path.with_suffix(".npy")
    digest = parts.draw(list(_sketches(iconify.sets(tgz), drawings)), SIZE, images)
    names = sorted(titles)
    used = sorted({drawing.set for drawing in drawings})
    arrays: cache.Arrays = {
        "labels": np.searchsorted(names, [drawing.key for drawing in drawings]).astype(np.int64),
        "sources": np.array([f"{drawing.set}:{drawing.icon}" for drawing in drawings]),
        "names": np.array(names),
        "titles": np.array([titles[name] for name in names]),
        "sets": np.array(used),
        "credit": np.array([iconify.credit(survey.info[name]) for name in used]),
        "sha256 of images": np.array(digest),
    }
    cache.save(path, arrays)
    parts.forget(images)
    return arrays


def look(sets: Iterable[dict[str, Any]]) -> Survey:
    """Every icon of the sets that take part, as far as it is a drawing of its own."""
    survey = Survey([], {}, Counter())
    for icons in sets:
        prefix = icons["prefix"]
        if prefix in BRAND_SETS:
            survey.brands.update(icons["icons"].keys())
        if not takes_part(prefix, icons["info"]):
            continue
        survey.info[prefix] = icons["info"]
        styles = icon_names.Styles(icons)
        for icon in (*icons["icons"], *icons.get("aliases", {})):
            if iconify.is_drawn(icons, icon) and f"{prefix}:{icon}" not in EMPTY:
                drawing = hashlib.sha256(iconify.svg_of(icons, icon).encode()).digest()
                survey.found.append(Found(prefix, icon, styles.read(icon), drawing))
    return survey


def takes_part(prefix: str, info: dict[str, Any]) -> bool:
    """Whether a set's drawings are used, by its name and by what it says of itself."""
    kinds = {info.get("category"), *(info.get("tags") or ())}
    return info["license"].get("spdx") in LICENCES and prefix not in _LEFT_OUT and not kinds & KINDS_LEFT_OUT.keys()


def choose_drawings(survey: Survey, max_classes: int | None) -> tuple[dict[str, str], list[Drawing]]:
    """The title of each class, by its key, and its drawings, sorted: of all classes, or of ``max_classes``.

    Of a set, one drawing of a class in a style: the one with the fewest marks of a variant, then the shortest name. The
    same drawing in two sets counts once. Drawings that stand in two classes, by different names, are left out.
    """
    vocabulary = icon_names.Vocabulary(one.name.words for one in survey.found)
    keys: dict[bytes, set[str]] = defaultdict(set)
    best: dict[tuple[str, str, str], Found] = {}
    titles: dict[str, Counter[str]] = defaultdict(Counter)
    for one in survey.found:
        key = vocabulary.key(one.name.words)
        keys[one.digest].add(key)
        titles[key][" ".join(vocabulary.spelled(one.name.words))] += 1
        place = key, one.set, one.name.style
        if place not in best or _order(one) < _order(best[place]):
            best[place] = one
    classes: dict[str, dict[bytes, Drawing]] = defaultdict(dict)
    for (key, prefix, _), one in sorted(best.items()):
        if len(keys[one.digest]) == 1 and not _is_brand(one.name, survey.brands):
            classes[key].setdefault(one.digest, Drawing(key, prefix, one.icon))
    enough = [key for key, drawings in classes.items() if _is_class(drawings.values(), survey)]
    chosen = split.choose(enough, max_classes)
    return (
        {key: min(titles[key], key=lambda title: (-titles[key][title], title)) for key in chosen},
        sorted(drawing for key in chosen for drawing in classes[key].values()),
    )


def _order(one: Found) -> tuple[int, int, str]:
    return one.name.variants, len(one.icon), one.icon


def _is_brand(name: Name, brands: Counter[str]) -> bool:
    bare = "-".join(word for word in name.words if word not in FRAMES)
    return icon_names.is_brand(name.words) or max(brands[bare], brands["-".join(name.words)]) >= BRAND_COUNT


def _is_class(drawings: Iterable[Drawing], survey: Survey) -> bool:
    authors = [survey.info[drawing.set]["author"]["name"] for drawing in drawings]
    return len(authors) >= MIN_IMAGES and len({SAME_DESIGNER.get(a, a) for a in authors}) >= MIN_DESIGNERS


def _sketches(sets: Iterable[dict[str, Any]], drawings: list[Drawing]) -> Iterator[svg.Sketch]:
    """The SVG texts of drawings, in their order."""
    wanted: dict[str, set[str]] = defaultdict(set)
    for drawing in drawings:
        wanted[drawing.set].add(drawing.icon)
    texts = {(icons["prefix"], icon): iconify.svg_of(icons, icon) for icons in sets for icon in wanted[icons["prefix"]]}
    for drawing in drawings:
        yield svg.Sketch(f"{drawing.set}:{drawing.icon}", texts[drawing.set, drawing.icon])
