"""The pictures of the examples: 400 emoji, each drawn by four to eight vendors; half of the emoji are for training.

`python -m examples.pictures FOLDER` writes those of the other half into a folder, to be searched.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import xbn_ext
from train import config, convnet, model
from train.data import Dataset, Part, emoji
from train.data import load as load_data

CLASSES = 400
SIZE = 32
EMBEDDING_SIZE = 128


def load() -> Dataset:
    """The emoji, fetched with npm on first use: `train` and `test` share no emoji."""
    return load_data("emoji", max_classes=CLASSES)


class Drawing(NamedTuple):
    """One vendor's picture of one emoji."""

    pixels: NDArray[np.uint8]
    key: str
    """Which emoji: its code points, such as "1f63a"."""
    vendor: str


def drawings() -> list[Drawing]:
    """All pictures of both halves."""
    data, keys = load(), emoji.code_points(max_classes=CLASSES)
    return [
        Drawing(pixels, keys[part.classes[label]], vendor)
        for part in (data.train, data.test)
        for pixels, label, vendor in zip(part.images, part.labels, part.sources, strict=True)
    ]


def tensors(part: Part) -> tuple[Tensor, Tensor]:
    """Pictures [N, 3, 32, 32] between -1 and 1, and which emoji each shows, [N]."""
    pixels = torch.from_numpy(part.images).permute(0, 3, 1, 2).float()
    small = F.interpolate(pixels, SIZE, mode="area") / 127.5 - 1
    return small.contiguous(memory_format=torch.channels_last), torch.from_numpy(part.labels)


def pretrained_features(pixels: list[NDArray[np.uint8]]) -> Tensor:
    """What EfficientNet-Lite0, trained on photographs, sees in pictures: [N, 1280]."""
    network, _ = model.build(config.Config())
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    with torch.no_grad():
        return torch.cat([network.eval().features(chunk) for chunk in images.split(256)])


def embedder() -> nn.Module:
    """A small network, untrained: pictures [B, 3, 32, 32] to embeddings [B, 128]."""
    network = nn.Sequential(convnet.convnet(), nn.Linear(convnet.FEATURES, EMBEDDING_SIZE))
    return network.to(memory_format=torch.channels_last)  # twice as fast on a CPU


def batches(labels: Tensor, steps: range, batch_size: int = 32, per_class: int = 4) -> Iterator[Tensor]:
    """For each step which pictures make up its batch, [batch_size]: four drawings of each of eight emoji."""
    sampler = xbn_ext.ClassBalancedSampler(labels, batch_size, per_class)
    for step in steps:
        yield torch.tensor(sampler.batch(step))


def distorted(pictures: Tensor) -> Tensor:
    """Each picture turned, moved, scaled and recoloured at random; a third of them in grey."""
    B = len(pictures)
    angle, scale, grey = (torch.rand(B, 1, 1) for _ in range(3))
    angle, scale = 0.6 * (angle - 0.5), 0.85 + 0.5 * (scale - 0.5)
    turn = torch.cat([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(B, 2, 2)
    where = torch.cat([scale * turn, 0.4 * (torch.rand(B, 2, 1) - 0.5)], 2)
    grid = F.affine_grid(where, list(pictures.shape), align_corners=False)
    ink = 1 - F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)  # 0 is white paper
    ink = torch.where(grey[..., None] < 0.3, ink.mean(1, keepdim=True), ink)
    ink = torch.einsum("bij,bjhw->bihw", torch.eye(3) + 0.6 * (torch.rand(B, 3, 3) - 0.5), ink)
    return (1 - ink.clamp(0, 2)).contiguous(memory_format=torch.channels_last)


def embed(network: nn.Module, pictures: Tensor) -> Tensor:
    """Embeddings [N, D] in evaluation mode."""
    network.eval()
    with torch.inference_mode():
        embeddings = torch.cat([network(chunk) for chunk in pictures.split(256)])
    network.train()
    return embeddings


def recall(network: nn.Module, part: Part) -> float:
    """How often the nearest other picture shows the same emoji (Recall@1), in per cent."""
    pictures, labels = tensors(part)
    return 100 * xbn_ext.evaluate(embed(network, pictures), labels)["precision_at_1"]


def write(part: Part, folder: Path) -> None:
    """One PNG for each picture, named after emoji and vendor."""
    folder.mkdir(parents=True, exist_ok=True)
    for pixels, label, vendor in zip(part.images, part.labels, part.sources, strict=True):
        Image.fromarray(pixels).save(folder / f"{part.classes[label].replace('/', ' ')}, {vendor}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write pictures of emoji into a folder.")
    parser.add_argument("folder", type=Path)
    write(load().test, parser.parse_args().folder)
