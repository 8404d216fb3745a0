"""The fonts of pictures. Names of classes may be in any script, and matplotlib's own font lacks the East Asian ones."""

from __future__ import annotations

import logging

from matplotlib import font_manager

OWN = "DejaVu Sans"
EAST_ASIAN = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans CJK KR",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Hiragino Sans",
    "Apple SD Gothic Neo",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
    "Arial Unicode MS",
)
"""Those that come with systems, or are usually installed."""


def families() -> list[str]:
    """matplotlib's own, then those of this machine that have what it lacks: a character is taken from the first that
    has it. If none has, a box stands for it."""
    logging.getLogger(font_manager.__name__).setLevel(logging.ERROR)  # it says of each what weights it lacks
    installed = set(font_manager.get_font_names())
    return [OWN, *(name for name in EAST_ASIAN if name in installed)]
