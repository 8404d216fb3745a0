"""The backbone's features in place of images: where the backbone is not trained, each image passes it once."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from . import evaluate
from .augment import EvaluationBatches, View
from .data import Dataset, Part
from .loading import plain_errors
from .model import Embedder
from .ranks import ALONE, Ranks


@plain_errors()
def of(
    data: Dataset, model: Embedder, view: View, device: torch.device, workers: int = 0, ranks: Ranks = ALONE
) -> Dataset:
    """The same data set with features float32 [N, F] in place of its images, each as ``view`` shows it."""
    model.to(device).eval()

    def part(side: Part) -> Part:
        if not side.sources:
            return side
        batches = EvaluationBatches(side, view)
        (found,) = evaluate.embed(lambda images: (model.features(images),), batches, device, workers, ranks)
        return replace(side, images=found.numpy())

    validation = None if data.validation is None else part(data.validation)
    return replace(data, train=part(data.train), test=part(data.test), validation=validation)


def as_they_are(features: Tensor) -> Tensor:
    """The view of features: themselves."""
    return features
