"""Nodes that are one layer each, in the forms and with the weights that layers may share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forms import FUNCTIONS, MODULES
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
