"""CIFAR residual networks with pre-activation (He et al., arXiv 1603.05027), depth 6n + 2.

The order within a branch is batch norm, ReLU, convolution, twice, and nothing stands after the
addition, so one value runs through a whole stage by additions alone. Where the width changes, a 1x1
convolution of stride 2 is the shortcut, and it reads the activated value as the branch does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._blocks import blocks_of

_WIDTHS = (16, 32, 64)


class PreActivationBlock(nn.Module):
    """x + f(x), or projection(relu(bn(x))) + f(x) where the width changes."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        stride = 1 if channels_in == channels_out else 2
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.projection: nn.Module | None = None
        if channels_in != channels_out:
            self.projection = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, channels_in, H, W) to channels_out channels, at half the size if they differ."""
        active = self.relu1(self.bn1(x))
        y = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        shortcut = x if self.projection is None else self.projection(active)
        return shortcut + y  # type: ignore[no-any-return]


class PreActivationResNet(nn.Module):
    """A pre-activation ResNet; build it with `preactivation_resnet`."""

    def __init__(self, blocks: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _WIDTHS[0], 3, padding=1, bias=False)
        self.layer1 = _make_stage(_WIDTHS[0], _WIDTHS[0], blocks)
        self.layer2 = _make_stage(_WIDTHS[0], _WIDTHS[1], blocks)
        self.layer3 = _make_stage(_WIDTHS[1], _WIDTHS[2], blocks)
        self.bn = nn.BatchNorm2d(_WIDTHS[2])
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(_WIDTHS[2], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, 3, H, W) of any size to logits (N, num_classes)."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = self.avgpool(self.relu(self.bn(x)))
        return self.fc(torch.flatten(x, 1))  # type: ignore[no-any-return]


def preactivation_resnet(depth: int = 110, num_classes: int = 10) -> PreActivationResNet:
    """CIFAR ResNet with pre-activation, of `depth` layers: (depth - 2) / 2 residual connections.

    Args:
        depth: 6n + 2 with n >= 1: 20, 32, 44, 56, 110, ...
        num_classes: width of the classifier.

    Raises:
        ValueError: `depth` is not of the form 6n + 2.

    Example:
        >>> import torch
        >>> preactivation_resnet(20).eval()(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    return PreActivationResNet(blocks_of(depth), num_classes)


def _make_stage(channels_in: int, channels_out: int, blocks: int) -> nn.Sequential:
    rest = (PreActivationBlock(channels_out, channels_out) for _ in range(blocks - 1))
    return nn.Sequential(PreActivationBlock(channels_in, channels_out), *rest)
