"""A Python and a torch: which ones go together, and whether the wheel holds there what it claims."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .environments import Environment, Folder
from .interpreters import Interpreter, find_interpreters
from .report import Outcome
from .run import Failed
from .wheel import Wheel

NEWEST = "newest"
INSIDE = Path(__file__).with_name("inside.py")


@dataclass(frozen=True)
class Pair:
    """A Python, by its program, and a version of torch, or `NEWEST`."""

    program: str
    torch: str

    def __str__(self) -> str:
        return f"{self.program}, torch {self.torch}"

    @contextmanager
    def environment(self, wheel: Wheel, folder: Folder, index: Sequence[str]) -> Iterator[Environment]:
        """An environment that has the two, and what the wheel requires.

        Raises:
            Unavailable: there is no such Python, or pip finds no such torch for it.
        """
        version = ".".join(map(str, Interpreter.ask(self.program).version))
        torch = "torch" if self.torch == NEWEST else f"torch=={self.torch}"
        with folder.environment(self.program, f"python-{version}-torch-{self.torch}") as there:
            there.install("--upgrade", *index, torch, *wheel.requirements)
            yield there


def choose_pairs(programs: Sequence[str], versions: Sequence[str], wheel: Wheel) -> list[Pair]:
    """Pairs the programs with the versions of torch, in order, the last of the shorter list with the rest of the other.

    Args:
        programs: Pythons; none: the oldest and the newest that are found.
        versions: of torch; none: the oldest that the wheel supports and the newest there is.
        wheel: says what is supported.
    """
    if not programs:
        found = [interpreter.program for interpreter in find_interpreters(wheel.oldest_python)]
        programs = list(dict.fromkeys([*found[:1], *found[-1:]])) or [sys.executable]
    versions = versions or [wheel.oldest_torch, NEWEST]
    n = max(len(programs), len(versions))
    return [Pair(programs[min(i, len(programs) - 1)], versions[min(i, len(versions) - 1)]) for i in range(n)]


def check_pair(pair: Pair, wheel: Wheel, folder: Folder, index: Sequence[str]) -> Outcome:
    """Installs torch and the wheel into an environment and runs `inside.py` there.

    Args:
        pair: what the environment is made of.
        wheel: what is checked.
        folder: where the environment is made.
        index: options of pip, where torch comes from.

    Raises:
        Unavailable: there is no such Python, or pip finds no such torch for it.
        Failed: the wheel cannot be installed, or does not hold what it claims.
    """
    with pair.environment(wheel, folder, index) as there:
        report = run_inside(there, wheel.path)
    what = f"Python {report['python']}, torch {report['torch']}"
    cuda = f"CUDA {report['cuda']}, kernels {report['kernels']}" if report["cuda"] else "no CUDA in this torch"
    return Outcome(what, cuda, report=report)


def run_inside(there: Environment, wheel: Path) -> dict[str, str]:
    """Installs a wheel, runs `inside.py` and returns what that printed.

    Raises:
        Failed: the wheel cannot be installed, or does not hold what it claims.
    """
    there.install("--no-deps", "--force-reinstall", wheel, otherwise=Failed)
    report: dict[str, str] = json.loads(there.run("python", "-I", INSIDE).splitlines()[-1])
    return report
