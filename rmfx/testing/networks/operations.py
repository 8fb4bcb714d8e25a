"""Nodes that are one operation each, without trained weights: cuts, padding, pools, constants."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forms import ARITHMETIC, NO_OPS, OPAQUE
from .node import Node, Operation, Store


@dataclass(frozen=True, repr=False)
class Drop(Node):
    """What does nothing at inference: dropout, identity, a copy, another memory format."""

    kind: str

    def build(self, store: Store) -> nn.Module:
        return NO_OPS[self.kind]() if self.kind in NO_OPS else Operation(self)

    def apply(self, x: Tensor) -> Tensor:
        if self.kind == "functional dropout":
            return F.dropout(x, 0.3, training=False)
        if self.kind == "channels_last":
            return x.to(memory_format=torch.channels_last)
        return getattr(x, self.kind)()  # type: ignore[no-any-return]


@dataclass(frozen=True, repr=False)
class Slice(Node):
    """Part of every spatial axis: `starts` and `ends` elements are left out, then every `step`-th.

    `form` "index" writes `x[:, :, 1:-1, 1:-1]` or `x[:, :, ::2, ::2]`; "pad" is `F.pad` with
    negative amounts, for a step of 1.
    """

    starts: tuple[int, ...]
    ends: tuple[int, ...]
    step: int = 1
    form: str = "index"

    def apply(self, x: Tensor) -> Tensor:
        if self.form == "pad":
            pairs = list(zip(self.starts, self.ends, strict=True))
            return F.pad(x, [-amount for pair in reversed(pairs) for amount in pair])
        step = self.step if self.step > 1 else None
        spatial = [
            slice(start or None, -end if end else None, step)
            for start, end in zip(self.starts, self.ends, strict=True)
        ]
        return x[(slice(None), slice(None), *spatial)]


@dataclass(frozen=True, repr=False)
class Channels(Node):
    """Channels `start` to `stop` of axis 1 (or of the last axis, for `axis=-1`)."""

    start: int
    stop: int
    axis: int = 1

    def apply(self, x: Tensor) -> Tensor:
        if self.axis == -1:
            return x[..., self.start : self.stop]
        return x[:, self.start : self.stop]


@dataclass(frozen=True, repr=False)
class PadChannels(Node):
    """Zero channels before and after those there are (option A of the CIFAR ResNets).

    `dims` counts the axes after the padded one; `form` is "pad" or "cat".
    """

    before: int
    after: int
    dims: int = 2
    form: str = "pad"

    def apply(self, x: Tensor) -> Tensor:
        if self.form == "cat":  # before = 0 and after = all channels: [x; 0 * x]
            return torch.cat((x, torch.zeros_like(x)), 1)
        return F.pad(x, (0, 0) * self.dims + (self.before, self.after))


@dataclass(frozen=True, repr=False)
class Pad(Node):
    """Spatial padding by a layer of its own: one (before, after) pair for every axis.

    `mode` is that of `F.pad`; `value` is for "constant".
    """

    amounts: tuple[tuple[int, int], ...]
    value: float = 0.0
    mode: str = "constant"

    def apply(self, x: Tensor) -> Tensor:
        flat = [amount for pair in reversed(self.amounts) for amount in pair]
        return F.pad(x, flat, self.mode, self.value if self.mode == "constant" else None)


@dataclass(frozen=True, repr=False)
class Pool(Node):
    """Pooling over `dims` dimensions: "avg", "max", "global avg", "global max" or "mean"."""

    kind: str
    dims: int
    kernel: int = 2
    stride: int = 2
    padding: int = 0
    ceil_mode: bool = False
    count_include_pad: bool = True
    form: str = "module"

    def build(self, store: Store) -> nn.Module:
        if self.form == "functional" or self.kind == "mean":
            return Operation(self)
        if self.kind.startswith("global"):
            kind = "Avg" if self.kind == "global avg" else "Max"
            return getattr(nn, f"Adaptive{kind}Pool{self.dims}d")(1)  # type: ignore[no-any-return]
        window = (self.kernel, self.stride, self.padding)
        if self.kind == "max":
            build = getattr(nn, f"MaxPool{self.dims}d")
            return build(*window, ceil_mode=self.ceil_mode)  # type: ignore[no-any-return]
        build = getattr(nn, f"AvgPool{self.dims}d")
        return build(*window, self.ceil_mode, self.count_include_pad)  # type: ignore[no-any-return]

    def apply(self, x: Tensor) -> Tensor:
        if self.kind == "mean":
            return x.mean(tuple(range(2, 2 + self.dims)), keepdim=True)
        if self.kind.startswith("global"):
            kind = "avg" if self.kind == "global avg" else "max"
            pool = getattr(F, f"adaptive_{kind}_pool{self.dims}d")
            return pool(x, 1)  # type: ignore[no-any-return]
        pool = getattr(F, f"{self.kind}_pool{self.dims}d")
        window = (self.kernel, self.stride, self.padding)
        if self.kind == "max":
            return pool(x, *window, ceil_mode=self.ceil_mode)  # type: ignore[no-any-return]
        return pool(x, *window, self.ceil_mode, self.count_include_pad)  # type: ignore[no-any-return]


@dataclass(frozen=True, repr=False)
class Arithmetic(Node):
    """A value joined with a constant: one of `ARITHMETIC`, where c is `value`.

    In the forms with p, p is a parameter (b: a buffer) of shape `shape`, to be broadcast.
    """

    form: str
    value: float = 0.5
    shape: tuple[int, ...] = ()

    def build(self, store: Store) -> nn.Module:
        return _TensorArithmetic(self) if self.shape else Operation(self)

    def apply(self, x: Tensor) -> Tensor:
        return ARITHMETIC[self.form](x, self.value)


@dataclass(frozen=True, repr=False)
class Opaque(Node):
    """What no residual removal sees through; keeps the shape (kinds: the keys of `OPAQUE`)."""

    kind: str
    dims: int = 2

    def apply(self, x: Tensor) -> Tensor:
        return OPAQUE[self.kind](x, self.dims)


@dataclass(frozen=True, repr=False)
class Flatten(Node):
    """Everything but the batch into one axis: "module", "function", "method" or "reshape"."""

    form: str = "module"

    def build(self, store: Store) -> nn.Module:
        return nn.Flatten() if self.form == "module" else Operation(self)

    def apply(self, x: Tensor) -> Tensor:
        if self.form == "function":
            return torch.flatten(x, 1)
        return x.flatten(1) if self.form == "method" else x.reshape(x.shape[0], -1)


class _TensorArithmetic(nn.Module):
    """Arithmetic with a parameter (p) or a buffer (b)."""

    def __init__(self, node: Arithmetic) -> None:
        super().__init__()
        self.form = node.form
        constant = node.value * torch.linspace(0.5, 1.5, math.prod(node.shape)).view(node.shape)
        if "p" in node.form:
            self.constant: Tensor = nn.Parameter(constant)
        else:
            self.register_buffer("constant", constant)

    def forward(self, x: Tensor) -> Tensor:
        return ARITHMETIC[self.form](x, self.constant)
