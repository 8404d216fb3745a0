"""Settings for a data set, one file for each: every setting that decides a result, with where its value is from.

``--recipe NAME`` makes them the defaults of the command line.
"""

from __future__ import annotations

import importlib
from typing import Any

NAMES = ("emoji", "emoji-small", "icons", "sop", "inshop", "deepfashion2")
PLACE = "PATH"
"""Stands in a recipe for what only the command line can say."""


def load(name: str) -> dict[str, Any]:
    """The settings of one of NAMES."""
    settings: dict[str, Any] = importlib.import_module(f".{name.replace('-', '_')}", __name__).SETTINGS
    return dict(settings)
