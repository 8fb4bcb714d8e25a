"""A small classifier of C2f blocks, as in YOLOv8 (no paper; ultralytics' yolov8-cls has its shape).

A C2f block halves the channels of its first convolution, sends one half through bottlenecks in a
row, each with a residual connection, and concatenates both halves and what every bottleneck gives.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._blocks import conv_bn


def conv_bn_silu(
    channels_in: int, channels_out: int, kernel: int, stride: int = 1
) -> nn.Sequential:
    """`conv_bn` with SiLU."""
    return conv_bn(channels_in, channels_out, kernel, stride, act=nn.SiLU(inplace=True))


class Bottleneck(nn.Module):
    """x + f(x) with two 3x3 convolutions, both followed by an activation; none after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1 = conv_bn_silu(channels, channels, 3)
        self.cv2 = conv_bn_silu(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, channels, H, W) to the same shape."""
        return x + self.cv2(self.cv1(x))  # type: ignore[no-any-return]


class C2f(nn.Module):
    """Split, bottlenecks in a row, concatenation of all, a 1x1 convolution."""

    def __init__(self, channels: int, bottlenecks: int) -> None:
        super().__init__()
        half = channels // 2
        self.cv1 = conv_bn_silu(channels, channels, 1)
        self.cv2 = conv_bn_silu((2 + bottlenecks) * half, channels, 1)
        self.m = nn.ModuleList(Bottleneck(half) for _ in range(bottlenecks))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, channels, H, W) to the same shape."""
        halves = self.cv1(x).chunk(2, 1)  # list(...) instead could not be traced by torch.fx
        parts = [halves[0], halves[1]]
        for bottleneck in self.m:
            parts.append(bottleneck(parts[-1]))
        return self.cv2(torch.cat(parts, 1))  # type: ignore[no-any-return]


class C2fNet(nn.Module):
    """A stem, one C2f block at each of three resolutions, and a linear classifier.

    Args:
        widths: channels of the three stages, even numbers.
        bottlenecks: of each stage; their sum is the number of residual connections.
        num_classes: width of the classifier.

    Example:
        >>> import torch
        >>> C2fNet().eval()(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 10])
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (32, 64, 128),
        bottlenecks: tuple[int, ...] = (1, 2, 2),
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        channels = 16
        self.stem = conv_bn_silu(3, channels, 3, stride=2)
        for width, count in zip(widths, bottlenecks, strict=True):
            stages += [conv_bn_silu(channels, width, 3, stride=2), C2f(width, count)]
            channels = width
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, 3, H, W) to logits (N, num_classes)."""
        x = self.pool(self.stages(self.stem(x)))
        return self.fc(torch.flatten(x, 1))  # type: ignore[no-any-return]
