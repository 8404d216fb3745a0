"""A small convolutional network for small images, to be trained from random weights in minutes on a CPU."""

from __future__ import annotations

from torch import nn

WIDTHS = (16, 32, 64, 128)
FEATURES = WIDTHS[-1]
MEAN = STD = (127.5, 127.5, 127.5)


def convnet() -> nn.Sequential:
    """Pixels [B, 3, H, W] to features [B, 128]: four convolutions with batch normalisation, each halving the image."""
    layers: list[nn.Module] = []
    before = 3
    for width in WIDTHS:
        halving = nn.MaxPool2d(2) if layers else nn.Identity()
        stride = 1 if layers else 2
        convolution = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True), halving]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
