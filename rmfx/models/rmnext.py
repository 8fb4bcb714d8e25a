"""RMNeXt (RMNet, arXiv 2111.00687): residual bottlenecks made to lose their residual connections.

A block of width C is a 1x1 convolution to (T - 1)·C channels, a 3x3 in groups, a 1x1 back to C and
a shortcut; a ReLU follows the addition. `rmfx.remove_residuals` carries the C_in channels of its
input through as further groups of the 3x3, which leaves (T - 1)·C + C_in inner channels and no
shortcut. Groups are g wide at C = 64 and twice as wide in each stage that follows, so that the
carry fills whole groups.

RMNeXt-50x6_32 has 40.8 M parameters and 7.04 G multiply-adds at 224 x 224 as it is trained; 47.6 M,
its batch norms among them, and 8.24 G as it is deployed. The names say depth, T and g.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._blocks import conv_bn
from .repvgg import RepVGGBlock

_WIDTHS = (64, 128, 256, 512)
_STRIDES = (2, 2, 1, 2, 2, 2)  # of the stem's two blocks and of the first block of each stage


class Bottleneck(nn.Module):
    """1x1, 3x3 in groups, 1x1 and a shortcut; the ReLU comes after the addition."""

    def __init__(
        self, channels_in: int, channels_out: int, inner: int, group_width: int, stride: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU()
        groups = inner // group_width
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(inner, channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels_in != channels_out:
            self.shortcut = conv_bn(channels_in, channels_out, 1, stride)
        self.relu3 = nn.ReLU()
        nn.init.zeros_(self.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, channels_in, H, W) to (N, channels_out, ceil(H/stride), ceil(W/stride))."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)))
        return self.relu3(self.bn3(self.conv3(y)) + self.shortcut(x))  # type: ignore[no-any-return]


class RMNeXt(nn.Module):
    """An RMNeXt.

    Args:
        blocks: of each stage.
        expansion: T, so that a block of width C has (T - 1)·C inner channels.
        group_width: g, channels of a group in the first stage; twice as many in each next one.
        num_classes: width of the classifier.
        widths: C of each stage.
        strides: of the stem's two blocks, then of the first block of each stage.
        image_channels: of the input.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        expansion: int,
        group_width: int,
        num_classes: int = 1000,
        *,
        widths: Sequence[int] = _WIDTHS,
        strides: Sequence[int] = _STRIDES,
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        width, (one, two, *stage_strides) = widths[0], strides
        self.stem = nn.Sequential(
            RepVGGBlock(image_channels, width, one), RepVGGBlock(width, width, two)
        )
        stages = []
        shapes = zip(widths, blocks, stage_strides, strict=True)
        for i, (channels, count, stride) in enumerate(shapes):
            inner, group = (expansion - 1) * channels, group_width * 2**i
            stage = [Bottleneck(width, channels, inner, group, stride)]
            stage += [Bottleneck(channels, channels, inner, group, 1) for _ in range(count - 1)]
            stages.append(nn.Sequential(*stage))
            width = channels
        self.stages = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, image_channels, H, W) of any size to logits (N, num_classes)."""
        x = self.stages(self.stem(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))  # type: ignore[no-any-return]


def rmnext41x5_16(num_classes: int = 1000) -> RMNeXt:
    """RMNeXt-41x5_16: 13 blocks, T = 5, groups from 16 channels on."""
    return RMNeXt((2, 3, 5, 3), 5, 16, num_classes)


def rmnext50x5_32(num_classes: int = 1000) -> RMNeXt:
    """RMNeXt-50x5_32: 16 blocks, T = 5, groups from 32 channels on."""
    return RMNeXt((3, 4, 6, 3), 5, 32, num_classes)


def rmnext50x6_32(num_classes: int = 1000) -> RMNeXt:
    """RMNeXt-50x6_32: 16 blocks, T = 6, groups from 32 channels on."""
    return RMNeXt((3, 4, 6, 3), 6, 32, num_classes)


def rmnext101x6_16(num_classes: int = 1000) -> RMNeXt:
    """RMNeXt-101x6_16: 33 blocks, T = 6, groups from 16 channels on."""
    return RMNeXt((3, 4, 23, 3), 6, 16, num_classes)


def rmnext152x6_32(num_classes: int = 1000) -> RMNeXt:
    """RMNeXt-152x6_32: 50 blocks, T = 6, groups from 32 channels on."""
    return RMNeXt((3, 8, 36, 3), 6, 32, num_classes)
