"""Further nodes of a `NetworkSpec`: what newer networks are made of besides layers and sums."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .node import Node, Operation, Store


@dataclass(frozen=True, repr=False)
class Deconv(Node):
    """A transposed convolution; `form` is "module" or "functional"."""

    inputs: int
    outputs: int
    kernel: tuple[int, ...]
    stride: int = 1
    padding: int | tuple[int, ...] = 0
    output_padding: int | tuple[int, ...] = 0
    groups: int = 1
    bias: bool = True
    form: str = "module"

    def build(self, store: Store) -> nn.Module:
        kind: Any = getattr(nn, f"ConvTranspose{len(self.kernel)}d")
        layer: nn.Module = kind(
            self.inputs,
            self.outputs,
            self.kernel,
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            self.bias,
        )
        return layer if self.form == "module" else _Deconv(layer)


@dataclass(frozen=True, repr=False)
class Blur(Node):
    """A fixed depthwise convolution with binomial weights, behind padding of the given mode.

    The padding keeps the size at a stride of 1; for an even kernel it is one wider behind.
    """

    channels: int
    dims: int = 2
    kernel: int = 3
    stride: int = 1
    padding_mode: str = "reflect"

    def build(self, store: Store) -> nn.Module:
        return _Blur(self)


@dataclass(frozen=True, repr=False)
class Shuffle(Node):
    """Channel shuffle: "reshape", "flatten", "function" or "module"."""

    groups: int
    dims: int = 2
    form: str = "reshape"

    def build(self, store: Store) -> nn.Module:
        return nn.ChannelShuffle(self.groups) if self.form == "module" else Operation(self)

    def apply(self, x: Tensor) -> Tensor:
        if self.form == "function":
            return F.channel_shuffle(x, self.groups)
        shape = x.shape  # of a proxy it is one, too, which gives its items by index only
        sizes = [shape[2 + i] for i in range(self.dims)]
        grouped = x.reshape(shape[0], self.groups, shape[1] // self.groups, *sizes)
        swapped = grouped.transpose(1, 2)
        return swapped.flatten(1, 2) if self.form == "flatten" else swapped.reshape(shape)


@dataclass(frozen=True, repr=False)
class Transpose(Node):
    """The two axes of tokens change places: "transpose" or "permute"."""

    form: str = "transpose"

    def apply(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2) if self.form == "transpose" else x.permute(0, 2, 1)


class _Deconv(nn.Module):
    """The functional form of the layer it holds."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        convolve: Any = getattr(F, f"conv_transpose{len(layer.kernel_size)}d")
        geometry = (layer.stride, layer.padding, layer.output_padding, layer.groups)
        result: Tensor = convolve(x, layer.weight, layer.bias, *geometry)
        return result


class _Blur(nn.Module):
    """Padding, and a depthwise convolution whose weight is a buffer."""

    weight: Tensor

    def __init__(self, node: Blur) -> None:
        super().__init__()
        self.node = node
        row = torch.tensor([math.comb(node.kernel - 1, i) for i in range(node.kernel)])
        window = torch.ones(())
        for _ in range(node.dims):
            window = window[..., None] * row / row.sum()
        self.register_buffer("weight", window.repeat(node.channels, 1, *(1,) * node.dims))

    def forward(self, x: Tensor) -> Tensor:
        node = self.node
        before = (node.kernel - 1) // 2
        mode = "constant" if node.padding_mode == "zeros" else node.padding_mode
        padded = F.pad(x, (before, node.kernel - 1 - before) * node.dims, mode)
        convolve: Any = getattr(F, f"conv{node.dims}d")
        result: Tensor = convolve(padded, self.weight, stride=node.stride, groups=node.channels)
        return result
