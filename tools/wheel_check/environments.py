"""Virtual environments: making one, installing into it, running what is in it, and removing it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .run import Failed, Unavailable, run


class Environment:
    """A virtual environment in a folder."""

    def __init__(self, python: str, folder: Path) -> None:
        """Makes it, or takes the one that is there.

        Raises:
            Unavailable: it cannot be made.
        """
        self.programs = folder / "bin"
        run([python, "-m", "venv", folder], Unavailable)

    def install(self, *arguments: str | Path, otherwise: type[Exception] = Unavailable) -> None:
        """Runs `pip install`; no kernels are compiled, and modules to bytecode only when they are imported.

        Raises:
            Exception: of the type `otherwise`, with the end of what pip printed.
        """
        pip = ["-I", "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile"]
        run([self.programs / "python", *pip, "--only-binary=:all:", *arguments], otherwise)

    def run(self, program: str, *arguments: str | Path) -> str:
        """Runs a program of this environment where no other is found, a compiler least of all; returns its output.

        Raises:
            Failed: with the end of what it printed.
        """
        return run([self.programs / program, *arguments], Failed, {**os.environ, "PATH": str(self.programs)})

    def build(self, sources: Path, folder: Path, **environ: str) -> Path:
        """Builds a wheel into an empty folder, with what is installed here and the compilers of this machine.

        Raises:
            Failed: with the end of what was printed.
        """
        pip = ["-I", "-m", "pip", "wheel", "--disable-pip-version-check", "--no-build-isolation", "--no-deps"]
        path = os.pathsep.join([str(self.programs), os.environ["PATH"]])
        environ = {**os.environ, **environ, "PATH": path}
        run([self.programs / "python", *pip, "--wheel-dir", folder, sources], Failed, environ)
        [wheel] = folder.glob("*.whl")
        return wheel


@dataclass(frozen=True)
class Folder:
    """Where environments are made."""

    path: Path
    keep: bool

    @classmethod
    @contextmanager
    def open(cls, chosen: Path | None, keep: bool) -> Iterator[Folder]:
        """The chosen folder, or a temporary one that is removed at the end unless it is to be kept."""
        path = chosen or Path(tempfile.mkdtemp(prefix="wheel_check-"))
        path.mkdir(parents=True, exist_ok=True)
        try:
            yield cls(path.resolve(), keep)
        finally:
            if keep:
                print(f"environments kept in {path}")
            elif chosen is None:
                shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def environment(self, python: str, name: str) -> Iterator[Environment]:
        """An environment that is removed at the end unless it is to be kept: one at a time is large enough."""
        try:
            yield Environment(python, self.path / name)
        finally:
            if not self.keep:
                shutil.rmtree(self.path / name, ignore_errors=True)
