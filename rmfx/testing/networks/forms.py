"""The tables that say in which forms each kind of node may be written."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# the forms of `JOINS` that write into a
INTO_A = ("a += b", "a += b", "a.add_(b)", "a -= b", "a.add_(b, alpha=c)")
PRODUCTS = ("a * b", "torch.mul(a, b)")  # the forms of `JOINS` that are gates
_iadd: Callable[[Any, Any], Any] = operator.iadd
_isub: Callable[[Any, Any], Any] = operator.isub
_imul: Callable[[Any, Any], Any] = operator.imul
MODULES: dict[str, Callable[..., nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "rrelu": nn.RReLU,
    "relu6": nn.ReLU6,
    "hardtanh": nn.Hardtanh,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": functools.partial(nn.GELU, "tanh"),
    "elu": nn.ELU,
    "celu": nn.CELU,
    "selu": nn.SELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
    "softplus": nn.Softplus,
    "mish": nn.Mish,
    "threshold": nn.Threshold,
}
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    **{kind: getattr(F, kind) for kind in MODULES if kind != "gelu_tanh"},
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "clamp": torch.clamp,
    **{kind: getattr(torch, kind) for kind in ("abs", "sin", "erf")},
}
WITHOUT_MODULE = tuple(kind for kind in FUNCTIONS if kind not in MODULES)
METHODS = ("relu", "tanh", "sigmoid", *WITHOUT_MODULE)  # kinds that are also methods of a tensor
IN_PLACE = ("relu", "leaky_relu", "rrelu", "relu6", "hardtanh", "silu", "elu", "mish", "hardswish")
NO_OPS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "dropout": nn.Dropout,
    "dropout2d": nn.Dropout2d,
    "alpha_dropout": nn.AlphaDropout,
    "in-place dropout": functools.partial(nn.Dropout, inplace=True),
}
JOINS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "a + b": lambda a, b, c: a + b,
    "b + a": lambda a, b, c: b + a,
    "a += b": lambda a, b, c: _iadd(a, b),
    "b += a": lambda a, b, c: _iadd(b, a),
    "torch.add(a, b)": lambda a, b, c: torch.add(a, b),
    "a.add(b)": lambda a, b, c: a.add(b),
    "a.add_(b)": lambda a, b, c: a.add_(b),
    "a - b": lambda a, b, c: a - b,
    "b - a": lambda a, b, c: b - a,
    "a -= b": lambda a, b, c: _isub(a, b),
    "a + c * b": lambda a, b, c: a + c * b,
    "c * a + b": lambda a, b, c: c * a + b,
    "torch.add(a, b, alpha=c)": lambda a, b, c: torch.add(a, b, alpha=c),
    "torch.sub(a, b, alpha=c)": lambda a, b, c: torch.sub(a, b, alpha=c),
    "a.add_(b, alpha=c)": lambda a, b, c: a.add_(b, alpha=c),
    "torch.add(input=a, other=b)": lambda a, b, c: torch.add(input=a, other=b),
    "sum([a, b])": lambda a, b, c: 0 + a + b,  # what sum() does
    "torch.stack([a, b]).sum(0)": lambda a, b, c: torch.stack([a, b]).sum(0),
    "a * b": lambda a, b, c: a * b,
    "torch.mul(a, b)": lambda a, b, c: torch.mul(a, b),
    "torch.maximum(a, b)": lambda a, b, c: torch.maximum(a, b),
    "torch.minimum(a, b)": lambda a, b, c: torch.minimum(a, b),
    "torch.where(a > 0.1, a, b)": lambda a, b, c: torch.where(a > 0.1, a, b),
    "a / (1 + b * b)": lambda a, b, c: a / (1 + b * b),
    "torch.cat([a, b], 1)": lambda a, b, c: torch.cat([a, b], 1),
}
ARITHMETIC: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "c * x": lambda x, c: c * x,
    "x * c": lambda x, c: x * c,
    "x / c": lambda x, c: x / c,
    "-x": lambda x, c: -x,
    "x *= c": lambda x, c: _imul(x, c),
    "x + c": lambda x, c: x + c,
    "c + x": lambda x, c: c + x,
    "x - c": lambda x, c: x - c,
    "c - x": lambda x, c: c - x,
    "x += c": lambda x, c: _iadd(x, c),
    "x * p": lambda x, p: x * p,
    "x + p": lambda x, p: x + p,
    "p - x": lambda x, p: p - x,
    "x + b": lambda x, b: x + b,
}
OPAQUE: dict[str, Callable[[Tensor, int], Tensor]] = {
    "softmax": lambda x, dims: F.softmax(x, 1),
    "layer norm": lambda x, dims: F.group_norm(x, 1),
    "normalize": lambda x, dims: F.normalize(x, dim=1),
    "view": lambda x, dims: x.reshape(x.shape[0], -1).reshape(x.shape),
    "flip": lambda x, dims: x.flip(1),
    "roll": lambda x, dims: torch.roll(x, 1, 1),
    "cumsum": lambda x, dims: x.cumsum(1),
    "centre": lambda x, dims: x - x.mean(1, keepdim=True),  # an add that broadcasts
    "absolute": lambda x, dims: torch.abs(x),
    "gate": lambda x, dims: x * torch.sigmoid(x),
    # The rest needs spatial dimensions.
    "max pool": lambda x, dims: getattr(F, f"max_pool{dims}d")(x, 3, 1, 1),
    "interpolate": lambda x, dims: F.interpolate(
        x, scale_factor=2.0, mode=("linear", "bilinear", "trilinear")[dims - 1]
    )[(slice(None), slice(None)) + (slice(None, None, 2),) * dims],
}
OPAQUE_ANYWHERE = tuple(OPAQUE)[:-2]
