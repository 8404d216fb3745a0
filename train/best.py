"""The weights of a run that score best on held-out training classes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .evaluate import Scores

Weights = dict[str, Tensor]


class Best:
    """The best weights so far, on the CPU; of several that score the same, the first."""

    def __init__(self, score: str) -> None:
        self.score = score
        """The name of the score that decides."""
        self.step: int | None = None
        """After how many steps they were the network's; None before the first offer."""
        self.scores: Scores = {}
        """On the held-out classes."""
        self.weights: Weights = {}

    def offer(self, step: int, scores: Scores, network: nn.Module) -> bool:
        """Keep a copy of the network's weights if they are the best; returns whether they are."""
        if self.step is not None and not scores[self.score] > self.scores[self.score]:
            return False
        self.step, self.scores, self.weights = step, scores, _copy(network)
        return True

    @contextmanager
    def used(self, network: nn.Module) -> Iterator[None]:
        """While open, the network has the best weights."""
        now = _copy(network)
        network.load_state_dict(self.weights)
        try:
            yield
        finally:
            network.load_state_dict(now)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"step": self.step, "scores": self.scores, "model": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint has."""
        self.step, self.scores, self.weights = state["step"], state["scores"], state["model"]


def _copy(network: nn.Module) -> Weights:
    return {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}
