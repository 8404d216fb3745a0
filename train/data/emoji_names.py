"""One name for one emoji: the vendors' icon names, traced to Unicode code points.

Five of the eight sets say which code points each of their icons draws (``chars.json``). The others only name their
icons, so a name is looked up among the names and aliases of those five. A class is a sequence of code points: skin
tones and genders are classes of their own.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .iconify import TRANSFORMS

TONES = {"light": 1, "medium-light": 2, "medium": 3, "medium-dark": 4, "dark": 5}
_TONE = re.compile(r"-(medium-light|medium-dark|light|medium|dark)-skin-tone")


@dataclass(frozen=True)
class IconSet:
    """One vendor's package, parsed."""

    vendor: str
    icons: dict[str, Any]
    """icons.json: ``icons`` (name to drawing), ``aliases`` (name to ``{"parent": name}``), default width and height."""
    chars: dict[str, str]
    """chars.json: code points joined by '-' to icon name; empty where the vendor gives none."""
    info: dict[str, Any]
    """info.json: name, author, licence."""

    def aliases(self) -> dict[str, str]:
        """Alias to icon name, for aliases that draw the very same picture."""
        plain = self.icons.get("aliases", {}).items()
        return {alias: a["parent"] for alias, a in plain if not any(t in a for t in TRANSFORMS)}


def squash(name: str) -> str:
    """A name without what vendors spell differently: ``"a-light-skin-tone"`` and ``"A tone1"`` agree."""
    return re.sub(r"[^a-z0-9]", "", _TONE.sub(lambda m: f"-tone{TONES[m[1]]}", name.lower()))


def code_points(chars: str) -> str:
    """The class key: lower-case hex code points joined by '-', without emoji presentation selectors (U+FE0F)."""
    return "-".join(point.lstrip("0") or "0" for point in chars.lower().split("-") if point != "fe0f")


def known_names(sets: Iterable[IconSet]) -> dict[str, str]:
    """Squashed name to class key, from every set that gives code points; the first set to claim a name wins."""
    known: dict[str, str] = {}
    for icon_set in sets:
        if not icon_set.chars:
            continue
        for chars, name in icon_set.chars.items():
            known.setdefault(squash(name), code_points(chars))
        for alias, parent in icon_set.aliases().items():
            if squash(parent) in known:
                known.setdefault(squash(alias), known[squash(parent)])
    return known


def icons_by_class(icon_set: IconSet, known: dict[str, str]) -> dict[str, str]:
    """Class key to icon name for one vendor: at most one picture of a class, icons of unknown meaning left out."""
    own = {squash(name): code_points(chars) for chars, name in icon_set.chars.items()}
    also_called: dict[str, list[str]] = defaultdict(list)
    for alias, parent in icon_set.aliases().items():
        also_called[parent].append(alias)
    found: dict[str, str] = {}
    for icon in icon_set.icons["icons"]:
        for name in (squash(candidate) for candidate in (icon, *also_called[icon])):
            key = own.get(name) or known.get(name)
            if key:
                found.setdefault(key, icon)
                break
    return found


def titles(sets: Iterable[IconSet]) -> dict[str, str]:
    """A readable name for every class key: the first vendor's, or the key where two classes share that name."""
    named: dict[str, str] = {}
    for icon_set in sets:
        for chars, name in icon_set.chars.items():
            named.setdefault(code_points(chars), name.replace("-", " "))
    owner: dict[str, str] = {}
    for key, title in named.items():
        if owner.setdefault(title, key) != key:
            named[key] = f"{title} ({key})"
    return named
