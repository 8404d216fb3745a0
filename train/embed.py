"""``python -m train embed RUN FOLDER``: embeddings of all pictures in a folder, by the network of a run."""

from __future__ import annotations

import argparse
import io
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import checkpoint, terminal
from .config import ConfigError, folder_path
from .data import DataError, folder, images
from .trained import Trained


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    terminal.prepare()
    parser = argparse.ArgumentParser(
        prog="python -m train embed",
        description="Embed all pictures in a folder: OUT.npy has embeddings of unit length, and OUT.json their files.",
    )
    parser.add_argument("run", type=folder_path, help="the --out of a run")
    parser.add_argument(
        "folder",
        type=folder_path,
        help="pictures, also in folders below it; hidden ones and links to folders do not count",
    )
    parser.add_argument("--out", type=_name, default=Path("embeddings"), help="where to (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where the network computes (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare pictures (default: %(default)s)")
    given = parser.parse_args(arguments)
    try:
        count, size = embed(given.run, given.folder, given.out, given.device, given.workers)
    except (ConfigError, DataError) as error:
        print(f"{parser.prog}: error: {str(error).removeprefix('--data: ')}", file=sys.stderr)
        return 2
    terminal.say(f"{count:,} pictures, {size} numbers each: {given.out}.npy, {given.out}.json")
    return 0


def embed(run: Path, pictures: Path, out: Path, device: str = "cpu", workers: int = 0) -> tuple[int, int]:
    """Write ``out``.npy, float32 [N, D], and ``out``.json with the N paths below ``pictures``; returns N and D.

    Raises:
        ConfigError: there is no such run or device, or too many workers; or it cannot be written.
        DataError: there are no pictures, or some cannot be read.
    """
    trained = Trained(run)
    replace(trained.settings, workers=workers)  # raises if there may not be so many
    _require(device)
    files = folder.pictures(pictures)
    images.check_all(files)
    embeddings = trained.embed(images.Files(files), device, workers)
    array, names = (out.with_name(out.name + suffix) for suffix in (".npy", ".json"))
    paths = [file.relative_to(pictures).as_posix() for file in files]
    about = {"run": str(run), "step": trained.step, "folder": str(pictures), "paths": paths}

    def write(path: Path) -> None:  # neither of the two without the other, if there is no room
        checkpoint.write_json(path, about)
        checkpoint.write_whole(array, lambda path: _save(path, embeddings))

    checkpoint.write_whole(names, write)
    return len(embeddings), embeddings.shape[1]


def _name(text: str) -> Path:
    """What the files are called but for their suffixes."""
    path = folder_path(text)
    if path.name in ("", ".."):
        raise argparse.ArgumentTypeError(f"{text} is no name of a file")
    return path


def _require(device: str) -> None:
    """Raise ConfigError if nothing can be computed there."""
    try:
        if torch.empty(0, device=torch.device(device)).is_meta:
            raise RuntimeError("holds no values")
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        raise ConfigError(f"--device {device}: {checkpoint.why(error)}") from error


def _save(path: Path, embeddings: Tensor) -> None:
    content = io.BytesIO()  # of a file, numpy does not notice that it is full
    np.save(content, embeddings.numpy())
    path.write_bytes(content.getbuffer())
