"""``embed RUN FOLDER``: embeddings of all pictures in a folder, by the network of a run."""

from __future__ import annotations

import argparse
import io
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import checkpoint, outputs, terminal
from .about import file_path, folder_path
from .config import ConfigError
from .data import DataError, folder, images
from .kinds import Kinds
from .program import called
from .trained import Trained, add_weights_of

ABOUT: Kinds = {"run": str, "step": int, "network": str, "folder": str, "paths": list, "bytes": list}
OWN: Kinds = {"run": str, "paths": list}
"""Of every version."""
AGAIN = "write them with the command embed"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    terminal.prepare()
    parser = argparse.ArgumentParser(
        prog=called("embed"),
        description="Embed all pictures in a folder: OUT.npy has embeddings of unit length, and OUT.json their files.",
    )
    add_arguments(parser)
    parser.add_argument("--out", type=file_path, default=Path("embeddings"), help="where to (default: %(default)s)")
    given = parser.parse_args(arguments)
    try:
        count, size = embed(given.run, given.folder, given.out, given.device, given.workers, given.weights_of)
    except (ConfigError, DataError) as error:
        return terminal.refuse("embed", error)
    terminal.say(f"{count:,} pictures, {size} numbers each: {given.out}.npy, {given.out}.json")
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command needs that embeds a folder."""
    parser.add_argument("run", metavar="RUN", type=folder_path, help="the --out of a run")
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        type=folder_path,
        help="pictures, also in folders below it; hidden ones and links to folders do not count",
    )
    add_weights_of(parser)
    parser.add_argument("--device", default="cpu", help="where the network computes (default: %(default)s)")
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that prepare pictures (default: one for each core that the network does not use, up to 8; 0 "
        "for fewer than 1000 pictures)",
    )


class Embeddings(NamedTuple):
    """Pictures and what a network makes of them."""

    files: list[Path]
    """N, in the order of their names."""
    rows: Tensor
    """Of unit length, float32 [N, D]."""


def embed(
    run: Path, pictures: Path, out: Path, device: str = "cpu", workers: int | None = None, weights_of: str | None = None
) -> tuple[int, int]:
    """Write ``out``.npy, float32 [N, D], and ``out``.json with the N paths below ``pictures``; returns N and D.

    Raises:
        ConfigError: there is no such run, or it cannot be written; or it would replace what is not of this command.
        DataError: there are no pictures, or some cannot be read.
    """
    array, names = _places(out)
    outputs.require_own(out, (array, names), names, OWN, "embed")
    trained = Trained(run, weights_of)
    files = folder.pictures(pictures)
    about = {
        "run": str(run.resolve()),
        "step": trained.step,
        "network": trained.digest(),
        "folder": str(pictures.resolve()),
        **_listing(files, pictures),
    }
    rows = of_pictures(trained, files, device, workers)

    checkpoint.write_together(
        {names: lambda path: path.write_text(checkpoint.json_text(about)), array: lambda path: _save(path, rows)}
    )
    return len(rows), rows.shape[1]


def of_pictures(trained: Trained, files: list[Path], device: str = "cpu", workers: int | None = None) -> Tensor:
    """Their embeddings of unit length, float32 [N, D]; raises DataError if some cannot be read, before it begins."""
    images.check_all(files)
    return trained.embed(images.Files(files), device, workers)


def read(name: Path, trained: Trained, run: Path, pictures: Path) -> Embeddings:
    """What ``embed`` has written as ``name``.npy and ``name``.json.

    Args:
        name: its ``out``.
        trained: the network that they have to be of.
        run: where it is, for messages.
        pictures: the folder that they have to be of.

    Raises:
        ConfigError: they cannot be read, or are of another network or folder, or of pictures that have changed since.
        DataError: there are no pictures.
    """
    array, names = _places(name)
    about = checkpoint.read_json(names, ABOUT, AGAIN, "--embeddings", name)
    if about["network"] != trained.digest():
        wanted, found = f"{run.resolve()} at step {trained.step}", f"{about['run']} at step {about['step']}"
        other = f"of {found}, not of {wanted}" if found != wanted else f"of {found}, which has been trained again since"
        raise ConfigError(f"--embeddings {name}: they are {other}; {AGAIN}")
    if about["folder"] != str(pictures.resolve()):
        raise ConfigError(f"--embeddings {name}: they are of {about['folder']}, not of {pictures.resolve()}; {AGAIN}")
    files = folder.pictures(pictures)
    there = _listing(files, pictures)
    if any(about[part] != there[part] for part in there):
        before, after = ({*zip(map(str, i["paths"]), map(str, i["bytes"]), strict=False)} for i in (about, there))
        changed = images.few(sorted({path for path, _ in before ^ after}))
        raise ConfigError(f"--embeddings {name}: {pictures} has changed since, in {changed}; {AGAIN}")
    with checkpoint.reading(array, AGAIN, "--embeddings", name):
        rows = np.load(array, allow_pickle=False)
        if rows.dtype != np.float32 or rows.shape != (len(files), trained.settings.embedding_dim):
            raise ValueError(f"an array of {rows.dtype} {list(rows.shape)} for {len(files)} pictures")
        if not np.isfinite(rows).all():
            raise ValueError("not all of its numbers are finite")
    return Embeddings(files, torch.from_numpy(rows))


def _places(out: Path) -> tuple[Path, Path]:
    return out.with_name(out.name + ".npy"), out.with_name(out.name + ".json")


def _listing(files: list[Path], pictures: Path) -> dict[str, list[str] | list[int]]:
    """Paths below the folder, and sizes: what tells pictures from others."""
    paths = [file.relative_to(pictures).as_posix() for file in files]
    return {"paths": paths, "bytes": [os.stat(file).st_size if os.path.exists(file) else 0 for file in files]}


def _save(path: Path, embeddings: Tensor) -> None:
    content = io.BytesIO()  # of a file, numpy does not notice that it is full
    np.save(content, embeddings.numpy())
    path.write_bytes(content.getbuffer())
