"""The image formats that Pillow decodes on this machine, and their suffixes.

Pillow registers more than that: formats that it only writes (PDF), and formats whose header it reads, but no
pixel (HDF5, GRIB, WMF, MPEG; EPS without Ghostscript).
"""

from __future__ import annotations

import inspect

from PIL import EpsImagePlugin, Image, ImageFile

_HEADER_ONLY = ("MPEG",) if EpsImagePlugin.has_ghostscript() else ("MPEG", "EPS")


def _decodes(name: str) -> bool:
    factory, _ = Image.OPEN[name]
    stub = inspect.isclass(factory) and issubclass(factory, ImageFile.StubImageFile)
    return not stub and name not in _HEADER_ONLY


Image.init()
DECODED = tuple(name for name in Image.ID if name in Image.OPEN and _decodes(name))
"""Pillow's names of formats, in the order it tries them."""
SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in DECODED)
"""Lower case, with the dot."""
