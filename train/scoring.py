"""The scores of a run's network: on its test images, and on training classes that are held out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import evaluate
from .augment import EvaluationBatches, View
from .data import Dataset, split
from .evaluate import Network, Scores
from .model import Embedder
from .ranks import Ranks

TEST, VALIDATION = "test", "validation"


def tested_on(settings: dict[str, Any]) -> str:
    """What the scores of a run with these settings are of, in words."""
    return "test images" if settings.get("test_of") == split.IMAGES else "test classes"


def names(data: Dataset) -> list[str]:
    """Of the scores of every part."""
    return [*(f"recall@{k}" for k in data.recalls), "map@r"]


class TrainingError(RuntimeError):
    """Training cannot go on; the message says what to change."""


class Scoring:
    """Scores of the images of a part, TEST or VALIDATION, by the data set's protocol.

    All processes of a run call every method, and come to the same numbers.
    """

    def __init__(
        self, data: Dataset, inputs: Dataset, view: View, device: torch.device, workers: int, ranks: Ranks
    ) -> None:
        """``inputs`` are the data, or features in place of their images; ``view`` is what is seen of one."""
        self.data, self.inputs, self.view = data, inputs, view
        self.device, self.workers, self.ranks = device, workers, ranks

    def before(self, model: Embedder) -> dict[str, Any]:
        """Scores before training: of the backbone's own features, and of the untrained head on top of them.

        Those of VALIDATION are under its name. Those of TEST are left out where nothing is tested.
        """
        model.eval()

        def network(images: Tensor) -> tuple[Tensor, Tensor]:
            features = model.features(images)
            return features, model.head(features)

        def of(part: str) -> dict[str, Any]:
            features, embeddings = self._embed(part, network)
            return {"frozen": self.of(features, part, 0), "untrained_head": self.of(embeddings, part, 0)}

        found = of(TEST) if self.data.tested else {}
        return found | ({} if self.data.validation is None else {VALIDATION: of(VALIDATION)})

    def embeddings(self, model: Embedder, part: str) -> Tensor:
        """The embeddings [N, D] of a part; N is 0 where nothing is tested."""
        model.eval()
        if not self.data.parts[part].sources:
            return torch.empty(0, 0)
        (found,) = self._embed(part, lambda images: (model(images),))
        return found

    def of(self, embeddings: Tensor, part: str, steps: int) -> Scores:
        """Scores of embeddings [N, *] of a part, by a network after so many steps.

        Raises:
            TrainingError: there are no scores.
        """
        return self.ranks.leader(lambda: self._of(embeddings, part, steps))

    def _of(self, embeddings: Tensor, part: str, steps: int) -> Scores:
        data = self.data
        queries, gallery = (data.queries, data.gallery) if part == TEST else (None, None)
        try:
            return evaluate.evaluate(
                embeddings.to(self.device), data.parts[part].labels, queries=queries, gallery=gallery,
                recalls=data.recalls,
            )  # fmt: skip
        except ValueError as error:
            advice = "lower --lr or --backbone-lr, or choose another --precision"
            raise TrainingError(f"no scores after {steps} steps: {error}; {advice}") from error

    def _embed(self, part: str, network: Network) -> list[Tensor]:
        batches = EvaluationBatches(self.inputs.parts[part], self.view)
        return evaluate.embed(network, batches, self.device, self.workers, self.ranks)
