"""What a run has trained: the commands embed, search and export make use of it."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import augment, checkpoint, evaluate, loading, model
from .config import Config, ConfigError
from .data import Part, Pixels

NO_RUN = "RUN must be the --out of a run"
BEST, LAST = "best", "last"
"""Weights of a run."""


def add_weights_of(parser: argparse.ArgumentParser) -> None:
    """The argument of every command that takes the network of a run."""
    parser.add_argument(
        "--weights-of",
        choices=(BEST, LAST),
        help="best: those that scored best on held-out training classes, of a run with --validation-share; last: those "
        "of the last checkpoint, with --ema their average (default: best where there are some)",
    )


def _stored(run: Path, weights_of: str | None) -> tuple[Path, dict[str, Any]]:
    """The file with the weights, and what is in it: the weights as ``model``.

    The checkpoint has the best weights, too, and is written first: they are taken from it where the file of the best is
    missing or of an earlier step.
    """
    best, last = run / checkpoint.BEST, run / checkpoint.CHECKPOINT
    found = None
    if weights_of != LAST and os.path.exists(best):
        found = checkpoint.load(best, NO_RUN, "RUN", checkpoint.WEIGHTS)
    try:
        state = checkpoint.load(last, NO_RUN, "RUN")
    except ConfigError:
        if found is None:
            raise
        return best, found
    kept = state.get("best", {})
    if found is not None and not (kept.get("step") or 0) > found["step"]:
        return best, found
    if weights_of != LAST and kept.get("step") is not None:
        return last, {"config": state["config"], "step": kept["step"], "model": kept["model"]}
    if weights_of == BEST:
        raise ConfigError(
            f"--weights-of best: RUN {run} has no best weights: it has no --validation-share, or no scores yet"
        )
    return last, state | {"model": state.get("average", state)["model"]}


class Trained(nn.Module):
    """The network of a run, uint8 images [B, 3, S, S] to embeddings of unit length, float32 [B, D]."""

    def __init__(self, run: Path, weights_of: str | None = None) -> None:
        """Read the weights.

        Args:
            run: the folder of a run, be it finished or not.
            weights_of: BEST, those that score best on held-out training classes, or LAST; None: BEST where there are
                some.

        Raises:
            ConfigError: the weights are missing or cannot be read, or their backbone is not installed here.
        """
        super().__init__()
        stored, state = _stored(run, weights_of)
        with checkpoint.reading(stored, NO_RUN, "RUN"):
            self.stored = state["config"] | {"weights": "none"}  # those come from the checkpoint
            """The settings, as the version that wrote them has them."""
            self.settings = Config(**self.stored)
        self.step: int = state["step"]
        self.network, _ = model.build(self.settings)
        with checkpoint.reading(stored, NO_RUN, "RUN"):
            self.network.load_state_dict(state["model"])
        size, kind, interpolation = (getattr(self.settings, n) for n in ("image_size", "augment", "interpolation"))
        self.view = augment.evaluation_view(size, kind, interpolation)
        """What a test sees of an image."""
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = nn.functional.normalize(self.network(images), dim=1)
        return embeddings

    def digest(self) -> str:
        """SHA-256 of settings and weights: what tells it from the network of another run, or of another step."""
        sha = hashlib.sha256(json.dumps(self.stored, sort_keys=True).encode())
        for name, tensor in sorted(self.network.state_dict().items()):
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            sha.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return sha.hexdigest()

    def embed(self, images: Sequence[Pixels], device: str | torch.device = "cpu", workers: int | None = None) -> Tensor:
        """Embeddings of unit length of images of any size, float32 [N, D] on the CPU.

        Args:
            images: N, uint8 [height, width, 3].
            device: where the network computes; it is left there.
            workers: processes that prepare images; None: one for each core that the network does not use.

        Raises:
            ConfigError: there is no such device, or too many workers; or embeddings are not finite.
            DataError: an image cannot be read.
        """
        labels = np.zeros(len(images), np.int64)
        part = Part(images, labels, ("",), ("",) * len(images))
        replace(self.settings, workers=workers)  # raises if there may not be so many
        try:
            place = torch.device(device)
            if torch.empty(0, device=place).is_meta:
                raise RuntimeError("holds no values")
            network: Any = self.to(device)
        except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
            raise ConfigError(f"--device {device}: {checkpoint.why(error)}") from error
        [embeddings] = evaluate.embed(
            lambda chunk: [network(chunk)],
            augment.EvaluationBatches(part, self.view),
            place,
            loading.workers(workers, images, place),
        )
        if not embeddings.isfinite().all():
            raise ConfigError("RUN: its network gives embeddings that are not finite")
        return embeddings
