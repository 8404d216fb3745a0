"""What an icon shows, by its name: style, size, variant and spelling taken off.

``material-symbols:home-outline``, ``ic:round-home``, ``fluent:home-16-filled``, ``fa7-solid:house`` and
``solar:home-2-bold`` are drawings of one thing, ``home``. The rule, in order:

1. Of the prefixes and suffixes that the set itself declares as styles, one of each is taken off. A suffix that may also
   be a thing (``traffic-light``) is one only if the set has the rest of the name in another style, too.
2. Words that are styles in every set (``STYLES``) are taken off the end.
3. So are marks of a variant: ``alt``, and numbers from 0 to 9, or with a leading 0, in digits or words; a digit also
   at the end of a word (``trash2``). They stay where a number is what an icon shows (``NUMBERED``): ``dice-5``.
4. A name that is spelled as one word and as several is what most sets write: ``lightbulb``, ``light-bulb``.
5. Synonyms become one word (``SYNONYMS``): ``gear``, ``cog``, ``settings``.
6. The order of words does not matter: ``check-circle``, ``circle-check``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

STYLES = {  # what a drawing in this style is
    "outline": "outline",
    "outlined": "outline",
    "linear": "outline",
    "fill": "fill",
    "filled": "fill",
    "solid": "fill",
    "duotone": "duotone",
    "twotone": "duotone",
    "broken": "broken",
}
_DECLARED = STYLES | {"line": "outline", "duo": "duotone", "tone": "duotone"}
_SLIGHT = {"", "rounded", "round", "sharp", "baseline", "thin", "light", "regular", "two"}
"""Corners and weights: two drawings that differ in them only are nearly the same."""
_WEIGHTS = {"thin", "light"}
"""In a set that has one of these, bold is a weight; in others it is a way to draw."""
_DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS = {word: str(digit) for digit, word in enumerate(_DIGIT_WORDS)}
_VARIANTS = {"alt", "variant"}
_GLUED = re.compile(r"([a-z]{3,})[0-9]")
"""``trash2``, not ``h1`` or ``mp3``."""
# fmt: off
NUMBERED = {
    "backward", "ball", "battery", "circle", "counter", "dice", "die", "exposure", "forward", "gobackward", "goforward",
    "h", "heading", "hexagon", "hour", "keycap", "looks", "medal", "number", "numeric", "octagon", "pentagon", "phase",
    "replay", "rewind", "roman", "signal", "skip", "square", "stage", "step",
}
# fmt: on
SYNONYMS = {
    other: word
    for word, others in {
        "add": "plus",
        "alert": "warning",
        "binoculars": "binocular",
        "bulb": "lightbulb",
        "center": "centre",
        "check": "tick checkmark",
        "circle": "circled",
        "close": "xmark x times",
        "color": "colour colors",
        "document": "doc",
        "equal": "equals",
        "favorite": "favourite",
        "filter": "funnel",
        "fire": "flame",
        "gamepad": "controller",
        "globe": "earth world",
        "grey": "gray",
        "heading": "header",
        "headphones": "headphone",
        "home": "house",
        "info": "information",
        "layer": "layers",
        "letter": "alpha alphabet",
        "mail": "envelope email",
        "mic": "microphone",
        "minus": "subtract",
        "mobile": "cellphone smartphone",
        "notification": "notifications",
        "number": "numeric",
        "off": "slash",
        "phone": "telephone",
        "plane": "airplane aeroplane",
        "question": "help",
        "scissors": "scissor",
        "search": "magnify magnifier magnifer",
        "settings": "setting cog gear",
        "shop": "store",
        "slider": "sliders",
        "thumbs": "thumb",
        "thermometer": "temperature",
        "trash": "bin delete",
        "user": "person account",
    }.items()
    for other in others.split()
}
BRAND_WORDS = ("brand", "brands", "logo", "logos", "social")
"""At either end of a name they say that it is a trade mark."""

Words = tuple[str, ...]


class Name(NamedTuple):
    """An icon's name, read."""

    words: Words
    """What it shows, as its set spells it."""
    variants: int
    """How many marks of a variant it had."""
    style: str
    """Empty for a plain one; of one set, two drawings of one thing in one style differ slightly."""


class Styles:
    """The styles of one set."""

    def __init__(self, icons: Mapping[str, Any]) -> None:
        """``icons`` is the set in Iconify's format."""
        self.prefixes = _longest_first(icons.get("prefixes", {}))
        self.suffixes = _longest_first(icons.get("suffixes", {}))
        self.names = icons["icons"].keys() | icons.get("aliases", {}).keys()
        self.weighs_bold = bool(_WEIGHTS & {w for suffix in self.suffixes for w in suffix.split("-")})

    def read(self, name: str) -> Name:
        """What a name of the set says."""
        styles: list[str] = []
        for prefix in self.prefixes:
            if name.startswith(f"{prefix}-"):
                name = name.removeprefix(f"{prefix}-")
                styles.append(prefix)
                break
        for suffix in self.suffixes:
            stem = name.removesuffix(f"-{suffix}")
            if stem != name and self._is_style(suffix, stem):
                name = stem
                styles += suffix.split("-")
                break
        words = name.split("-")
        while len(words) > 1 and words[-1] in STYLES:
            styles.append(words.pop())
        variants = 0
        while len(words) > 1 and _is_variant(words):
            words.pop()
            variants += 1
        glued = _GLUED.fullmatch(words[-1])
        if glued:
            words[-1] = glued[1]
            variants += 1
        return Name(tuple(words), variants, self._style(styles))

    def _is_style(self, suffix: str, stem: str) -> bool:
        if suffix.rpartition("-")[2] in STYLES:
            return True
        return stem in self.names or any(f"{stem}-{s}" in self.names for s in self.suffixes if s != suffix)

    def _style(self, words: Iterable[str]) -> str:
        slight = _SLIGHT | ({"bold"} if self.weighs_bold else set())
        return " ".join(sorted({_DECLARED.get(w, w) for w in words if w not in slight and not w[0].isdigit()}))


class Vocabulary:
    """How most sets spell what they show."""

    def __init__(self, names: Iterable[Words]) -> None:
        """``names`` are the words of every icon of every set."""
        counts: dict[str, Counter[Words]] = {}
        for words in names:
            counts.setdefault("".join(words), Counter())[words] += 1
        self.usual = {joined: max(found, key=lambda w: (found[w], w)) for joined, found in counts.items()}

    def spelled(self, words: Words) -> Words:
        """A name as most sets write it."""
        return self.usual["".join(words)]

    def key(self, words: Words) -> str:
        """The class of a name: its words as most sets write them, synonyms made one, in alphabetical order."""
        digits = (DIGITS.get(word, word) for word in self.spelled(words))
        return " ".join(sorted(SYNONYMS.get(word, word) for word in digits))


def is_brand(words: Words) -> bool:
    """Whether a name says itself that it is a trade mark."""
    return words[0] in BRAND_WORDS or words[-1] in BRAND_WORDS


def _is_variant(words: list[str]) -> bool:
    last = DIGITS.get(words[-1], words[-1])
    number = last.isdigit() and (len(last) == 1 or (last[0] == "0" and len(last) == 2))
    return last in _VARIANTS or (number and not NUMBERED.intersection(words[:-1]))


def _longest_first(affixes: Mapping[str, Any]) -> list[str]:
    return sorted(filter(None, affixes), key=lambda affix: (-len(affix), affix))
