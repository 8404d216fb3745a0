"""Networks of timm as backbones: ``timm:NAME``, with the input that their weights were trained on.

timm is imported where it is needed: that takes a second.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from . import vision  # before timm, which imports torchvision

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

PREFIX = "timm:"
INTERPOLATIONS = tuple(mode.value for mode in vision.transforms.InterpolationMode)
BILINEAR = "bilinear"
ALIKE = 5
"""Names that a message proposes."""


class Input(NamedTuple):
    """What a network was trained on."""

    size: int
    """Width and height of an image, in pixels."""
    mean: tuple[float, ...]
    """Of each channel, of pixels 0 .. 1; so is ``std``."""
    std: tuple[float, ...]
    interpolation: str
    """How images are scaled: a value of torchvision's ``InterpolationMode``."""


def is_one(backbone: str) -> bool:
    """Whether a backbone is one of timm's by its name."""
    return backbone.startswith(PREFIX)


def whole_name(backbone: str) -> str:
    """The same with the tag that says which weights are meant: without one, those that timm prefers.

    Raises:
        ValueError: timm has no such network, or no such weights of it; proposes names.
    """
    from timm.models import is_model, list_models

    name, _, tag = backbone.removeprefix(PREFIX).partition(".")
    if not is_model(name):
        alike = difflib.get_close_matches(name, list_models(), ALIKE, 0.5)
        proposed = f"; did you mean {', '.join(alike)}?" if alike else ""
        raise ValueError(f"timm has no network {name}{proposed}")
    if tag:
        _configuration(backbone)
        return backbone
    chosen = _configuration(backbone).tag
    return f"{PREFIX}{name}.{chosen}" if chosen else backbone


def input_of(backbone: str) -> Input:
    """By timm's own data configuration; raises ValueError as ``whole_name`` does."""
    from timm.data.config import resolve_data_config

    found = resolve_data_config(pretrained_cfg=_configuration(backbone).to_dict())
    how = found["interpolation"]
    size = max(found["input_size"][1:])  # five of timm's networks ask for an oblong
    return Input(size, tuple(found["mean"]), tuple(found["std"]), how if how in INTERPOLATIONS else BILINEAR)


def has_weights(backbone: str) -> bool:
    """Whether timm knows where to fetch trained weights."""
    return bool(_configuration(backbone).has_weights)


def create(backbone: str, size: int) -> nn.Module:
    """A network with random weights, images [B, 3, size, size] to pooled features [B, F]."""
    return _create(backbone, size, num_classes=0)


def fetch(backbone: str, size: int) -> nn.Module:
    """The same with timm's weights, from the cache of the Hugging Face hub or from there; raises what that raises."""
    return _create(backbone, size, pretrained=True, num_classes=0)


def from_file(backbone: str, size: int, file: Path) -> nn.Module:
    """The same with the weights of a file, as timm or torch writes them, with or without a classifier of any size.

    timm reads and adapts them, such as the positions of a transformer to the size of the images.

    Raises:
        ValueError: they are not those of this network.
        OSError: the file cannot be read, and so are other errors of timm and torch.
    """
    from timm.models import load_state_dict

    state: Mapping[str, Tensor] = load_state_dict(str(file), use_ema=False)
    classifiers = _configuration(backbone).to_dict().get("classifier") or ()
    first = classifiers if isinstance(classifiers, str) else next(iter(classifiers), "")
    classes = len(state[f"{first}.weight"]) if f"{first}.weight" in state else 0
    overlay = {"state_dict": dict(state), "num_classes": classes, "custom_load": False, "label_offset": 0}
    try:  # of so many classes as there are in the file: only then timm is strict
        network = _create(backbone, size, pretrained=True, num_classes=classes, pretrained_cfg_overlay=overlay)
    except (RuntimeError, KeyError) as error:
        raise ValueError(str(error)) from error
    network.pretrained_cfg.pop("state_dict", None)  # type: ignore[operator, union-attr]
    network.reset_classifier(0)  # type: ignore[operator]
    return network


def width_of(network: nn.Module) -> int:
    """F, of the network's features."""
    return int(getattr(network, "head_hidden_size", None) or network.num_features)  # type: ignore[arg-type]


def _configuration(backbone: str) -> PretrainedCfg:
    from timm.models import PretrainedCfg, get_pretrained_cfg

    try:
        found = get_pretrained_cfg(backbone.removeprefix(PREFIX))
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    return PretrainedCfg() if found is None else found


def _create(backbone: str, size: int, **how: Any) -> nn.Module:
    import timm

    if _configuration(backbone).fixed_input_size:
        how["img_size"] = size
    network: nn.Module = timm.create_model(backbone.removeprefix(PREFIX), **how)
    return network
