"""DeepFashion2: as Stanford Online Products (`sop.py`), except what follows. Not tried on the data set."""

from __future__ import annotations

from typing import Any

from .sop import SETTINGS as SOP

SETTINGS: dict[str, Any] = SOP | {
    "data": "deepfashion2:PATH",
    "memory_size": 65536,
}
