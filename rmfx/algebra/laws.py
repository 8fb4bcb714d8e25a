"""The algebra of linear layers side by side: Δ (duplicate), ⊕ (direct sum) and ∇ (add).

Laws (each has a property test):
    stack(f, g)(x)           = [f(x); g(x)]             = (f ⊕ g) ∘ Δ
    join(f, g)([x; y])       = f(x) + g(y)              = ∇ ∘ (f ⊕ g)
    direct_sum(f, g)([x; y]) = [f(x); g(y)]
    plus(f, g)(x)            = f(x) + g(x)              = ∇ ∘ (f ⊕ g) ∘ Δ
Δ and ∇ are merged by writing weight blocks side by side, never by multiplying with [I; I].

Order. In r *runs* the channels of f and g take turns: r times [a share of f, a share of g]; one run
is [f; g]. A layer of G groups reads and writes every number of runs that is a multiple of G, if G
divides the groups of f and of g: each group then holds a share of both. A direct sum can also keep
every group of f and of g to itself, where these are of one shape; then it writes the runs that it
reads, if r divides both numbers of groups.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rmfx.errors import Refusal

from .affine import AffineConv, Ints, at, device_of, grouped


def stack(*layers: AffineConv, groups: int = 1, runs: int = 1) -> AffineConv | Refusal:
    """x ↦ [f(x); g(x); …], outputs one below the other, or in `runs`."""
    return _together(layers, groups, (groups, runs), shares_input=True)


def join(*layers: AffineConv, groups: int = 1, runs: int = 1) -> AffineConv | Refusal:
    """[x; y; …] ↦ f(x) + g(y) + …, inputs one below the other, or in `runs`."""
    return _together(layers, groups, (runs, 1), shares_output=True)


def spread(
    *layers: AffineConv, groups: int = 1, runs: tuple[int, int] = (1, 1)
) -> AffineConv | Refusal:
    """[x; y; …] ↦ [f(x); g(y); …], a share of each in every group; runs: before and behind."""
    return _together(layers, groups, runs)


def direct_sum(*layers: AffineConv, runs: int = 1) -> AffineConv | Refusal:
    """[x; y; …] ↦ [f(x); g(y); …], as a grouped layer where the groups fit, else dense."""
    counts = groups_side_by_side(layers)
    if counts is None:
        return _together(layers, 1, (runs, runs))
    window = window_of(layers)
    if isinstance(window, Refusal):
        return window
    total, first = sum(counts), layers[0]
    n_in, n_out = (n * first.groups // counts[0] for n in first.block)
    like = _like(layers)
    weight = like.new_zeros(runs, total // runs, n_out, n_in, *window.kernel)
    bias = like.new_zeros(runs, total // runs * n_out)
    start = 0
    for f, count in zip(layers, counts, strict=True):
        end = start + count // runs
        _write(weight[:, start:end][window.taps_of(f)], f, f.groups // count)
        bias[:, start * n_out : end * n_out] = f.bias.reshape(runs, -1)
        start = end
    whole = window.around(first)
    return replace(whole, weight=weight.flatten(0, 2), bias=bias.flatten(), groups=total)


def groups_side_by_side(layers: Sequence[AffineConv]) -> list[int] | None:
    """The most groups that each layer can have so that all groups are of one shape, if any."""
    block = common_block([f.block for f in layers])
    if block is None or any(f.groups % (block[0] // f.block[0]) for f in layers):
        return None
    return [f.in_channels // block[0] for f in layers]


def in_turn(parts: Sequence[Tensor], runs: int) -> Tensor:
    """Tensors put together along their first dimension, taking turns in so many runs."""
    if runs == 1:
        return torch.cat(list(parts))
    return torch.cat([grouped(part, 0, runs) for part in parts], 1).flatten(0, 1)


def plus(*layers: AffineConv) -> AffineConv | Refusal:
    """x ↦ f(x) + g(x) + …"""
    same = common_window(layers)
    if isinstance(same, Refusal):
        return same
    groups = math.gcd(*(f.groups for f in same))
    parts = [f.regroup(groups).in_float64() for f in same]
    weight = torch.stack([f.weight for f in parts]).sum(0)
    bias = torch.stack([f.bias for f in parts]).sum(0)
    return replace(parts[0], weight=weight, bias=bias)


def common_block(blocks: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """The smallest group shape (in, out) that is a multiple of every one of `blocks`, if any."""
    n_in = math.lcm(*(b[0] for b in blocks))
    n_out = {b[1] * (n_in // b[0]) for b in blocks}
    return (n_in, n_out.pop()) if len(n_out) == 1 else None


def common_window(layers: Sequence[AffineConv]) -> list[AffineConv] | Refusal:
    """The layers with equal kernel, dilation and padding; strides and output sizes must agree."""
    window = window_of(layers)
    return window if isinstance(window, Refusal) else [f.in_window(*window) for f in layers]


class Window(NamedTuple):
    """Where several layers read."""

    left: Ints
    dilation: Ints
    kernel: Ints

    def taps_of(self, f: AffineConv) -> Any:
        """An index of one layer's taps among those of the window."""
        slices = []
        for own, new, d, step, k in zip(
            f.left, self.left, f.dilation, self.dilation, f.kernel, strict=True
        ):
            start = (new - own) // step
            slices.append(slice(start, start + d * (k - 1) // step + 1, max(d // step, 1)))
        return at(slices)

    def around(self, f: AffineConv) -> AffineConv:
        """A layer that reads here, as far as anything but its weights goes."""
        return replace(f, padding=f.padding_in(*self), dilation=self.dilation)


def window_of(layers: Sequence[AffineConv]) -> Window | Refusal:
    """The smallest window whose taps include those of every layer."""
    first = layers[0]
    for f in layers[1:]:
        if f.dims != first.dims:
            return Refusal(f"layers of {first.dims} and {f.dims} spatial dimensions do not combine")
        if f.stride != first.stride:
            return Refusal(f"strides differ: {first.stride} and {f.stride}")
        if f.growth != first.growth:
            return Refusal("the output sizes agree for some input sizes only")
    left, dilation, kernel = [], [], []
    for i in range(first.dims):
        begin = max(f.padding[i][0] for f in layers)
        end = max(f.span[i] - f.padding[i][0] for f in layers)
        steps = [f.dilation[i] for f in layers if f.kernel[i] > 1]
        step = math.gcd(*steps, *(begin - f.padding[i][0] for f in layers)) or 1
        left.append(begin)
        dilation.append(step)
        kernel.append((begin + end) // step + 1)
    return Window(tuple(left), tuple(dilation), tuple(kernel))


def _together(
    layers: Sequence[AffineConv],
    groups: int,
    runs: tuple[int, int],
    *,
    shares_input: bool = False,
    shares_output: bool = False,
) -> AffineConv | Refusal:
    """One layer of so many groups, the weights of each written to their place.

    Args:
        runs: of inputs and outputs.
        shares_input, shares_output: whether all layers read, or give, the same channels; biases of
            those that do are added.
    """
    window = window_of(layers)
    if isinstance(window, Refusal):
        return window
    first, (before, behind) = layers[0], runs
    outs = [f.out_channels // behind for f in layers]  # in a run
    ins = [f.in_channels // before for f in layers]
    n_out, n_in = outs[0] if shares_output else sum(outs), ins[0] if shares_input else sum(ins)
    like = _like(layers)
    weight = like.new_zeros(behind, n_out, before // groups, n_in, *window.kernel)
    bias = like.new_zeros(behind, n_out)
    row = column = 0
    for f, height, width in zip(layers, outs, ins, strict=True):
        place = weight[:, row : row + height, :, column : column + width][window.taps_of(f)]
        if f.groups == groups:
            place.copy_(f.weight.reshape(place.shape))
        elif behind == before == groups:
            _write(place.select(2, 0).unsqueeze(1), f, f.groups // groups)
        else:
            place.copy_(f.regroup(groups).weight.reshape(place.shape))
        bias[:, row : row + height] += f.bias.reshape(behind, height).to(bias)
        row += 0 if shares_output else height
        column += 0 if shares_input else width
    weight = weight.reshape(behind * n_out, before // groups * n_in, *window.kernel)
    return replace(window.around(first), weight=weight, bias=bias.flatten(), groups=groups)


def _write(place: Tensor, f: AffineConv, per: int) -> None:
    """Write a layer's weights to groups that hold `per` of its own each, on their diagonals.

    Args:
        place: shape (runs, groups in a run, out, in, *kernel).
    """
    blocks = f.weight.reshape(*place.shape[:2], per, *reversed(f.block), *f.kernel)
    if per == 1:
        place.copy_(blocks.squeeze(2))
        return
    by_group = place.unflatten(2, (per, -1)).unflatten(4, (per, -1))
    by_group.diagonal(dim1=2, dim2=4).copy_(blocks.movedim(2, -1))


def _like(layers: Sequence[AffineConv]) -> Tensor:
    """A tensor of the device of some layers, in the smallest type that holds all their numbers."""
    dtype = layers[0].weight.dtype
    for tensor in itertools.chain(*((f.weight, f.bias) for f in layers)):
        dtype = torch.promote_types(dtype, tensor.dtype)
    if sum(f.has_bias for f in layers) > 1:  # biases may be added
        dtype = torch.float64
    return torch.empty(0, dtype=dtype, device=device_of(layers))


def reads_inside(layer: AffineConv) -> bool:
    """Whether a layer of one tap never reads its zero padding, whatever the input size."""
    return layer.is_pointwise and all(
        left <= 0 and a - left < s
        for (left, _), a, s in zip(layer.padding, layer.growth, layer.stride, strict=True)
    )
