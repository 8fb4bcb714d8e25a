"""Nodes that are one layer each, and the modules that compute them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forms import ARITHMETIC, FUNCTIONS, MODULES, NO_OPS, OPAQUE
from .node import Node, Operation, Store


@dataclass(frozen=True, repr=False)
class Conv(Node):
    """A convolution; the length of `kernel` says over how many dimensions.

    `form` is "module", "functional", or either with " keyword" (arguments passed by name), or
    "standardised": the weight has its mean and variance normalised at every call.
    `shared` is "" or a key: "module:KEY" is one module called at every place that names it,
    "weight:KEY" are several modules that own the same weight.
    """

    inputs: int
    outputs: int
    kernel: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] | str = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    bias: bool = True
    padding_mode: str = "zeros"
    form: str = "module"
    shared: str = ""

    def build(self, store: Store) -> nn.Module:
        build: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(self.kernel) - 1]
        layer = build(
            self.inputs,
            self.outputs,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias,
            self.padding_mode,
        )
        return in_form(share(layer, self.shared, store), self.form)


@dataclass(frozen=True, repr=False)
class Linear(Node):
    """A linear layer over the last axis; `form` and `shared` as in `Conv`."""

    inputs: int
    outputs: int
    bias: bool = True
    form: str = "module"
    shared: str = ""

    def build(self, store: Store) -> nn.Module:
        layer = nn.Linear(self.inputs, self.outputs, self.bias)
        return in_form(share(layer, self.shared, store), self.form)


@dataclass(frozen=True, repr=False)
class Norm(Node):
    """Batch norm over axis 1 of a value with `dims` spatial dimensions; `form` as in `Conv`."""

    channels: int
    dims: int = 2
    affine: bool = True
    eps: float = 1e-5
    form: str = "module"

    def build(self, store: Store) -> nn.Module:
        build = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[self.dims]
        return in_form(build(self.channels, eps=self.eps, affine=self.affine), self.form)


@dataclass(frozen=True, repr=False)
class Act(Node):
    """A pointwise activation; `args` are the positional arguments of its module.

    Those of "prelu" are the number of channels and, if given, a number near all slopes.

    `form` is "module", "functional", "torch" (`torch.relu`) or "method", each also with
    " in-place". `shared` is "" or the key of one module that all such activations call.
    """

    kind: str
    form: str = "module"
    args: tuple[float, ...] = ()
    shared: str = ""

    def build(self, store: Store) -> nn.Module:
        way, _, in_place = self.form.partition(" ")
        if self.kind == "prelu":
            channels = int(self.args[0]) if self.args else 1
            prelu: Any = nn.PReLU(channels)
            if len(self.args) > 1:
                prelu.around = self.args[1]
            return in_form(share(prelu, self.shared, store), way)
        if way != "module":
            return Operation(self)
        keywords = {"inplace": True} if in_place else {}
        return share(MODULES[self.kind](*self.args, **keywords), self.shared, store)

    def apply(self, x: Tensor) -> Tensor:
        way, _, in_place = self.form.partition(" ")
        name = self.kind + ("_" if in_place else "")
        if way == "method":
            return getattr(x, name)(*self.args)  # type: ignore[no-any-return]
        if way == "torch":
            return getattr(torch, name)(x, *self.args)  # type: ignore[no-any-return]
        keywords = {"inplace": True} if in_place else {}
        return FUNCTIONS[self.kind](x, *self.args, **keywords)


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
        return TensorArithmetic(self) if self.shape else Operation(self)

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


class TensorArithmetic(nn.Module):
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


class _Functional(nn.Module):
    """Calls the functional form of the layer it holds, with arguments by place or by name."""

    def __init__(self, layer: nn.Module, *, keyword: bool) -> None:
        super().__init__()
        self.layer = layer
        self.keyword = keyword

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        names = {"weight": layer.weight, "bias": getattr(layer, "bias", None)}
        if isinstance(layer, nn.PReLU):
            return F.prelu(x, layer.weight)
        if isinstance(layer, nn.Linear):
            return F.linear(x, **names) if self.keyword else F.linear(x, *names.values())
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            statistics = (layer.running_mean, layer.running_var)
            if self.keyword:
                return F.batch_norm(x, *statistics, **names, training=False, eps=layer.eps)
            return F.batch_norm(x, *statistics, layer.weight, layer.bias, False, 0.1, layer.eps)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(layer.kernel_size) - 1]
        geometry = {
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
            "groups": layer.groups,
        }
        if self.keyword:
            return convolve(input=x, **names, **geometry)
        return convolve(x, *names.values(), *geometry.values())


class _Standardised(nn.Module):
    """Calls the convolution it holds with its weight standardised, filter by filter."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[len(layer.kernel_size) - 1]
        weight = layer.weight
        dims = tuple(range(1, 2 + len(layer.kernel_size)))
        centred = weight - weight.mean(dims, keepdim=True)
        # The scale is that of weights that keep the scale of what passes.
        fan_in = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
        spread = torch.sqrt(fan_in * (centred * centred).mean(dims, keepdim=True) + 1e-5)
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        result: Tensor = convolve(x, centred / spread, layer.bias, *geometry)
        return result


class _Keyword(nn.Module):
    """Calls the module it holds with its argument by name."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=x)  # type: ignore[no-any-return]


def in_form(layer: nn.Module, form: str) -> nn.Module:
    """The layer, called as `form` says."""
    way, _, keyword = form.partition(" ")
    if way == "standardised":
        return _Standardised(layer)
    if way == "functional":
        return _Functional(layer, keyword=bool(keyword))
    return _Keyword(layer) if keyword else layer


def share(layer: nn.Module, shared: str, store: Store) -> nn.Module:
    """The layer, or the one already stored under the key, or the layer with the stored weight."""
    if shared.startswith("module:"):
        return store.setdefault(shared, layer)  # type: ignore[no-any-return]
    if shared.startswith("weight:"):
        layer.weight = store.setdefault(shared, layer.weight)
    return layer
