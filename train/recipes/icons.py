"""Icons at 32 pixels and a small network trained from random weights: ten minutes on one CPU core.

The settings are those of `emoji_small.py`, except what follows; they were not tuned on icons.
"""

from __future__ import annotations

from typing import Any

from .emoji_small import SETTINGS as EMOJI

SETTINGS: dict[str, Any] = EMOJI | {
    "data": "icons",
    "memory_size": 16384,  # two fifths of the training images
    "batch_size": 64,
    "steps": 2500,
    "lr_warmup": 100,
    "eval_every": 500,
}
