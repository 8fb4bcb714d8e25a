"""MobileNetV2 with linear bottlenecks of any width.

Where residual connections are removed, what projects into a bottleneck and what expands out of it
touch and can merge (RMNet, arXiv 2111.00687, section 3.3). A bottleneck that is merged away costs
nothing, however wide it was in training. With `free=1` this is MobileNetV2 (Sandler et al., arXiv
1801.04381) as torchvision has it: 3,504,872 parameters, 300,774,272 multiply-adds at 224 x 224.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._blocks import conv_bn

# expansion, channels, blocks, stride of the first one
_SETTINGS = (
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
    *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)
_STEM, _HEAD = 32, 1280


class InvertedResidual(nn.Module):
    """1x1 to the inner width, depthwise 3x3, linear 1x1 to the bottleneck, a skip if sizes allow.

    Args:
        channels_in: of the bottleneck before.
        inner: channels of the depthwise convolution.
        channels_out: of the bottleneck behind.
        stride: of the depthwise convolution.
        expands: whether there is a first 1x1; without it `inner` is `channels_in`.
    """

    def __init__(
        self, channels_in: int, inner: int, channels_out: int, stride: int, expands: bool
    ) -> None:
        super().__init__()
        self.expand = conv_bn(channels_in, inner, 1, act=nn.ReLU6()) if expands else nn.Identity()
        self.depthwise = conv_bn(inner, inner, 3, stride, groups=inner, act=nn.ReLU6())
        self.project = conv_bn(inner, channels_out, 1)
        self.has_skip = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, channels_in, H, W) to (N, channels_out, ceil(H/stride), ceil(W/stride))."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.has_skip else y  # type: ignore[no-any-return]


class MobileNetV2(nn.Module):
    """A MobileNetV2; build it with `mobilenet_v2`."""

    def __init__(self, free: float, num_classes: int) -> None:
        super().__init__()
        blocks = []
        width, before = _STEM, _STEM  # the bottleneck's as trained, and as in MobileNetV2
        for expansion, channels, count, first_stride in _SETTINGS:
            bottleneck = round(free * channels)
            for i in range(count):
                stride = first_stride if i == 0 else 1
                expands = expansion > 1
                inner = expansion * before if expands else width
                blocks.append(InvertedResidual(width, inner, bottleneck, stride, expands))
                width, before = bottleneck, channels
        self.stem = conv_bn(3, _STEM, 3, 2, act=nn.ReLU6())
        self.blocks = nn.Sequential(*blocks)
        self.head = conv_bn(width, _HEAD, 1, act=nn.ReLU6())
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(_HEAD, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, 3, H, W) of any size to logits (N, num_classes)."""
        x = self.avgpool(self.head(self.blocks(self.stem(x))))
        return self.fc(self.dropout(torch.flatten(x, 1)))  # type: ignore[no-any-return]


def mobilenet_v2(free: float = 1.0, num_classes: int = 1000) -> MobileNetV2:
    """MobileNetV2 whose linear bottlenecks are `free` times as wide while it is trained.

    Args:
        free: factor of the bottlenecks' widths; what is inside of blocks stays as it is.
        num_classes: width of the classifier.

    Raises:
        ValueError: `free` leaves no channels.

    Example:
        >>> sum(p.numel() for p in mobilenet_v2().parameters())
        3504872
    """
    if round(free * _SETTINGS[0][1]) < 1:
        raise ValueError(f"free must leave a channel, not {free}")
    return MobileNetV2(free, num_classes)
