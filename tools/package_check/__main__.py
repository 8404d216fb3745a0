"""Checks a wheel and a source archive where nothing else is installed."""

from __future__ import annotations

import argparse
import re
import sys
import tarfile
import zipfile
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
        check = partial(check_archive, args.archive, args.wheel, there, folder.path)
        outcomes.append(attempt("built from the sources", check))
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
    """Looks in the source archive for every file that git knows, as it is in the checkout.

    Raises:
        Unavailable: this is not a clone.
        Failed: some are not in it, or differ.
    """
    listed = run(["git", "-C", str(ROOT), "ls-files", "-z"], Unavailable).rstrip("\0").split("\0")
    with tarfile.open(archive) as tar:
        held = {member.name.partition("/")[2]: member for member in tar if member.isfile()}
        missing = [name for name in listed if name not in held]
        if missing:
            raise Failed(f"the archive lacks {missing}: see MANIFEST.in")
        changed = [name for name in listed if contents(tar, held[name]) != (ROOT / name).read_bytes()]
    if changed:
        raise Failed(f"the archive has other contents than the checkout in {changed}")
    return Outcome("source archive", f"has all {len(listed)} files of the checkout")


def contents(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


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


def check_archive(archive: Path, wheel: Path, there: Environment, folder: Path) -> Outcome:
    """Unpacks the source archive and runs some of its tests on the installed wheel.

    What is built there without kernels must be that wheel except for its library: the kernels' sources have been
    compiled from the checkout, which has the same files.

    Raises:
        Unavailable: what builds and tests cannot be installed.
        Failed: the wheel cannot be built, has other files, or a test fails.
    """
    there.install(*requirements(), "pytest", "hypothesis")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    [sources] = folder.glob("xbn_ext-*")
    built, given = packages(there.build(sources, folder / "built", XBN_NATIVE="0")), packages(wheel)
    if built != given:
        differ = sorted(name for name in built | given if built.get(name) != given.get(name))
        raise Failed(f"{wheel.name} and a wheel that is built from the archive differ in {differ}")
    tests = [sources / "tests" / name for name in TESTS]
    # Without the sources in sys.path, where xbn_ext has no library.
    said = there.run("pytest", "-q", "-p", "no:cacheprovider", "-o", "pythonpath=", *tests)
    return Outcome(
        "source archive", f"builds the same packages, and its tests of the wheel say: {said.splitlines()[-1]}"
    )


def packages(wheel: Path) -> dict[str, int]:
    """The checksums of the files that are installed as packages, except for the library's."""
    with zipfile.ZipFile(wheel) as file:
        return {
            member.filename: member.CRC
            for member in file.infolist()
            if not member.is_dir() and not member.filename.endswith(".so") and ".dist-info/" not in member.filename
        }


def pinned(package: str) -> str:
    """A package as requirements.txt names it."""
    [pin] = re.findall(rf"^{package}==.*$", (ROOT / "requirements.txt").read_text("utf-8"), re.M)
    return str(pin)


if __name__ == "__main__":
    sys.exit(main())
