"""CIFAR residual networks of depth 6n + 2 (He et al., arXiv 1512.03385, section 4.2).

Three stages of n basic blocks with 16, 32 and 64 channels; the first block of stages two and
three halves the resolution. Where the width changes, the shortcut is one of the paper's two:

- "A": no parameters. Every second pixel, new channels filled with zeros (half of them before the
  old ones, half after, as in the widely used public implementations).
- "B": a 1x1 convolution of stride 2 and a batch norm.

With option A, ResNet-56 has 853,018 parameters and 125,485,696 multiply-adds at 32x32,
ResNet-110 has 1,727,962 and 252,887,680.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ._blocks import blocks_of, conv_bn

Shortcut = Literal["A", "B"]

_WIDTHS = (16, 32, 64)


class PaddedShortcut(nn.Module):
    """Option A: keep every `stride`-th pixel and surround the channels with zero channels.

    Args:
        channels_in: channels of the input.
        channels_out: channels of the output, not fewer.
        stride: spatial subsampling.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        extra = channels_out - channels_in
        self.before, self.behind = extra // 2, extra - extra // 2

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, channels_in, H, W) to (N, channels_out, ceil(H/stride), ceil(W/stride))."""
        kept = x[:, :, :: self.stride, :: self.stride]
        return functional.pad(kept, (0, 0, 0, 0, self.before, self.behind))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the ReLU comes after the addition."""

    def __init__(
        self, channels_in: int, channels_out: int, stride: int, shortcut: Shortcut
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut = _make_shortcut(channels_in, channels_out, stride, shortcut)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, channels_in, H, W) to (N, channels_out, ceil(H/stride), ceil(W/stride))."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu2(y + self.shortcut(x))  # type: ignore[no-any-return]


class CifarResNet(nn.Module):
    """A CIFAR ResNet; build it with `cifar_resnet`."""

    def __init__(
        self,
        blocks: int,
        shortcut: Shortcut,
        num_classes: int,
        widths: Sequence[int] = _WIDTHS,
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        first, second, third = widths
        self.conv1 = nn.Conv2d(image_channels, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU()
        self.layer1 = _make_stage(first, first, blocks, 1, shortcut)
        self.layer2 = _make_stage(first, second, blocks, 2, shortcut)
        self.layer3 = _make_stage(second, third, blocks, 2, shortcut)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(third, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, image_channels, H, W) of any size to logits (N, num_classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))  # type: ignore[no-any-return]


def cifar_resnet(
    depth: int = 20,
    shortcut: Shortcut = "A",
    num_classes: int = 10,
    *,
    widths: Sequence[int] = _WIDTHS,
    image_channels: int = 3,
) -> CifarResNet:
    """CIFAR ResNet of `depth` layers, with shortcuts of option A or B.

    Args:
        depth: 6n + 2 with n >= 1: 20, 32, 44, 56, 110, 1202, ...
        shortcut: "A" (zero-padded channels) or "B" (1x1 projection and batch norm).
        num_classes: width of the classifier.
        widths: channels of the three stages, none fewer than before.
        image_channels: of the input.

    Raises:
        ValueError: `depth` is not of the form 6n + 2, `shortcut` is neither "A" nor "B", or there
            are not three widths, or one is less than the one before.

    Example:
        >>> import torch
        >>> net = cifar_resnet(20).eval()
        >>> net(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
        >>> sum(p.numel() for p in net.parameters())
        269722
    """
    blocks = blocks_of(depth)
    if shortcut not in ("A", "B"):
        raise ValueError(f'shortcut must be "A" or "B", not {shortcut!r}')
    if len(widths) != 3 or min(widths) < 1 or any(a > b for a, b in pairwise(widths)):
        raise ValueError(f"widths must be three numbers, none less than before, not {widths}")
    return CifarResNet(blocks, shortcut, num_classes, widths, image_channels)


def _make_shortcut(channels_in: int, channels_out: int, stride: int, kind: Shortcut) -> nn.Module:
    if stride == 1 and channels_in == channels_out:
        return nn.Identity()
    if kind == "A":
        return PaddedShortcut(channels_in, channels_out, stride)
    return conv_bn(channels_in, channels_out, 1, stride)


def _make_stage(
    channels_in: int, channels_out: int, blocks: int, stride: int, kind: Shortcut
) -> nn.Sequential:
    first = BasicBlock(channels_in, channels_out, stride, kind)
    rest = (BasicBlock(channels_out, channels_out, 1, kind) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


def _initialise(net: nn.Module) -> None:
    """Kaiming's normal initialisation of every convolution, as in the paper."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
