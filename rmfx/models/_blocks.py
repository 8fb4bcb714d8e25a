"""What the reference models are built of."""

from __future__ import annotations

from torch import nn


def conv_bn(
    channels_in: int,
    channels_out: int,
    kernel: int,
    stride: int = 1,
    *,
    groups: int = 1,
    act: nn.Module | None = None,
) -> nn.Sequential:
    """A convolution that keeps the size (up to its stride), batch norm and maybe an activation."""
    padding = kernel // 2
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), *([act] if act is not None else []))


def blocks_of(depth: int) -> int:
    """How many blocks each of the three stages has in a CIFAR network of 6n + 2 layers."""
    blocks, remainder = divmod(depth - 2, 6)
    if remainder or blocks < 1:
        raise ValueError(f"depth must be 6n + 2 with n >= 1 (20, 32, 56, 110, ...), not {depth}")
    return blocks
