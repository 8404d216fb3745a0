"""The files in the folder of a run: their names, and how they are read and written."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from . import terminal
from .config import Config, ConfigError
from .data.fingerprint import Fingerprint, differences
from .data.folder import EVENTS as EVENTS
from .kinds import NUMBER, Each, Kinds, require
from .losses import PARAMETERS

METRICS, CHECKPOINT, BEST, SETTINGS, LOG = "metrics.json", "checkpoint.pt", "best.pt", "config.yaml", "log.csv"
CURVES, NEIGHBOURS, REPORT = "curves.png", "neighbours.png", "report.html"
EXPORTED = ("network.pt2", "network.safetensors", "network.json")
"""A program, weights, and what they take and give."""

FINGERPRINT: Kinds = dict.fromkeys(("summary", "class names", "labels", "image names", "images"), str)
STATE: Kinds = {
    "config": dict, "step": int, "seconds": NUMBER, "recent_losses": list, "before": dict,
    "history": dict.fromkeys(("loss", "evaluation", "drift", "memory"), list),
    **dict.fromkeys(("model", "criterion", "optimizer", "scaler"), dict),
    "drift": {"probes": Each({"step": int} | dict.fromkeys(("slots", "images", "stored"), torch.Tensor))},
}  # fmt: skip
WEIGHTS: Kinds = {name: STATE[name] for name in ("config", "step", "model")}
"""Of BEST: a part of STATE."""
KEPT: Kinds = {"step": (int, type(None)), "model": dict}
"""Of the best weights in a checkpoint: None before there are scores."""
AVERAGE: Kinds = {"model": dict, "updates": int}
START: Kinds = {"note": str, "frozen_bn": bool, "frozen": list}
OVERWRITE = "--overwrite starts from the beginning"


def begun(folder: Path) -> bool:
    """Whether there is a run to be continued."""
    return os.path.exists(folder / CHECKPOINT)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint: the old one stays whole until the new one is.

    Raises:
        ConfigError: it cannot be written.
    """

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # an error of such a file says why; torch's own writer does not
            torch.save(state, file)

    write_whole(path, write, path.with_name(f".{path.name}.tmp"))  # one name: what a killed run leaves is large


def load(path: Path, otherwise: str = OVERWRITE, argument: str = "--out", kinds: Kinds = STATE) -> dict[str, Any]:
    """Read a checkpoint, or of ``kinds`` WEIGHTS, on the CPU; raises ConfigError as ``reading`` does."""
    with reading(path, otherwise, argument):
        _require_file(path)
        with zipfile.ZipFile(path) as stored:  # torch.load does not look at checksums
            damaged = stored.testzip()
        if damaged is not None:
            raise ValueError(f"damaged: the checksum of {damaged} is wrong")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        # Not in all checkpoints:
        later = {
            "data": FINGERPRINT, "start": START, "average": AVERAGE, "best": KEPT, "identity": str, "bad_steps": int
        }  # fmt: skip
        require(state, {**kinds, **{name: its for name, its in later.items() if name in state}})
        step, steps = state["step"], state["config"].get("steps")
        if isinstance(step, bool) or not isinstance(steps, int) or not 0 <= step <= steps:
            raise ValueError(f"step {step} of {steps}")
        return state


def read_metrics(folder: Path, otherwise: str = OVERWRITE, argument: str = "--out") -> dict[str, Any]:
    """The metrics of a finished run; raises ConfigError as ``reading`` does."""
    return read_json(folder / METRICS, {"config": dict}, otherwise, argument)


def write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """Written last: its presence says that the run is finished."""
    write_json(folder / METRICS, metrics)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    text = json_text(content)
    write_whole(path, lambda temporary: temporary.write_text(text))


def json_text(content: dict[str, Any]) -> str:
    """As a file has it."""
    return json.dumps(content, indent=1) + "\n"


def write_whole(path: Path, write: Callable[[Path], object], temporary: Path | None = None) -> None:
    """Write under another name, then rename; whatever fails, ``path`` stays as it was and nothing partial is left.

    Raises:
        ConfigError: it cannot be written.
    """
    write_together({path: write}, {} if temporary is None else {path: temporary})


def write_together(
    files: Mapping[Path, Callable[[Path], object]], temporary: Mapping[Path, Path] | None = None
) -> None:
    """The same of several: none is renamed before all are written. A process that is killed in between leaves the old
    ones, or the first alone.

    Raises:
        ConfigError: one cannot be written.
    """
    # Several processes may write one file, and a name may be as long as the system takes.
    named = {path: path.with_name(f".{path.name[:32]}-{os.getpid()}-{n}.tmp") for n, path in enumerate(files)}
    named |= temporary or {}
    _, *others = files
    try:
        for path, write in files.items():
            with writing(path):
                write(named[path])
        for path in others:
            with writing(path):
                path.unlink(missing_ok=True)
        for path in files:
            with writing(path):
                os.replace(named[path], path)
    finally:
        for path in named.values():
            with suppress(OSError):  # why it could not be written is what is said
                path.unlink()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """While open, what ``path`` is written in.

    Raises:
        ConfigError: the system did not let it be written; names ``path`` and says why.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        chain: list[BaseException] = [error]
        while chain[-1].__context__:  # torch.save raises an error of its own while it handles the system's
            chain.append(chain[-1].__context__)
        reason = next((each for each in chain if isinstance(each, OSError)), None)
        if reason is None:
            raise
        raise ConfigError(
            f"writing {path} failed ({reason.strerror or reason}): make sure that there is room and that it may be "
            "written, or choose another --out"
        ) from error


def read_json(
    path: Path, kinds: Kinds, otherwise: str = OVERWRITE, argument: str = "--out", given: Path | None = None
) -> dict[str, Any]:
    """The content of a file, in which there must be entries of these kinds; raises ConfigError as ``reading`` does."""
    with reading(path, otherwise, argument, given):
        _require_file(path)
        content: dict[str, Any] = json.loads(path.read_text())
        require(content, kinds)
        return content


@contextmanager
def reading(
    path: Path, otherwise: str = OVERWRITE, argument: str = "--out", given: Path | None = None
) -> Iterator[None]:
    """While open, a file that a run has left is read, and what it holds is taken over.

    Raises:
        ConfigError: that failed, in whatever way; names ``argument`` with what was ``given``, None: the folder of
            ``path``; and ``path``; and ``otherwise`` says what to do.
    """
    try:
        yield
    except Exception as error:
        raise ConfigError(
            f"{argument} {given or path.parent}: cannot read {path.name} ({why(error)}); {otherwise}"
        ) from error


def why(error: Exception) -> str:
    """What went wrong when a file was read, in one sentence: torch goes on with advice to its own callers."""
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    first = " ".join(lines[: 2 if lines[0].endswith(":") else 1]).split(". ")[0]
    if isinstance(error, KeyError):
        return f"there is no {first} in it"
    return error.strerror or first if isinstance(error, OSError) else first


def _require_file(path: Path) -> None:
    """Raise ValueError for a pipe, which would be waited for."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("not a file")


def require_same(
    config: Config, place: Path, stored: dict[str, Any], what: str, otherwise: str = "--overwrite it"
) -> None:
    """Raise ConfigError if a run at ``place`` has other settings than ``config``; ``otherwise`` says what to do."""
    settings, stored = config.settings(), _complete(stored)
    different = [
        f"--{name.replace('_', '-')} {stored.get(name)} there, {settings.get(name)} now"
        for name in sorted(settings.keys() | stored.keys())
        if settings.get(name) != stored.get(name)
    ]
    if different:
        raise ConfigError(
            f"--out {place} holds {what} with other settings ({'; '.join(different)}): "
            f"choose another --out, or {otherwise}"
        )


def _complete(stored: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run; those that an earlier version did not have are such that they change nothing."""
    defaults = {name: value for name, value in Config().settings().items() if name not in PARAMETERS}
    return defaults | {"center_gradient": False} | stored


def require_same_data(
    spec: str,
    place: Path,
    stored: Fingerprint | None,
    now: Fingerprint,
    what: str,
    otherwise: str = "--overwrite it",
) -> None:
    """Raise ConfigError if the data of ``--data spec`` have changed since a run at ``place`` was begun.

    Labels are positions among the classes, batches positions among the images: on other data a run that goes on would
    take one class for another, and test on classes it was trained on. Where nothing is stored, as by earlier versions,
    only a note says so.

    Args:
        spec: as on the command line.
        place: a folder or file, for messages.
        stored: of the data that the run was begun on; None if it is not known.
        now: of the data that there are.
        what: there is at ``place``.
        otherwise: what to do except for restoring the data, or going elsewhere.
    """
    if stored is None:
        terminal.note(
            f"{place} holds {what} of an earlier version, which did not store what data it had: "
            f"make sure that --data {spec} has not changed since"
        )
        return
    different = differences(stored, now)
    if different:
        raise ConfigError(
            f"--out {place} holds {what} on other data: --data {spec} has changed since in its "
            f"{', '.join(different)} ({stored['summary']} there; {now['summary']} now): "
            f"restore the data, choose another --out, or {otherwise}"
        )
