"""The Pythons of this machine."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from .run import Unavailable, run

QUESTION = """
import ensurepip, json, sys, sysconfig, venv
has_abi = sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED")
print(json.dumps([sys.version_info[:3], has_abi]))
"""


@dataclass(frozen=True)
class Interpreter:
    """A Python that can make environments for the wheel."""

    program: str
    version: tuple[int, int, int]

    @classmethod
    def ask(cls, program: str) -> Interpreter:
        """Runs a program to see which Python it is.

        Raises:
            Unavailable: it does not run, cannot make environments, or has no stable ABI.
        """
        answer = run([program, "-I", "-c", QUESTION], Unavailable)
        try:
            version, has_abi = json.loads(answer)
        except ValueError as error:
            raise Unavailable(f"{program} is not a Python") from error
        if not has_abi:
            raise Unavailable(f"{program} loads no library of the stable ABI: it is not CPython, or free-threaded")
        return cls(program, tuple(version))


def find_interpreters(oldest: tuple[int, int]) -> list[Interpreter]:
    """One interpreter per minor version from `oldest` on, in ascending order: on PATH, of pyenv, or this one."""
    minors = [f"python{oldest[0]}.{minor}" for minor in range(oldest[1], oldest[1] + 20)]
    programs = [path for path in map(shutil.which, minors) if path is not None]
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    programs += map(str, sorted(pyenv.glob("versions/*/bin/python")))
    found: dict[tuple[int, int], Interpreter] = {}
    for program in [*programs, sys.executable]:
        try:
            interpreter = Interpreter.ask(program)
        except Unavailable:  # pyenv puts programs on PATH that run only where their version is chosen
            continue
        found.setdefault(interpreter.version[:2], interpreter)
    return [found[minor] for minor in sorted(found) if minor >= oldest]
