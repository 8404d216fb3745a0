"""Reads a page of HTML as a browser with no network would, and fails at what such a page must not have."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

ALONE = {"img", "meta"}
"""Elements without an end."""


class Page(HTMLParser):
    """Its text and pictures."""

    def __init__(self, path: Path) -> None:
        """Raises AssertionError if elements are not nested, a script is in it, or something is not in the file."""
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.titles: list[str] = []
        self.pictures: list[Image.Image] = []
        source = path.read_text(encoding="utf-8")
        assert source.startswith("<!doctype html>")
        self.feed(source)
        self.close()
        assert not self.open
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object", "a")
        values = dict(attributes)
        assert not any(name.startswith("on") or name in ("href", "srcset", "style") for name in values)
        if tag == "img":
            kind, _, content = (values["src"] or "").partition(";base64,")
            assert kind in ("data:image/jpeg", "data:image/png") and values["alt"]
            image = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
            image.load()
            self.pictures.append(image)
        if "title" in values:
            self.titles.append(values["title"] or "")
        if tag not in ALONE:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            assert "url(" not in data and "@import" not in data and "prefers-color-scheme: dark" in data
        else:
            self.texts.append(data)
