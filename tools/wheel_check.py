"""Checks what the wheel claims: one file for every torch and Python it supports, with or without CUDA, no compiler.

    python tools/wheel_check.py dist/*.whl

Makes an environment of the oldest supported torch on the oldest Python found here and one of the newest torch on the
newest Python, installs the same wheel in both, and runs this file there (`check_here`): every op and some training
steps against the reference, and the CUDA kernels, on a GPU if there is one. Then abi3audit looks at the library.
Downloads gigabytes: torch for Linux comes with CUDA's libraries.

Exit status: 0 if everything asked for was checked and passed, 1 if something failed or could not be had, 2 for wrong
arguments. What could not be checked is said, never passed over.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.parser import HeaderParser
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

HERE = "--here"  # the one argument with which this file checks the environment that it runs in
NEWEST = "newest"


class Unavailable(Exception):
    """What a check needs cannot be had on this machine."""


class Failed(Exception):
    """A check ran and did not pass."""


# --- Inside an environment: torch is imported here only ---------------------------------------------------------------


def check_here() -> dict[str, str]:
    """Checks the wheel that is installed for the running Python and torch.

    Returns:
        What it ran under and how far it went: `python`, `torch`, `cuda` (that torch was built for) and `kernels`.

    Raises:
        Exception: of whatever kind, if the wheel does not hold what it claims.
    """
    import torch

    import xbn_ext

    torch.set_num_threads(1)
    assert Path(xbn_ext.__file__).is_relative_to(sys.prefix), f"{xbn_ext.__file__} is not the installed wheel"
    info = xbn_ext.build_info()
    assert info["torch"] == torch.__version__, info
    check_ops("cpu")
    check_training("cpu")
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "kernels": check_cuda(info["cuda"]),
    }


def check_cuda(architectures: list[str]) -> str:
    """Runs the CUDA kernels on a GPU; without one, sees that torch would find them, and they what they need of torch.

    Returns:
        How far it went.
    """
    import torch

    if torch.version.cuda is None:
        return "not for this torch"
    assert architectures, "the wheel has no CUDA kernels: it was built without a CUDA compiler"
    missing = registered_ops("CPU") - registered_ops("CUDA")
    assert not missing, f"no CUDA kernel is registered for {sorted(missing)}"
    check_torch_functions()
    if not torch.cuda.is_available():
        return "registered, no GPU to run on"
    check_ops("cuda")
    check_training("cuda")
    return f"ran on {torch.cuda.get_device_name()}"


def registered_ops(key: str) -> set[str]:
    """The ops of xbn_ext that have a kernel for a dispatch key of torch."""
    import torch

    names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    ops = {name for name in names if name.startswith("xbn_ext::")}
    return {name for name in ops if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)}


def check_torch_functions() -> None:
    """Finds every function of torch's C interface that the library names, those too that it looks up on a GPU only."""
    extension = sys.modules["xbn_ext._C"].__file__
    assert extension is not None
    names = set(re.findall(rb"(?<!\w)aoti_torch_\w+", Path(extension).read_bytes()))
    libraries = [ctypes.CDLL(name) for name in ("libtorch_cpu.so", "libtorch_cuda.so")]  # both loaded by torch
    missing = [name for name in map(bytes.decode, names) if not any(hasattr(library, name) for library in libraries)]
    assert not missing, f"this torch has no {sorted(missing)}"


def check_ops(device: str) -> None:
    """Holds every op against its twin in `xbn_ext.reference`."""
    from xbn_ext import ops, reference

    actual, expected = run_ops(ops, device), run_ops(reference, device)
    unchecked = registered_ops("CPU") - {f"xbn_ext::{op}" for op in actual}
    assert not unchecked, f"there is no check of {sorted(unchecked)}"
    for op, tensors in actual.items():
        assert_close(f"{op} on {device}", tensors, expected[op])


def assert_close(what: str, actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Asserts that float32 results agree; how closely, the project's tests say."""
    import torch

    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, msg=lambda text: f"{what}: {text}")


def run_ops(ops: Any, device: str) -> dict[str, list[torch.Tensor]]:
    """Calls each op once, on what the ones before it left behind.

    Args:
        ops: a module with them, `xbn_ext.ops` or `xbn_ext.reference`.
        device: where.

    Returns:
        For each op all tensors it returned or may have written.
    """
    import torch

    from xbn_ext import Contrastive
    from xbn_ext.reference import Memory

    torch.manual_seed(0)
    first, x = torch.randn(2, 12, 7).add(5).to(device)  # off centre, for standardize_ to have something to do
    z = torch.nn.functional.normalize(torch.randn(12, 7), dim=1).to(device).requires_grad_()
    labels, mask = torch.arange(12, device=device) % 3, torch.arange(12, device=device) != 4
    with torch.device(device):
        m = Memory.empty(16, 7, torch.float32)

    def state(*returned: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.detach().clone() for tensor in (*returned, *vars(m).values())]

    results = {"moments": state(*ops.moments(x, mask))}
    ring = (m.bank, m.bank_labels, m.sums, m.head, m.count)
    results["enqueue_"] = state(ops.enqueue_(*ring, first, labels, mask, m.scale, m.shift))
    kalman = (m.target_mean, m.target_std, m.variance, m.scale, m.shift)
    ops.track_(*kalman, x, mask, m.sums, m.count, 0.01, 1.0)
    results["track_"] = state()
    seen = {"count": m.count, "scale": m.scale, "shift": m.shift}
    loss = ops.memory_loss(z, labels, m.bank, m.bank_labels, Contrastive(), **seen)
    results["memory_loss"] = state(loss, *torch.autograd.grad(loss, z))
    ops.standardize_(m.bank, m.sums, m.scale, m.shift, m.count)
    results["standardize_"] = state()
    ops.transform_(m.bank, m.sums, m.scale, m.shift, m.count)
    results["transform_"] = state()
    return results


def check_training(device: str) -> None:
    """Trains a layer for three steps with `CrossBatchMemory`; loss, gradient and memory must be the reference's."""
    import torch

    import xbn_ext
    from xbn_ext.reference import Memory, step

    torch.manual_seed(0)
    network = torch.nn.Linear(9, 7).to(device)
    criterion = xbn_ext.CrossBatchMemory(xbn_ext.Contrastive(), embedding_size=7, memory_size=20).to(device)
    with torch.device(device):
        m = Memory.empty(20, 7, torch.float32)
    labels = torch.arange(8, device=device) % 3
    weights = list(network.parameters())
    for _ in range(3):
        embeddings = network(torch.randn(8, 9).to(device))
        loss, expected = criterion(embeddings, labels), step(m, embeddings, labels, criterion.loss)
        gradients = torch.autograd.grad(loss, weights, retain_graph=True)
        assert_close(
            f"training on {device}",
            [loss, *gradients, *criterion.buffers()],
            [expected, *torch.autograd.grad(expected, weights), *(getattr(m, n) for n, _ in criterion.named_buffers())],
        )
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.sub_(0.1 * gradient)


# --- Outside: what to check, and where --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wheel:
    """The wheel and what it says of itself."""

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
        question = (
            "import ensurepip, json, sys, sysconfig, venv;"
            "has_abi = sys.implementation.name == 'cpython' and not sysconfig.get_config_var('Py_GIL_DISABLED');"
            "print(json.dumps([sys.version_info[:3], has_abi]))"
        )
        answer = run([program, "-I", "-c", question], Unavailable)
        try:
            version, has_abi = json.loads(answer)
        except ValueError as error:
            raise Unavailable(f"{program} is not a Python") from error
        if not has_abi:
            raise Unavailable(f"{program} loads no library of the stable ABI: it is not CPython, or free-threaded")
        return cls(program, tuple(version))

    @property
    def name(self) -> str:
        """Its full version."""
        return ".".join(map(str, self.version))


def find_interpreters(oldest: tuple[int, int]) -> list[Interpreter]:
    """One interpreter per minor version from `oldest` on, in ascending order: on PATH, of pyenv, or this one."""
    minors = [f"python{oldest[0]}.{minor}" for minor in range(oldest[1], oldest[1] + 20)]
    programs = [path for path in map(shutil.which, minors) if path is not None]
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    programs += map(str, sorted(pyenv.glob("versions/*/bin/python")))
    found: dict[tuple[int, ...], Interpreter] = {}
    for program in [*programs, sys.executable]:
        try:
            interpreter = Interpreter.ask(program)
        except Unavailable:  # pyenv puts programs on PATH that run only where their version is chosen
            continue
        found.setdefault(interpreter.version[:2], interpreter)
    return [found[minor] for minor in sorted(found) if minor >= oldest]


@dataclass(frozen=True)
class Pair:
    """A Python, by its program, and a version of torch, or `NEWEST`."""

    program: str
    torch: str

    def __str__(self) -> str:
        return f"{self.program}, torch {self.torch}"

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return "torch" if self.torch == NEWEST else f"torch=={self.torch}"


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


class Environment:
    """A virtual environment in a folder."""

    def __init__(self, interpreter: Interpreter, folder: Path) -> None:
        """Makes it, or takes the one that is there.

        Raises:
            Unavailable: it cannot be made.
        """
        self.programs = folder / "bin"
        run([interpreter.program, "-m", "venv", folder], Unavailable)

    def install(self, *arguments: str | Path, otherwise: type[Exception] = Unavailable) -> None:
        """Runs `pip install`; nothing is compiled."""
        python = self.programs / "python"
        pip = ["-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
        run([python, *pip, *arguments], otherwise)

    def run(self, program: str, *arguments: str | Path) -> str:
        """Runs a program of this environment where no other is found, a compiler least of all; returns its output.

        Raises:
            Failed: with the end of what it printed.
        """
        return run([self.programs / program, *arguments], Failed, {**os.environ, "PATH": str(self.programs)})


def run(command: Sequence[str | Path], otherwise: type[Exception], environ: dict[str, str] | None = None) -> str:
    """Runs a command and returns what it printed on standard output.

    Raises:
        Exception: of the type `otherwise`, with the last lines printed, if it does not start or exits with an error.
    """
    try:
        done = subprocess.run(command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except OSError as error:
        raise otherwise(f"{command[0]}: {error.strerror}") from error
    if done.returncode != 0:
        last = (done.stdout + done.stderr).strip().splitlines()[-15:]
        raise otherwise("\n".join(last) or f"{command[0]} ended with status {done.returncode}")
    return done.stdout


@contextmanager
def working_folder(chosen: Path | None, keep: bool) -> Iterator[Path]:
    """The chosen folder, or a temporary one that is removed at the end unless it is to be kept."""
    folder = chosen or Path(tempfile.mkdtemp(prefix="wheel_check-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder.resolve()
    finally:
        if keep:
            print(f"environments kept in {folder}")
        elif chosen is None:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def environment(interpreter: Interpreter, folder: Path, keep: bool) -> Iterator[Environment]:
    """An environment that is removed at the end unless it is to be kept: one at a time is large enough."""
    try:
        yield Environment(interpreter, folder)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


# --- The checks and their report --------------------------------------------------------------------------------------

SECOND_PYTHON, CUDA_BUILD, CPU_BUILD, GPU = (
    "a second version of Python",
    "a CUDA build of torch",
    "a CPU build of torch",
    "a GPU",
)


@dataclass(frozen=True)
class Outcome:
    """A line of the report."""

    what: str
    detail: str
    result: str = "ok"
    """Or "FAILED", or "UNAVAILABLE"."""
    report: dict[str, str] | None = None
    """What `check_here` returned, if that is what ran."""


@dataclass(frozen=True)
class Settings:
    """What every check needs to know."""

    wheel: Wheel
    folder: Path
    keep: bool
    index: tuple[str, ...]
    """Options of pip: where torch comes from."""


def attempt(what: str, check: Callable[[], Outcome]) -> Outcome:
    """Runs a check, and prints what it is about and how it ended."""
    print(f"{what} ... ", end="", flush=True)
    try:
        outcome = check()
        print(f"{outcome.result}: {outcome.what}, {outcome.detail}", flush=True)
    except (Failed, Unavailable) as error:
        lines = str(error).splitlines()
        reason = next((line for line in reversed(lines) if re.match(r"\w+: ", line)), lines[-1])
        outcome = Outcome(what, reason, "FAILED" if isinstance(error, Failed) else "UNAVAILABLE")
        print(outcome.result, *lines, sep="\n    ", flush=True)
    return outcome


def check_pair(pair: Pair, settings: Settings) -> Outcome:
    """Installs torch and the wheel into an environment and runs `check_here` there.

    Raises:
        Unavailable: there is no such Python, or pip finds no such torch for it.
        Failed: the wheel cannot be installed, or does not hold what it claims.
    """
    interpreter = Interpreter.ask(pair.program)
    folder = settings.folder / f"python-{interpreter.name}-torch-{pair.torch}"
    with environment(interpreter, folder, settings.keep) as there:
        there.install("--upgrade", *settings.index, pair.requirement, *settings.wheel.requirements)
        there.install("--no-deps", "--force-reinstall", settings.wheel.path, otherwise=Failed)
        report = json.loads(there.run("python", "-I", Path(__file__).resolve(), HERE).splitlines()[-1])
    what = f"Python {report['python']}, torch {report['torch']}"
    cuda = f"CUDA {report['cuda']}, kernels {report['kernels']}" if report["cuda"] else "no CUDA in this torch"
    return Outcome(what, cuda, report=report)


def check_abi(settings: Settings) -> Outcome:
    """Runs abi3audit in an environment of its own: does the library keep to the stable ABI of the oldest Python?

    Raises:
        Unavailable: abi3audit cannot be installed.
        Failed: it found something, or no library that claims this ABI.
    """
    with environment(Interpreter.ask(sys.executable), settings.folder / "abi3audit", settings.keep) as there:
        there.install("abi3audit")
        report = json.loads(there.run("abi3audit", "--strict", "--report", settings.wheel.path))
    oldest = ".".join(map(str, settings.wheel.oldest_python))
    libraries = [library for wheel in report["specs"].values() for library in wheel["wheel"]]
    if not libraries or any(library["result"]["baseline"] != oldest for library in libraries):
        raise Failed(f"expected libraries for the stable ABI of Python {oldest}, got {libraries}")
    return Outcome("abi3audit --strict", f"only the stable ABI of Python {oldest}")


def parts_not_covered(outcomes: Sequence[Outcome]) -> list[str]:
    """The parts of the claim that no environment has shown to hold."""
    reports = [outcome.report for outcome in outcomes if outcome.report is not None]
    shown = {
        SECOND_PYTHON: len({report["python"].rpartition(".")[0] for report in reports}) > 1,
        CUDA_BUILD: any(report["cuda"] for report in reports),
        CPU_BUILD: any(not report["cuda"] for report in reports),
        GPU: any(report["kernels"].startswith("ran") for report in reports),
    }
    return [part for part, is_shown in shown.items() if not is_shown]


def print_table(outcomes: Sequence[Outcome], wheel: Wheel) -> None:
    """Prints the outcomes, one a line, in columns."""
    widths = [max(len(text) for text in column) for column in zip(*((o.what, o.result) for o in outcomes), strict=True)]
    print(f"\n{wheel.path.name}")
    for outcome in outcomes:
        print(f"  {outcome.what:{widths[0]}}  {outcome.result:{widths[1]}}  {outcome.detail}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Imports and runs one wheel under several versions of Python and torch, and audits its ABI.",
        epilog="The first --python is paired with the first --torch, the second with the second, and so on; "
        "the last of the shorter list goes with all that remain of the other.",
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument(
        "--python", action="append", default=[], metavar="PATH", help="a Python (the oldest and the newest found)"
    )
    parser.add_argument(
        "--torch", action="append", default=[], metavar="VERSION", help=f"of torch (the oldest supported, and {NEWEST})"
    )
    parser.add_argument("--index-url", metavar="URL", help="the package index from which pip takes torch")
    parser.add_argument("--folder", type=Path, help="where the environments are made (a temporary folder)")
    parser.add_argument("--keep", action="store_true", help="keep them, so that the next run in the folder is quick")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs everything that the command line asks for and returns the exit status."""
    args = parse(argv)
    try:
        wheel = Wheel.read(args.wheel)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    index = ("--index-url", args.index_url) if args.index_url else ()
    with working_folder(args.folder, args.keep) as folder:
        settings = Settings(wheel, folder, args.keep, index)
        pairs = choose_pairs(args.python, args.torch, wheel)
        outcomes = [attempt(str(pair), partial(check_pair, pair, settings)) for pair in pairs]
        outcomes.append(attempt("abi3audit", partial(check_abi, settings)))

    missing = parts_not_covered(outcomes)
    wanted = {SECOND_PYTHON} if not args.python else set()
    wanted |= {CUDA_BUILD} if not args.torch else set()
    outcomes += [
        Outcome(part, "no environment above has shown it", "UNAVAILABLE") for part in missing if part in wanted
    ]
    print_table(outcomes, wheel)
    if missing:
        print(f"not covered by this run: {', '.join(missing)}")
    return 0 if all(outcome.result == "ok" for outcome in outcomes) else 1


if __name__ == "__main__":
    if sys.argv[1:] == [HERE]:
        print(json.dumps(check_here()))
    else:
        sys.exit(main())
