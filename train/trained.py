"""What a run has trained: ``python -m train embed`` and ``python -m train export`` make use of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import augment, checkpoint, evaluate, model
from .config import Config
from .data import Part, Pixels


class Trained(nn.Module):
    """The network of a run, uint8 images [B, 3, S, S] to embeddings of unit length, float32 [B, D]."""

    def __init__(self, run: Path) -> None:
        """Raises ConfigError if ``run`` has no checkpoint, one that cannot be read, or a network that is not here."""
        super().__init__()
        path, otherwise = run / checkpoint.CHECKPOINT, "RUN must be the --out of a run of train/"
        state = checkpoint.load(path, otherwise, "")
        self.step: int = state["step"]
        with checkpoint.reading(path, otherwise, ""):  # of another version, it may have other settings
            self.settings = Config(**state["config"] | {"weights": "none"})  # the weights come from the checkpoint
        self.network, _ = model.build(self.settings)
        with checkpoint.reading(path, otherwise, ""):
            self.network.load_state_dict(state["model"])
        self.view = augment.evaluation_view(self.settings.image_size, self.settings.augment)
        """What a test sees of an image."""
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = nn.functional.normalize(self.network(images), dim=1)
        return embeddings

    def embed(self, images: Sequence[Pixels], device: str | torch.device = "cpu", workers: int = 0) -> Tensor:
        """Embeddings of unit length of images of any size, float32 [N, D] on the CPU.

        Args:
            images: N, uint8 [height, width, 3].
            device: where the network computes; it is left there.
            workers: processes that prepare images.
        """
        labels = np.zeros(len(images), np.int64)
        part = Part(images, labels, ("",), ("",) * len(images))
        network: Any = self.to(device)
        [embeddings] = evaluate.embed(
            lambda chunk: [network(chunk)], augment.EvaluationBatches(part, self.view), torch.device(device), workers
        )
        return embeddings
