"""A wheel of this checkout's sources, built with the oldest torch: its headers are not those of later ones."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .environments import Folder
from .pairs import Pair, run_inside
from .report import Outcome
from .run import Unavailable
from .wheel import Wheel

ROOT = Path(__file__).parents[2]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "THIRD_PARTY.md", "csrc", "xbn_ext", "train")


def check_build(pair: Pair, wheel: Wheel, folder: Folder, index: Sequence[str]) -> Outcome:
    """Builds a wheel with the torch of a pair, CUDA kernels for this machine's GPUs alone, and runs `inside.py` there.

    Args:
        pair: what the environment is made of.
        wheel: says what the package requires.
        folder: where the environment is made.
        index: options of pip, where torch comes from.

    Raises:
        Unavailable: there is no compiler, no such Python, or no such torch for it.
        Failed: the wheel cannot be built or installed, or does not hold what it claims.
    """
    if shutil.which(shlex.split(os.environ.get("CXX") or "c++")[0]) is None:
        raise Unavailable("there is no C++ compiler")
    with pair.environment(wheel, folder, index) as there, tempfile.TemporaryDirectory() as place:
        there.install(*requirements())
        built = there.build(copy_sources(Path(place, "sources")), Path(place, "dist"), XBN_CUDA_ARCHS="native")
        report = run_inside(there, built)
    return Outcome(f"built with torch {report['torch']}", f"Python {report['python']}")


def requirements() -> list[str]:
    """What pyproject.toml builds with, except torch."""
    text = Path(ROOT, "pyproject.toml").read_text(encoding="utf-8")
    [required] = re.findall(r"^requires = (\[.*?\])$", text, re.MULTILINE | re.DOTALL)
    return [requirement for requirement in ast.literal_eval(required) if not requirement.startswith("torch")]


def copy_sources(place: Path) -> Path:
    """A copy without what has been built: that would be built again, for the other torch."""
    place.mkdir()
    for name in SOURCES:
        if Path(ROOT, name).is_dir():
            shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy2(ROOT / name, place)
    return place
