"""``torch.compile`` of the network for training, `--compile`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

from . import checkpoint
from .config import ConfigError
from .model import Embedder

Forward = Callable[[Tensor], Tensor]


def compiled(network: Embedder) -> Forward:
    """The same function of the same weights, compiled at its first call.

    The network itself stays as it is, with the names of its weights: it is what is tested and kept.
    """
    forward: Forward = torch.compile(network, dynamic=False)  # all batches have one size
    return forward


@contextmanager
def plain_errors() -> Iterator[None]:
    """While open, what torch.compile cannot do becomes a ConfigError; forward and backward compile at different times.

    Raises:
        ConfigError: names the argument, and the first line of the reason.
    """
    try:
        yield
    except (TorchDynamoException, InductorError, OSError) as error:  # OSError: of its cache
        raise ConfigError(
            f"--compile: torch cannot compile the network ({checkpoint.why(error)}); leave it out"
        ) from error
