"""Draws of layers: convolutions and linear layers, batch norms, activations."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from rmfx.testing.networks.digits import BOUNDS
from rmfx.testing.networks.forms import FUNCTIONS, IN_PLACE, METHODS, WITHOUT_MODULE
from rmfx.testing.networks.layers import Act, Conv, Linear, Norm

from .draws import Draws
from .values import INPUT, Path, Value, collapse, out


class Window(NamedTuple):
    """What a convolution does along one axis."""

    kernel: int
    stride: int
    padding: int | str
    dilation: int


# How a convolution treats the size of its value; the simplest first.
_STYLES: dict[str, tuple[Window, ...]] = {
    style: tuple(Window(*numbers) for numbers in windows)
    for style, windows in {
        "point": ((1, 1, 0, 1),),
        "keep": (
            *((3, 1, 1, 1), (1, 1, 0, 1), (5, 1, 2, 1), (3, 1, 2, 2)),
            *((3, 1, "same", 1), (2, 1, "same", 1), (3, 1, "same", 2), (4, 1, "same", 1)),
        ),
        "preserve": ((3, 1, 1, 1), (1, 1, 0, 1), (3, 1, "same", 1)),  # at any size
        "valid": ((3, 1, 0, 1), (2, 1, 0, 1), (3, 1, 0, 2), (3, 1, "valid", 1)),
        "stride": (
            *((3, 2, 1, 1), (1, 2, 0, 1), (2, 2, 0, 1), (3, 2, 0, 1)),
            *((2, 2, 1, 1), (5, 2, 2, 1), (3, 2, 2, 2), (3, 3, 1, 1)),
        ),
        "grow": ((2, 1, 1, 1), (3, 1, 2, 1), (1, 1, 1, 1), (4, 1, 2, 1)),
    }.items()
}
Arguments = dict[str, tuple[tuple[float, ...], ...]]  # of an `Act`, by its kind
_PADDING_MODES = ("reflect", "replicate", "circular")
_ACTIVATIONS = ("relu", "leaky_relu", "prelu", "rrelu", "relu6", "hardtanh", "clamp")
_RARE_ACTIVATIONS = tuple(k for k in FUNCTIONS if k not in ("relu", "leaky_relu", "rrelu", "relu6"))
_ARGUMENTS: Arguments = {
    "leaky_relu": ((), (0.1,), (-0.5,), (1.5,)),
    "rrelu": ((), (0.2, 0.8)),
    "hardtanh": ((), (-0.5, 2.0), (0.0, 6.0), (1.0, 3.0)),
    "clamp": ((0.0,), (0.0, 6.0), (-1.0, 2.0)),
    "threshold": ((0.0, 0.0), (0.5, -1.0)),
    "softplus": ((), (2.0, 5.0)),
    "elu": ((), (0.5,)),
    "celu": ((), (0.5,)),
}


def layer(sampler: Draws, path: Path, outputs: int | None = None, style: str = "keep") -> None:
    """Affine, batch norm, activation: each of the last two only perhaps."""
    affine(sampler, path, outputs, style)
    if sampler.norms and not sampler.one_in(5):
        norm(sampler, path)
    if not sampler.one_in(4):
        act(sampler, path)


def some_width(sampler: Draws, value: Value) -> int:
    """A number of channels for a layer that reads the value."""
    return int(sampler.pick((value.channels,) * 5 + (1, 2, 3, 4, 6)))


def some_style(sampler: Draws) -> str:
    """How a branch treats the size of its value."""
    return str(sampler.pick(("keep",) * 5 + ("stride", "valid", "grow")))


# Affine layers
def affine(
    sampler: Draws,
    path: Path,
    outputs: int | None = None,
    style: str = "keep",
    groups: str = "one",
) -> None:
    """A convolution, or a linear layer where there is no space."""
    value = path.value
    outputs = value.channels if outputs is None else outputs
    forms = ("functional", "functional keyword") if sampler.functional else ("module",)
    form = "module keyword" if sampler.one_in(25) else sampler.pick(forms)
    bias = not sampler.one_in(3)
    if not value.is_map:
        shape = (*value.shape[:-1], outputs)
        sampler.put(path, Linear(value.channels, outputs, bias, form), shape)
        return
    windows = _windows(sampler, value, style)
    kernel, stride, padding, dilation = zip(*windows, strict=True)
    of_groups = count_groups(sampler, value.channels, outputs, groups)
    mode = "zeros"
    if form.startswith("module") and _may_wrap(sampler, value, style, padding):
        mode = sampler.pick(_PADDING_MODES)
    # One weight for each filter would be its own mean.
    elif value.channels // of_groups * math.prod(kernel) > 1 and sampler.one_in(25):
        form = "standardised"
    node = Conv(
        value.channels,
        outputs,
        kernel,
        collapse(stride),
        padding[0] if isinstance(padding[0], str) else collapse(padding),
        collapse(dilation),
        of_groups,
        bias,
        mode,
        form,
    )
    size = [out(n, *window) for n, window in zip(value.size, windows, strict=True)]
    sampler.put(path, node, (outputs, *size))


def _may_wrap(sampler: Draws, value: Value, style: str, padding: Sequence[int | str]) -> bool:
    """Whether this convolution gets another padding than zeros, now and then."""
    widest = max((n for n in padding if isinstance(n, int)), default=0)
    keeps = style in ("keep", "preserve") and 0 < widest < min(value.size)
    return keeps and sampler.one_in(20)


def _windows(sampler: Draws, value: Value, style: str) -> list[Window]:
    """One for every axis."""
    chosen = [sampler.pick(_fitting(value.size, style))] * value.dims
    if value.dims > 1 and not isinstance(chosen[0].padding, str) and sampler.one_in(6):
        chosen[sampler.random.randrange(value.dims)] = _STYLES["point"][0]
    return chosen


@functools.cache
def _fitting(size: tuple[int, ...], style: str) -> tuple[Window, ...]:
    """The windows of a style; pointwise where none fits."""
    fits = (w for w in _STYLES[style] if all(out(n, *w) >= 1 for n in size))
    return tuple(fits) or _STYLES["point"]


def count_groups(sampler: Draws, inputs: int, outputs: int, groups: str) -> int:
    """How many groups a convolution has: "one", "grouped" or "depthwise" where that is possible."""
    if groups == "depthwise" and outputs % inputs == 0:
        return inputs
    common = math.gcd(inputs, outputs)
    divisors = [g for g in range(2, common + 1) if common % g == 0]
    return int(sampler.pick(divisors)) if groups == "grouped" and divisors else 1


def repeat(sampler: Draws, path: Path) -> None:
    """A layer at two call sites, or two layers with one weight, here or across the network."""
    value = path.value
    known = [n for n in sampler.layers if n.inputs == value.channels and _takes(n, value)]
    if known and sampler.one_in(2):
        sampler.put(path, sampler.pick(known))
        return
    affine(sampler, path, style="preserve")
    kind = "weight:" if sampler.one_in(2) else "module:"
    drawn: Any = path.nodes[-1]
    node = replace(drawn, shared=sampler.name(kind))
    path.nodes[-1] = node
    sampler.layers.append(node)
    if not sampler.one_in(3):
        act(sampler, path)
    sampler.put(path, node)


def _takes(node: Conv | Linear, value: Value) -> bool:
    """Whether a layer is for values of so many dimensions."""
    dims = len(node.kernel) if isinstance(node, Conv) else 0
    return dims == (value.dims if value.is_map else 0)


# Batch norms and activations
def norm(sampler: Draws, path: Path) -> None:
    """Batch norm over axis 1 (for tokens that is their position, not their features)."""
    value = path.value
    form = sampler.form + (" keyword" if sampler.one_in(20) else "")
    eps = sampler.pick((1e-5, 1e-5, 1e-3))
    sampler.put(path, Norm(value.shape[0], value.dims, not sampler.one_in(8), eps, form))


def perhaps_norm(sampler: Draws, path: Path) -> None:
    """Batch norm, in a network that has them."""
    if sampler.norms:
        norm(sampler, path)


def act(sampler: Draws, path: Path) -> None:
    """An activation: mostly the network's own kind, sometimes any."""
    kind = sampler.activation
    if sampler.one_in(3):
        kind = sampler.pick(_RARE_ACTIVATIONS if sampler.one_in(3) else _ACTIVATIONS)
    form = sampler.pick(_forms(sampler, kind, path.value))
    node = Act(kind, form, act_args(sampler, kind, path.value))
    if sampler.shares_activations and form.startswith("module") and not node.args:
        node = replace(node, shared=f"module:{kind}{form[6:]}")
    sampler.put(path, node, alias="in-place" in form)


def _forms(sampler: Draws, kind: str, value: Value) -> list[str]:
    """The ways to write an activation of a value, which is written into unless it is an input."""
    forms = ["module", "functional"]
    if kind in METHODS:
        forms = ["method", "torch"] + (forms if kind not in WITHOUT_MODULE else [])
    if value.storage != INPUT:
        of_tensors = ("method", "torch")
        forms += [f"{form} in-place" for form in forms if form in of_tensors or kind in IN_PLACE]
    if sampler.functional:
        forms.reverse()
    return forms


def act_args(sampler: Draws, kind: str, value: Value) -> tuple[float, ...]:
    """The arguments of an `Act`."""
    options = _ARGUMENTS.get(kind, ((),))
    if kind == "prelu":
        options = ((), (value.shape[0],))
    if sampler.is_awkward:
        options = _awkward_arguments(sampler, value.shape[0]).get(kind, options)
    return tuple(sampler.pick(options))


def _awkward_arguments(sampler: Draws, channels: int) -> Arguments:
    return {
        "leaky_relu": tuple((slope,) for slope in sampler.slopes),
        "prelu": tuple((channels, slope) for slope in sampler.slopes),
        "hardtanh": BOUNDS,
    }
