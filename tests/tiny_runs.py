"""Runs of a second: a network in the place of resnet18 that takes a millisecond, and settings that go with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import miniatures
import pytest
import torch
from torch import Tensor, nn

from train import run
from train.config import Config

SCORES = ("recall@1", "recall@10", "recall@100", "map@r")


class TinyBackbone(nn.Module):
    """Convolution, batch normalisation and dropout: what a real backbone is made of, in a millisecond."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.dropout, self.fc = nn.Conv2d(3, 12, 3, 2), nn.BatchNorm2d(12), nn.Dropout(0.1), None

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.dropout(torch.relu(self.bn(self.conv(x)))).mean((2, 3))
        return features


def make_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "train.backbones._torchvision",
        lambda config: (TinyBackbone(), 12, run.model.Normalisation((0.0,) * 3, (255.0,) * 3), (False, "tiny")),
    )


def settings(shapes: Path, out: Path, **changes: Any) -> Config:
    return miniatures.settings(shapes, out, **{"backbone": "resnet18"} | changes)


def command(*arguments: object) -> list[str]:
    return [str(argument) for argument in arguments]
