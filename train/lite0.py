"""EfficientNet-Lite0 by the names that its published weights have, and checkpoints of version 0.1; timm has others."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

MEAN, STD = (127.0, 127.0, 127.0), (128.0, 128.0, 128.0)
"""The input the published weights were trained on is ``(pixel - MEAN) / STD`` with pixels 0 .. 255."""
BLOCKS = (1, 2, 2, 3, 3, 4, 1)
"""Of each stage; the published weights number them through."""

_PLACES = [f"blocks.{stage}.{block}" for stage, count in enumerate(BLOCKS) for block in range(count)]
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OTHERS = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
    "_project_conv": "conv_pwl", "_bn2": "bn3",
}  # fmt: skip


def renamed(name: str) -> str:
    """timm's name of a published parameter or buffer; any other name as it is."""
    first, _, rest = name.partition(".")
    if first == "_blocks":
        number, part, rest = rest.split(".", 2)
        return f"{_PLACES[int(number)]}.{(_OTHERS if int(number) else _FIRST)[part]}.{rest}"
    return f"{_OUTSIDE[first]}.{rest}" if first in _OUTSIDE else name


def renamed_within(name: str) -> str:
    """The same of a name in an ``Embedder``."""
    backbone = "backbone."
    return backbone + renamed(name.removeprefix(backbone)) if name.startswith(backbone) else name


def take_published_names(network: nn.Module) -> None:
    """From now on ``load_state_dict`` of the network, and of what it is a part of, takes either names."""

    def rename(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        if f"{prefix}_conv_stem.weight" not in state:
            return
        for name in [name for name in state if name.startswith(prefix)]:
            state[prefix + renamed(name.removeprefix(prefix))] = state.pop(name)

    network.register_load_state_dict_pre_hook(rename)
