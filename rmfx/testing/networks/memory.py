"""Nodes that write where nobody looks for it, and buffers that lie in the memory of others.

What a network keeps in its buffers is the same after every call, so that two runs of it agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .node import Node, Store, Tied


@torch.library.custom_op("rmfx_testing::add_into", mutates_args=("target",))
def _add_into(x: Tensor, target: Tensor) -> None:
    """Writes to its second argument, as operators of other libraries do."""
    target.add_(x)


@_add_into.register_fake
def _(x: Tensor, target: Tensor) -> None:
    """Nothing is given back."""


# Each writes to what it is given, x times or plus c or c itself.
WRITES: dict[str, Callable[[Tensor, float], object]] = {
    "torch._foreach_mul_": lambda x, c: torch._foreach_mul_([x], c),
    "torch._foreach_add_": lambda x, c: torch._foreach_add_([x], c),
    "torch.mul out": lambda x, c: torch.mul(x, c, out=x),
    "torch.add out": lambda x, c: torch.add(x, c, out=x),
    "custom operator": lambda x, c: _add_into(c * x, x),
    "packet of a custom operator": lambda x, c: torch.ops.rmfx_testing.add_into(c * x, x),
    "x.mul_": lambda x, c: x.mul_(c),
    "x.copy_": lambda x, c: x.copy_(c * x),
    "aten.mul_": lambda x, c: torch.ops.aten.mul_.Tensor(x, c),
    "nn.init.constant_": lambda x, c: nn.init.constant_(x, c),
    "nn.init.constant_ keyword": lambda x, c: nn.init.constant_(tensor=x, val=c),
    "x.__setitem__": lambda x, c: x.__setitem__((slice(None), 0), c),
}
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "first channels": lambda x: x[:, :2],
    "one channel": lambda x: x[:, :1],
    "x.narrow": lambda x: x.narrow(1, 0, 1),
    "x.transpose": lambda x: x.transpose(0, 1),
    "x.detach": lambda x: x.detach(),
    "later rows": lambda x: x[:, :, 1:],  # of a map
}
GAINS = ("view", "tied", "view of a written", "view of one written with data")


@dataclass(frozen=True, repr=False)
class Write(Node):
    """Writes into the value by a key of `WRITES`, through a key of `VIEWS`; gives the value."""

    kind: str
    view: str = ""
    value: float = 0.5

    def apply(self, x: Tensor) -> Tensor:
        WRITES[self.kind](VIEWS[self.view](x), self.value)
        return x


@dataclass(frozen=True, repr=False)
class Gain(Node):
    """A factor for every channel in a buffer that shares its memory with another buffer.

    `form` is "view" (of a larger buffer), "tied" (the larger buffer has two names), "view of a
    written" (buffer, which forward fills first) or "view of one written with data" (with the means
    of the value). `dims` counts the axes behind the channels.
    """

    channels: int
    dims: int = 2
    form: str = "view"

    def build(self, store: Store) -> nn.Module:
        return _Gain(self)


@dataclass(frozen=True, repr=False)
class SharedNorm(Node):
    """Batch norm whose statistics are views of one buffer, which forward fills where `writes`."""

    channels: int
    dims: int = 2
    writes: bool = False

    def build(self, store: Store) -> nn.Module:
        return _SharedNorm(self)


class _Gain(Tied):
    whole: Tensor
    same: Tensor

    def __init__(self, node: Gain) -> None:
        super().__init__()
        self.node = node
        self.register_buffer("whole", torch.linspace(0.5, 1.5, 2 * node.channels))
        self.register_buffer("gain", self.whole)

    def tie(self) -> None:
        channels = self.node.channels
        self.gain = self.whole[channels:].view(channels, *(1,) * self.node.dims)
        if self.node.form == "tied":
            self.register_buffer("same", self.whole)

    def forward(self, x: Tensor) -> Tensor:
        if self.node.form == "view of a written":
            self.whole.fill_(0.75)
        if self.node.form == "view of one written with data":
            axes = (0, *range(2, 2 + self.node.dims))
            self.whole[self.node.channels :].copy_(torch.tanh(x.detach().mean(axes)))
        if self.node.form == "tied":
            x = x + self.same.sum()
        return x * self.gain


class _SharedNorm(Tied):
    statistics: Tensor

    def __init__(self, node: SharedNorm) -> None:
        super().__init__()
        self.node = node
        kind: Any = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[node.dims]
        self.layer = kind(node.channels)
        self.register_buffer("statistics", torch.zeros(2 * node.channels))

    def tie(self) -> None:
        layer, channels = self.layer, self.node.channels
        self.statistics.copy_(torch.cat([layer.running_mean, layer.running_var]))
        layer.running_mean = self.statistics[:channels]
        layer.running_var = self.statistics[channels:]

    def forward(self, x: Tensor) -> Tensor:
        if self.node.writes:
            self.statistics.fill_(0.75)
        result: Tensor = self.layer(x)
        return result
