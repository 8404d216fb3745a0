"""Checks a wheel and a source archive where nothing else is installed."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tarfile
import zlib
from functools import partial
from pathlib import Path

from ..wheel_check.built import ROOT, requirements
from ..wheel_check.environments import Environment, Folder
from ..wheel_check.interpreters import Interpreter
from ..wheel_check.report import Outcome, attempt
from ..wheel_check.run import Failed, Unavailable, run
from ..wheel_check.wheel import Wheel

TESTS = (  # of CrossBatchMemory
    "test_memory_arguments.py", "test_memory_batches.py", "test_memory_checkpoints.py", "test_memory_fill.py",
    "test_memory_not_finite.py", "test_memory_reference.py", "test_memory_stats.py", "test_memory_temperature.py",
    "test_memory_training.py",
)  # fmt: skip
NO_COMPILER = """
import shutil
found = [name for name in ("c++", "g++", "gcc", "cc", "clang", "nvcc", "ninja") if shutil.which(name)]
assert not found, f"{found} in reach"
"""
WITHOUT_EXTRA = """
import subprocess
done = subprocess.run(["xbn-train", "--help"], capture_output=True, text=True)
assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith(": pip install 'xbn_ext[train]'"), done.stderr
"""


def main(argv: list[str] | None = None) -> int:
    """Checks both files and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.package_check", description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("archive", type=Path, help="the source archive")
    args = parser.parse_args(argv)
    try:
        Wheel.read(args.wheel)
        require_archive(args.archive)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    outcomes = [attempt(args.archive.name, partial(check_complete, args.archive))]
    python = Interpreter.ask(sys.executable).program
    with Folder.open(None, keep=False) as folder, folder.environment(python, "bare") as there:
        outcomes.append(attempt(args.wheel.name, partial(check_wheel, args.wheel.resolve(), there)))
        outcomes.append(attempt("built from the sources", partial(check_archive, args.archive, there, folder.path)))
    return 0 if all(outcome.result == "ok" for outcome in outcomes) else 1


def require_archive(path: Path) -> None:
    """Raises ValueError if that is no tar archive."""
    try:
        with tarfile.open(path) as tar:
            tar.getnames()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a source archive: {reason}") from error


def check_complete(archive: Path) -> Outcome:
    """Looks in the source archive for every file that git knows.

    Raises:
        Unavailable: this is not a clone.
        Failed: some are not in it.
    """
    listed = run(["git", "-C", str(ROOT), "ls-files", "-z"], Unavailable).split("\0")
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    missing = [name for name in listed if name and name not in held]
    if missing:
        raise Failed(f"the archive lacks {missing}: see MANIFEST.in")
    return Outcome("source archive", f"has all {len(listed) - 1} files of the checkout")


def check_wheel(wheel: Path, there: Environment) -> Outcome:
    """Installs torch, then the wheel with what it requires, and runs the README's first program without a compiler.

    Then the training program: it says what it lacks, and starts when it has that.

    Raises:
        Unavailable: torch cannot be installed.
        Failed: the wheel cannot be installed, or a program does not run.
    """
    there.install(pinned("torch"))
    there.install(wheel, otherwise=Failed)
    program = there.programs.parent / "readme.py"
    [first, *_] = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)
    program.write_text(NO_COMPILER + first + "print(loss.item())\n", "utf-8")
    loss = there.run("python", "-I", "-W", "error", program)
    there.run("python", "-I", "-c", WITHOUT_EXTRA)
    there.install(f"{wheel}[train]", pinned("torch"), pinned("torchvision"), otherwise=Failed)
    there.run("xbn-train", "--help")
    said = f"the README's program runs where there is no compiler, to a loss of {float(loss):.3f}"
    return Outcome("wheel", f"{said}, and so does xbn-train")


def check_archive(archive: Path, there: Environment, folder: Path) -> Outcome:
    """Unpacks the source archive, builds a wheel there, installs that and runs some of the archive's tests.

    Raises:
        Unavailable: there is no compiler, or what builds and tests cannot be installed.
        Failed: no wheel can be built, or a test fails.
    """
    if shutil.which("c++") is None:
        raise Unavailable("there is no C++ compiler")
    there.install(*requirements(), "pytest", "hypothesis")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    [sources] = folder.glob("xbn_ext-*")
    there.install("--no-deps", "--force-reinstall", there.build(sources, folder / "built", XBN_CUDA="0"))
    tests = [sources / "tests" / name for name in TESTS]
    # Without the sources in sys.path, where xbn_ext has no library.
    said = there.run("pytest", "-q", "-p", "no:cacheprovider", "-o", "pythonpath=", *tests)
    return Outcome("source archive", f"builds, and its tests say: {said.splitlines()[-1]}")


def pinned(package: str) -> str:
    """A package as requirements.txt names it."""
    [pin] = re.findall(rf"^{package}==.*$", (ROOT / "requirements.txt").read_text("utf-8"), re.M)
    return str(pin)


if __name__ == "__main__":
    sys.exit(main())
