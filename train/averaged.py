"""The exponential moving average of a network's weights, `--ema`: what is tested, kept and exported in their place.

The memory has no part in it: its rows are embeddings of the network that is trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .model import Embedder


class Averaged:
    """The average over the steps of a run, in which each step's weights count ``decay`` times those of the next."""

    def __init__(self, network: Embedder, decay: float) -> None:
        """Begin with a copy of the network."""
        # Running statistics of batch normalisation are averaged, too: those of the last step belong to other weights.
        self._average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)

    @property
    def network(self) -> Embedder:
        """The network with averaged weights; until the first update, those that it began with."""
        network = self._average.module
        assert isinstance(network, Embedder)
        return network

    def update(self, network: Embedder) -> None:
        """Take in the weights after a step; the average is those after the first one until there are more."""
        self._average.update_parameters(network)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: ``model``, by the names of the network, and how many steps are in it."""
        return {"model": self.network.state_dict(), "updates": int(self._average.n_averaged)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint has."""
        self.network.load_state_dict(state["model"])
        self._average.n_averaged = torch.full_like(self._average.n_averaged, state["updates"])
