"""What the reference models are built of."""

from __future__ import annotations

from torch import nn


def conv_bn(
    channels_in: int, channels_out: int, kernel: int, stride: int = 1, *, act: nn.Module
) -> nn.Sequential:
    """A convolution that keeps the size (up to its stride), batch norm and an activation."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(channels_out),
        act,
    )
