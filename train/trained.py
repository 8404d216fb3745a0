"""What a run has trained: the commands embed, search and export make use of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import augment, checkpoint, evaluate, model
from .config import Config, ConfigError
from .data import Part, Pixels

NO_RUN = "RUN must be the --out of a run"


class Trained(nn.Module):
    """The network of a run, uint8 images [B, 3, S, S] to embeddings of unit length, float32 [B, D]."""

    def __init__(self, run: Path) -> None:
        """Raises ConfigError if ``run`` has no checkpoint, one that cannot be read, or a network that is not here."""
        super().__init__()
        stored = run / checkpoint.CHECKPOINT
        state = checkpoint.load(stored, NO_RUN, "RUN")
        with checkpoint.reading(stored, NO_RUN, "RUN"):
            self.settings = Config(**state["config"] | {"weights": "none"})  # these come from the checkpoint
        self.step: int = state["step"]
        self.network, _ = model.build(self.settings)
        with checkpoint.reading(stored, NO_RUN, "RUN"):
            self.network.load_state_dict(state["model"])
        self.view = augment.evaluation_view(self.settings.image_size, self.settings.augment)
        """What a test sees of an image."""
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = nn.functional.normalize(self.network(images), dim=1)
        return embeddings

    def digest(self) -> str:
        """SHA-256 of settings and weights: what tells it from the network of another run, or of another step."""
        sha = hashlib.sha256(json.dumps(self.settings.settings(), sort_keys=True).encode())
        for name, tensor in sorted(self.network.state_dict().items()):
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            sha.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return sha.hexdigest()

    def embed(self, images: Sequence[Pixels], device: str | torch.device = "cpu", workers: int = 0) -> Tensor:
        """Embeddings of unit length of images of any size, float32 [N, D] on the CPU.

        Args:
            images: N, uint8 [height, width, 3].
            device: where the network computes; it is left there.
            workers: processes that prepare images.

        Raises:
            ConfigError: there is no such device, or too many workers; or embeddings are not finite.
            DataError: an image cannot be read.
        """
        labels = np.zeros(len(images), np.int64)
        part = Part(images, labels, ("",), ("",) * len(images))
        replace(self.settings, workers=workers)  # raises if there may not be so many
        try:
            if torch.empty(0, device=torch.device(device)).is_meta:
                raise RuntimeError("holds no values")
            network: Any = self.to(device)
        except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
            raise ConfigError(f"--device {device}: {checkpoint.why(error)}") from error
        [embeddings] = evaluate.embed(
            lambda chunk: [network(chunk)], augment.EvaluationBatches(part, self.view), torch.device(device), workers
        )
        if not embeddings.isfinite().all():
            raise ConfigError("RUN: its network gives embeddings that are not finite")
        return embeddings
