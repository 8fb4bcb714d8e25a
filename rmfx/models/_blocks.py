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
