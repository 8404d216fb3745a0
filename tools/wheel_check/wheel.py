"""The wheel and what it says of itself."""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path


@dataclass(frozen=True)
class Wheel:
    path: Path
    oldest_torch: str
    oldest_python: tuple[int, int]
    requirements: tuple[str, ...]
    """What it needs besides torch."""

    @classmethod
    def read(cls, path: Path) -> Wheel:
        """Reads the metadata.

        Raises:
            ValueError: this is not a wheel, or it does not name its oldest torch and Python.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                [member] = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
                metadata = HeaderParser().parsestr(archive.read(member).decode())
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not a wheel: {error}") from error
        required = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
        torch = [match[1] for r in required if (match := re.fullmatch(r"torch\s*>=\s*([\d.]+)", r))]
        python = re.fullmatch(r">=\s*(\d+)\.(\d+)", metadata.get("Requires-Python", ""))
        if len(torch) != 1 or python is None:
            raise ValueError(f"{path} must require torch>=X and Python >=X.Y")
        others = tuple(r for r in required if not re.match(r"torch\b", r))
        return cls(path.resolve(), torch[0], (int(python[1]), int(python[2])), others)
