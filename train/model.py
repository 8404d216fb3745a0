"""The network: a backbone, global pooling, and a head of one or two layers to the embedding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import backbones, lite0, timm_models
from .backbones import Normalisation
from .config import Config, ConfigError
from .cores import bytes_of_memory
from .streams import Stream, torch_seed


class Embedder(nn.Module):
    """Images uint8 [B, 3, H, W], or their features float32 [B, F], to embeddings float32 [B, D], not of unit length.

    The backbone computes in ``precision``, its weights stay float32; the head is float32 throughout.
    """

    mean: Tensor
    std: Tensor
    precision = torch.float32
    note = ""
    """A line that says what its first weights were."""
    lacking: ConfigError | None = None
    """Why they could not be loaded, of a network that goes on."""

    def __init__(self, backbone: nn.Module, head: nn.Module, norm: Normalisation, *, frozen_bn: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.frozen_bn = frozen_bn
        self.register_buffer("mean", torch.tensor(norm.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(norm.std).view(3, 1, 1), persistent=False)

    def features(self, images: Tensor) -> Tensor:
        """The backbone's pooled features, float32 [B, F]; of features, themselves."""
        if images.is_floating_point():
            return images
        pixels = (images.to(self.mean.dtype) - self.mean) / self.std
        mixed = None if self.precision == torch.float32 else self.precision
        with torch.autocast(images.device.type, mixed, enabled=mixed is not None):
            features: Tensor = self.backbone(pixels.contiguous(memory_format=torch.channels_last))
        return features.float()

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings [B, D]."""
        embeddings: Tensor = self.head(self.features(images))
        return embeddings

    def start(self) -> dict[str, Any]:
        """What pretrained weights decide besides the weights: what is not trained, and the note on them."""
        frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        return {"note": self.note, "frozen_bn": self.frozen_bn, "frozen": frozen}

    def beginning(self) -> dict[str, Any]:
        """For ``go_on``: what this network is now."""
        return {"model": self.state_dict(), "start": self.start()}

    def normalises_by_batch(self) -> bool:
        """Whether the backbone is trained with each batch's own statistics."""
        return not self.frozen_bn and bool(_batch_norms(self.backbone))

    def go_on(self, state: dict[str, Any]) -> None:
        """Become the network of a checkpoint, whatever pretrained weights there are now.

        Checkpoints of earlier versions have the weights alone.

        Raises:
            ConfigError: of such a one, the weights that it began with are gone.
        """
        self.load_state_dict(state["model"])
        if "start" in state:
            start = state["start"]
            self.note, self.frozen_bn = start["note"], start["frozen_bn"]
            frozen = {lite0.renamed_within(name) for name in start["frozen"]}
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(name not in frozen)
        elif self.lacking is not None:
            raise self.lacking

    def train(self, mode: bool = True) -> Embedder:
        """Training mode, but frozen batch normalisation stays as it is."""
        super().train(mode)
        if self.frozen_bn:
            for module in _batch_norms(self.backbone):
                module.eval()
        return self


def build(config: Config, *, goes_on: bool = False) -> tuple[Embedder, str]:
    """The network that a run starts from, and a line that says what its weights are.

    Args:
        config: the settings.
        goes_on: a checkpoint has the weights, so that timm need not fetch any, nor those of a file be there.

    Raises:
        ConfigError: there is no such network, or it cannot have such weights or images.
    """
    if goes_on and timm_models.is_one(config.backbone):
        config = replace(config, weights="none")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(torch_seed(config.seed, Stream.INITIALISATION))
        lacking = None
        try:
            made = backbones.make(config)
        except ConfigError as error:
            if not goes_on:
                raise
            made, lacking = backbones.make(replace(config, weights="none")), error
        backbone, width, norm, (pretrained, note) = made
        frozen = config.batchnorm == "frozen" or (config.batchnorm == "auto" and pretrained)
        model = Embedder(backbone, _head(width, config.hidden, config.embedding_dim), norm, frozen_bn=frozen)
    if pretrained or config.features == "frozen":
        _freeze(backbone, 1.0 if config.features == "frozen" else config.freeze)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    _try(model, width, config)  # in float32, as it is not yet on its device
    model.precision = getattr(torch, config.precision)
    model.note, model.lacking = f"{config.backbone}: {note}", lacking
    return model, model.note


@contextmanager
def without_traces(model: nn.Module) -> Iterator[None]:
    """Forward passes in here, also in training mode, change neither running statistics nor torch's generators."""
    tracking = [module for module in _batch_norms(model) if module.track_running_stats and module.training]
    with torch.random.fork_rng(), torch.no_grad():
        for module in tracking:
            module.track_running_stats = False
        try:
            yield
        finally:
            for module in tracking:
                module.track_running_stats = True


def _head(width: int, hidden: int, embedding_dim: int) -> nn.Module:
    weights = width * embedding_dim if hidden == 0 else hidden * (width + embedding_dim)
    name, number = ("embedding-dim", embedding_dim) if hidden == 0 else ("hidden", hidden)
    _require_room(f"--{name} {number}: the head and its optimizer take", 4 * 4 * weights)  # gradient, two moments
    if hidden == 0:
        return nn.Linear(width, embedding_dim)
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, embedding_dim))


def _freeze(backbone: nn.Module, part: float) -> None:
    """Exempt the first ``part`` of the layers that have parameters of their own from training."""
    layers = [module for module in backbone.modules() if list(module.parameters(recurse=False))]
    for layer in layers[: int(part * len(layers))]:
        for parameter in layer.parameters(recurse=False):  # a transformer has some besides its layers
            parameter.requires_grad_(False)


def _try(model: Embedder, width: int, config: Config) -> None:
    """Raise ConfigError unless the backbone turns images of this size into one row of features each."""
    size = config.image_size
    _require_room(f"--image-size {size}: a batch of images takes", config.batch_size * 3 * size**2)
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    model.train()
    try:
        with without_traces(model):
            shape = tuple(model.features(images).shape)
    except Exception as error:
        problem = f"cannot take images of --image-size {config.image_size}: {error}"
        raise ConfigError(f"--backbone {config.backbone} {problem}") from error
    if shape != (2, width):
        raise ConfigError(f"--backbone {config.backbone} gives features of shape {shape}, not (2, {width})")


def _require_room(what: str, needed: int) -> None:
    """Raise ConfigError if so many bytes are more than this machine has at all."""
    there = bytes_of_memory()
    if needed > there:
        raise ConfigError(f"{what} {needed:,} bytes, and this machine has {there:,}; choose a smaller one")


def _batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
