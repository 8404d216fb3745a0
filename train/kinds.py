"""What a dictionary that was read from a file must hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Kinds = Mapping[str, Any]
"""By key what is there: a type or several, ``Each``, ``Numbers``, or the kinds of a dictionary in it."""
NUMBER = (int, float)


@dataclass(frozen=True)
class Each:
    """A list of one kind."""

    kind: Any


class Numbers:
    """A dictionary of numbers; those of these names are in it."""

    def __init__(self, *names: str) -> None:
        self.names = names


def require(content: object, kinds: Any, name: str = "it") -> None:
    """Raise ValueError, naming what is at fault, unless this is of a kind. A dictionary may have other keys."""
    if isinstance(kinds, Numbers):
        require(content, dict.fromkeys(kinds.names, NUMBER), name)
        assert isinstance(content, dict)
        kinds = dict.fromkeys(content, NUMBER)
    if isinstance(kinds, Each):
        require(content, list, name)
        assert isinstance(content, list)
        for element in content:
            require(element, kinds.kind, name)
    elif isinstance(kinds, Mapping):
        if not isinstance(content, dict):
            raise ValueError(f"{name} is not a dictionary but of type {type(content).__name__}")
        for key, kind in kinds.items():
            if key not in content:
                raise ValueError(f"{key} is missing")
            require(content[key], kind, str(key))
    elif not isinstance(content, kinds):
        raise ValueError(f"{name} is of type {type(content).__name__}")
    elif isinstance(content, int) and content.bit_length() > 63:
        raise ValueError(f"{name} is a number of {content.bit_length()} bits")
