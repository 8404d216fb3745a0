"""EfficientNet-Lite0: EfficientNet-B0 for small machines, without squeeze-and-excitation and with ReLU6.

3.4 million parameters; the last linear layer, dropped here, has 1.3 million of them. The modules carry the names of
the published weights, so ``load_state_dict`` takes that file as it is, less the classifier ``_fc``.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

FEATURES = 1280
MEAN, STD = (127.0, 127.0, 127.0), (128.0, 128.0, 128.0)
"""The input the weights were trained on is ``(pixel - MEAN) / STD`` with pixels 0 .. 255."""


class Stage(NamedTuple):
    """A run of equal blocks, except the first, which changes the width and may halve the resolution."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    width: int


STEM = 32
STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class SameConv2d(nn.Conv2d):
    """TensorFlow's "same" convolution: an odd pixel of padding goes to the right and the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', ceil(H / stride), ceil(W / stride)]"""
        stride, kernel = self.stride[0], self.kernel_size[0]
        high, wide = (max(kernel - stride if n % stride == 0 else kernel - n % stride, 0) for n in x.shape[-2:])
        if high == wide and high % 2 == 0:
            return F.conv2d(x, self.weight, None, self.stride, high // 2, groups=self.groups)
        x = F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
        return F.conv2d(x, self.weight, None, self.stride, groups=self.groups)


def _conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3, momentum=0.01)


class Block(nn.Module):
    """Mobile inverted bottleneck: widen, filter each channel, narrow; added to its input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.widens = expansion > 1
        if self.widens:
            self._expand_conv = _conv(inputs, inner)
            self._bn0 = _norm(inner)
        self._depthwise_conv = _conv(inner, inner, kernel, stride, groups=inner)
        self._bn1 = _norm(inner)
        self._project_conv = _conv(inner, outputs)
        self._bn2 = _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]"""
        y: Tensor = F.relu6(self._bn0(self._expand_conv(x)), inplace=True) if self.widens else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)), inplace=True)
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """Images to pooled features, without a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _conv(3, STEM, kernel=3, stride=2)
        self._bn0 = _norm(STEM)
        self._blocks = nn.ModuleList()
        width = STEM
        for stage in STAGES:
            for i in range(stage.blocks):
                stride = stage.stride if i == 0 else 1
                self._blocks.append(Block(width, stage.width, stage.kernel, stride, stage.expansion))
                width = stage.width
        self._conv_head = _conv(width, FEATURES)
        self._bn1 = _norm(FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] -> features [B, 1280]"""
        x = F.relu6(self._bn0(self._conv_stem(x)), inplace=True)
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)), inplace=True)
        return x.mean((2, 3))
