"""Pages of HTML that need no other file: the templates in ``pages/``, what is put into them, and pictures inline."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import jinja2
from PIL import Image

from .data import Pixels, images
from .terminal import printable

SIDE = 160
"""Pixels of a thumbnail's long side: a tile at 1.4 pixels to a dot."""
QUALITY = 85


def render(template: str, **values: object) -> str:
    """The page that a file in ``pages/`` makes of values. Text is escaped, and what cannot be seen is spelled out."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_seen,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def _seen(value: object) -> object:
    return printable(value) if type(value) is str else value  # a part that is escaped already is of another type


class Thumbnails:
    """Small pictures as addresses that hold them, each file decoded once."""

    def __init__(self) -> None:
        self.made: dict[Path, str] = {}

    def __call__(self, path: Path) -> str:
        """That of a file; raises DataError if it cannot be read."""
        if path not in self.made:
            self.made[path] = thumbnail(images.decode(path))
        return self.made[path]


def thumbnail(pixels: Pixels) -> str:
    """An address that holds a picture, uint8 [height, width, 3], as a JPEG of SIDE pixels at most."""
    small = Image.fromarray(pixels)
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    with io.BytesIO() as stream:
        small.save(stream, "JPEG", quality=QUALITY, subsampling=0)
        return _address("jpeg", stream.getvalue())


def png(path: Path) -> str | None:
    """An address that holds a PNG file; None if it is not there, or is not whole."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.load()
    except Exception:  # Pillow raises whatever a broken file makes of it
        return None
    return _address("png", content)


def _address(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
