"""Iconify's format: a set of icons as one JSON object, and an icon of it as an SVG text.

A set has ``icons``, name to drawing, and ``aliases``, name to ``{"parent": name}``, perhaps turned or mirrored. What a
drawing does not say of its box, the set does, then the format.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import svg
from .part import DataError

FLIPS = ("hFlip", "vFlip")
TRANSFORMS = (*FLIPS, "rotate")
LONGEST_CHAIN = 16
"""Aliases of aliases."""
_BOX = {"left": 0, "top": 0, "width": 16, "height": 16}


def sets(tgz: Path) -> Iterator[dict[str, Any]]:
    """Each set of a packed ``@iconify/json``, parsed, one at a time: all of them would take gigabytes."""
    with tarfile.open(tgz) as archive:
        for member in archive:
            path = Path(member.name)
            content = archive.extractfile(member) if path.parent == Path("package/json") else None
            if content is not None and path.suffix == ".json":
                yield json.load(content)


def svg_of(icons: dict[str, Any], name: str) -> str:
    """An icon of a set, or an alias, as an SVG text.

    Raises:
        DataError: an alias leads nowhere, or to itself.
    """
    drawing = _resolve(icons, name)
    box = _BOX | {side: icons[side] for side in _BOX if side in icons}
    box |= {side: drawing[side] for side in _BOX if side in drawing}
    return svg.wrap(*_transformed(drawing, **box))


def is_drawn(icons: dict[str, Any], name: str) -> bool:
    """Whether ``name`` is a drawing of its own, to be shown: an icon, or an alias that turns or mirrors one."""
    if name in icons["icons"]:
        return not icons["icons"][name].get("hidden", False)
    alias = icons["aliases"][name]
    return any(alias.get(t) for t in TRANSFORMS) and not _resolve(icons, name).get("hidden", False)


def credit(info: dict[str, Any]) -> str:
    """Name, author and licence of a set, and where it is, from what a set tells of itself."""
    author = info["author"]
    where = [author["url"]] if author.get("url") else []
    return ", ".join([f"{info['name']} by {author['name']}", info["license"]["title"], *where])


def _resolve(icons: dict[str, Any], name: str) -> dict[str, Any]:
    """The drawing that a name stands for; transforms on the way add up, the rest is the nearest one's."""
    merged: dict[str, Any] = {}
    parent: str | None = name
    for _ in range(LONGEST_CHAIN):
        found = icons["icons"].get(parent) or icons.get("aliases", {}).get(parent)
        if found is None:
            break
        flips = {flip: bool(merged.get(flip)) != bool(found.get(flip)) for flip in FLIPS}
        turns = (merged.get("rotate", 0) + found.get("rotate", 0)) % 4
        merged = found | merged | flips | {"rotate": turns}
        if "body" in found:
            return merged
        parent = found.get("parent")
    raise DataError(f"{icons.get('prefix')}:{name}: an alias of an icon that does not exist: {parent!r}")


def _transformed(
    drawing: dict[str, Any], left: float, top: float, width: float, height: float
) -> tuple[str, float, float, float, float]:
    """The body of a drawing, first mirrored, then turned, about the middle of its box; and the box of that."""
    body, turns = drawing["body"], drawing["rotate"]
    x, y = left + width / 2, top + height / 2
    steps = []
    if turns:
        steps.append(f"rotate({90 * turns} {x} {y})")
    if drawing["hFlip"] or drawing["vFlip"]:
        across, along = (-1 if drawing[flip] else 1 for flip in FLIPS)
        steps.append(f"translate({x - across * x} {y - along * y}) scale({across} {along})")
    if steps:
        body = f'<g transform="{" ".join(steps)}">{body}</g>'
    if turns % 2:
        left, top, width, height = x - height / 2, y - width / 2, height, width
    return body, left, top, width, height
