"""In-Shop Clothes Retrieval: as Stanford Online Products (`sop.py`), except what follows. Not tried on the data set."""

from __future__ import annotations

from typing import Any

from .sop import SETTINGS as SOP

SETTINGS: dict[str, Any] = SOP | {
    "data": "inshop:PATH",
    "memory_size": 25600,  # nearly all of the 25,882 training images, as there
}
