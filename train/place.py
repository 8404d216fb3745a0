"""The folder of a run: whether a new run may use it, and what that replaces in it."""

from __future__ import annotations

import os
import shlex
from contextlib import suppress
from enum import Enum
from pathlib import Path

from . import checkpoint, data, lock, settings_file
from .checkpoint import BEST, CHECKPOINT, CURVES, EVENTS, EXPORTED, LOG, METRICS, NEIGHBOURS, REPORT, SETTINGS
from .config import Config, ConfigError
from .data import tree

REPLACED = (METRICS, BEST, SETTINGS, LOG, CURVES, NEIGHBOURS, REPORT, *EXPORTED, CHECKPOINT)
"""Files that a run removes before it begins. The checkpoint is the last: until then the folder is known to be a run's,
also if that is killed on the way."""
OF_EVENTS = tuple(f"{place}/events.out.tfevents.*" for place in (EVENTS, f"{EVENTS}/drift_*"))
"""Each curve of a chart of several has a folder."""
OF_FILES = 512
"""Bytes that the path of a file in the folder is longer than the folder's, at most."""
OF_LOG = "step,seconds,train/loss,"
"""How a run's log begins."""


class Found(Enum):
    """What a run finds in its folder."""

    NOTHING = "nothing"
    CHECKPOINT = "a run with these settings, to be continued"
    FINISHED = "a finished run with these settings"


def look(config: Config) -> Found:
    """What there is in ``config.folder``; raises ConfigError if it must not be touched. Writes nothing."""
    folder = config.folder  # asked through os.path: Path.exists raises where a folder may not be entered
    check_place(config, folder)
    for name in (*REPLACED, EVENTS):
        is_file, is_folder = os.path.isfile(folder / name), os.path.isdir(folder / name)
        if os.path.exists(folder / name) and not (is_folder if name == EVENTS else is_file):
            kind = "a file" if is_file else "a folder" if is_folder else "a pipe or a device"
            raise ConfigError(f"--out {folder}: {name} in it is {kind}, which no run makes: move it, or choose another")
    finished, started = folder / METRICS, folder / CHECKPOINT
    if os.path.exists(finished) and not config.overwrite:
        stored = checkpoint.read_metrics(folder)["config"]
        checkpoint.require_same(config, folder, stored, "a finished run", _otherwise(folder, "show it"))
        return Found.FINISHED
    for written in (folder, folder / EVENTS):  # else the first may be empty when the second cannot be written
        if written == folder or os.path.isdir(written):
            require_writable(written)
    if config.overwrite:
        require_data_kept(config)
        return Found.NOTHING
    if not os.path.exists(started):
        require_free(config)
        return Found.NOTHING
    stored = checkpoint.load(started)["config"]
    checkpoint.require_same(config, folder, stored, "an unfinished run", _otherwise(folder, "continue it", "--resume"))
    if not config.resume:
        raise ConfigError(f"--out {folder} holds an unfinished run: continue it with --resume, or --overwrite it")
    return Found.CHECKPOINT


def require_free(config: Config) -> None:
    """Raise ConfigError if ``config.folder``, where there is no run, has files that a run would replace.

    A run with the same settings that was killed before its first checkpoint has left some, which may go.
    """
    folder = config.folder
    there = [name for name in REPLACED if os.path.lexists(folder / name)]
    there += [EVENTS] * bool(_events(folder))
    if settings_file.is_of(_read(folder / SETTINGS), config.settings()):
        may_go = {SETTINGS, EVENTS, *([LOG] if _read(folder / LOG).startswith(OF_LOG) else [])}
        there = [name for name in there if name not in may_go]
    if there:
        with lock.alone(folder):  # else it is a run's that has just begun
            raise ConfigError(
                f"--out {folder}: there is no run in it, and a new one would replace {', '.join(there)}: choose "
                "another, move what you need, or replace it with --overwrite"
            )


def require_kept(config: Config, file: Path) -> None:
    """Raise ConfigError if --overwrite would remove ``file``, the one of --config, and with it what no run has written.

    The settings of the run that is there may go, and what the new run writes again.
    """
    folder, names = config.folder, [path.name for path in _replaced(config.folder, file)] if config.overwrite else []
    if not names:
        return
    written = [config.settings()]
    for name, read in ((METRICS, checkpoint.read_json), (CHECKPOINT, checkpoint.load)):
        with suppress(ConfigError):
            written.append(read(folder / name, kinds={"config": dict})["config"])
    if names != [SETTINGS] or not any(settings_file.is_of(_read(file), settings) for settings in written):
        raise ConfigError(
            f"--config {file}: --overwrite would replace it, and it is not as a run has written it: move it out of "
            f"--out {folder}, or give it another name"
        )


def require_data_kept(config: Config) -> None:
    """Raise ConfigError if a run would replace the table that it is to be trained on."""
    if config.data.startswith("csv:") and _replaced(config.folder, data.place(config.data)):
        raise ConfigError(
            f"--data {config.data}: --overwrite would replace it: move it out of --out {config.folder}, or give it "
            "another name"
        )


def require_pictures_kept(config: Config, dataset: data.Dataset) -> None:
    """Raise ConfigError if a run that overwrites another would remove a picture of its own data."""
    replaced = {_real(path, {}) for path in _in_the_way(config.folder)} if config.overwrite else set()
    if not replaced:
        return
    folders: dict[str, str] = {}
    for part in (dataset.train, dataset.test, dataset.validation):
        for path in getattr(part.images, "paths", ()) if part is not None else ():
            if replaced & {_real(path, folders), os.path.realpath(path) if os.path.islink(path) else ""}:
                raise ConfigError(
                    f"--data {config.data}: --overwrite would replace {path}, a picture of it: move it out of --out "
                    f"{config.folder}, or give it another name"
                )


def _replaced(folder: Path, file: Path) -> list[Path]:
    """What a run in ``folder`` would replace that is ``file``."""
    there = filter(os.path.exists, _in_the_way(folder)) if os.path.exists(file) else ()
    return [path for path in there if os.path.samefile(path, file)]


def _real(path: Path, folders: dict[str, str]) -> str:
    """A file by the real place of its folder; ``folders`` has what is known of these."""
    folder, name = os.path.split(path)
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    return os.path.join(folders[folder], name)


def _in_the_way(folder: Path) -> list[Path]:
    """All that there is and a run replaces, in the order in which it goes."""
    there = [folder / name for name in REPLACED if os.path.lexists(folder / name)]
    return [*_events(folder), *there]


def _events(folder: Path) -> list[Path]:
    """TensorBoard's files; none where the folder may not be looked into, which `require_writable` says."""
    with suppress(PermissionError):
        return [events for files in OF_EVENTS for events in folder.glob(files)]
    return []


def _read(path: Path) -> str:
    """The text of a file; none of what is no file of text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _otherwise(folder: Path, what: str, *words: str) -> str:
    """What to do with a run of other settings, except for going elsewhere."""
    own = shlex.join(["--config", str(folder / SETTINGS), *words])
    return f"{what} with {own}, or --overwrite it" if os.path.exists(folder / SETTINGS) else "--overwrite it"


def check_place(config: Config, folder: Path) -> None:
    """Raise ConfigError if ``folder`` cannot be a folder, or if pictures in it would be images of the data.

    Writes nothing.
    """
    there, missing = _nearest(folder)
    if not os.path.isdir(there):
        kind = "is a link that leads to nothing" if not os.path.exists(there) else "exists and is not a folder"
        raise ConfigError(f"--out {folder}: {there} {kind}; choose another")
    longest = os.pathconf(there, "PC_NAME_MAX")
    if any(len(os.fsencode(name)) > longest for name in missing):
        raise ConfigError(f"--out {folder}: a name has at most {longest} bytes here; choose a shorter one")
    most = os.pathconf(there, "PC_PATH_MAX") - OF_FILES
    if len(os.fsencode(folder.absolute())) > most:
        raise ConfigError(f"--out {folder}: its path may have {most:,} bytes here; choose a shorter one")
    try:
        str(folder).encode()
    except UnicodeEncodeError:  # TensorBoard could not write there
        raise ConfigError(f"--out {str(folder)!r}: is not UTF-8; choose another") from None
    if config.data.startswith("folder:") and tree.would_read(data.place(config.data), folder):
        raise ConfigError(
            f"--out {folder} lies in --data {config.data}: its pictures would be images of a class; choose another"
        )


def require_writable(folder: Path) -> None:
    """Raise ConfigError if ``folder`` is known not to be readable, or it, or where it is to be made, to be read-only;
    writes nothing."""
    there, missing = _nearest(folder)
    written = os.access(there, os.W_OK | os.X_OK)
    if not written or not (missing or os.access(there, os.R_OK)):
        what = "read" if written else "written to"
        raise ConfigError(f"--out {folder}: {there} may not be {what}; choose another, or change its permissions")


def _nearest(folder: Path) -> tuple[Path, list[str]]:
    """What exists of ``folder`` and the folders that it is in, and the names of those that are to be made."""
    there, missing = folder.absolute(), []
    while not os.path.lexists(there):
        missing.append(there.name)
        there = there.parent
    return there, missing


def prepare(folder: Path) -> None:
    """Make the folder and remove what an earlier run left in it, and nothing else.

    Raises:
        ConfigError: the system does not allow it.
    """
    with checkpoint.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path in _in_the_way(folder):
            path.unlink(missing_ok=True)
