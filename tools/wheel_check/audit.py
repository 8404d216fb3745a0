"""The library's ABI, as abi3audit sees it."""

from __future__ import annotations

import json
import sys

from .environments import Folder
from .interpreters import Interpreter
from .report import Outcome
from .run import Failed
from .wheel import Wheel


def check_abi(wheel: Wheel, folder: Folder) -> Outcome:
    """Runs abi3audit in an environment of its own: does the library keep to the stable ABI of the oldest Python?

    Raises:
        Unavailable: abi3audit cannot be installed.
        Failed: it found something, or no library that claims this ABI.
    """
    with folder.environment(Interpreter.ask(sys.executable).program, "abi3audit") as there:
        there.install("abi3audit")
        report = json.loads(there.run("abi3audit", "--strict", "--report", wheel.path))
    oldest = ".".join(map(str, wheel.oldest_python))
    libraries = [library for spec in report["specs"].values() for library in spec["wheel"]]
    if not libraries or any(library["result"]["baseline"] != oldest for library in libraries):
        raise Failed(f"expected libraries for the stable ABI of Python {oldest}, got {libraries}")
    return Outcome("abi3audit --strict", f"only the stable ABI of Python {oldest}")
