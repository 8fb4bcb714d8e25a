"""The algebra of linear layers: composition, Δ (duplicate), ⊕ (direct sum) and ∇ (add).

Laws (each has a property test):
    compose(outer, inner)(x) = outer(inner(x))          where no border comes between
    stack(f, g)(x)           = [f(x); g(x)]             = (f ⊕ g) ∘ Δ
    join(f, g)([x; y])       = f(x) + g(y)              = ∇ ∘ (f ⊕ g)
    direct_sum(f, g)([x; y]) = [f(x); g(y)]
    plus(f, g)(x)            = f(x) + g(x)              = ∇ ∘ (f ⊕ g) ∘ Δ
Δ and ∇ are merged by writing weight blocks side by side, never by multiplying with [I; I].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rmfx.errors import Refusal

from .affine import AffineConv, Ints, at, grouped


def compose(outer: AffineConv, inner: AffineConv) -> AffineConv | Refusal:
    """outer ∘ inner as one layer.

    Exact unless the outer layer reads its zero padding where the merged layer would read something
    else: the inner layer's bias, or inputs that an inner kernel still sees from outside its border.
    """
    refusal = _border_between(outer, inner)
    if refusal:
        return refusal
    step, kernel = [], []
    for s, d_out, d_in, span_out, span_in, k_out, k_in in zip(
        inner.stride,
        outer.dilation,
        inner.dilation,
        outer.span,
        inner.span,
        outer.kernel,
        inner.kernel,
        strict=True,
    ):
        grid = math.gcd(s * d_out if k_out > 1 else 0, d_in if k_in > 1 else 0) or 1
        step.append(grid)
        kernel.append((s * span_out + span_in) // grid + 1)
    weight, groups = _compose_weights(outer, inner, tuple(step), tuple(kernel))
    stride = tuple(a * b for a, b in zip(outer.stride, inner.stride, strict=True))
    padding = []
    for (left_out, _), (left_in, _), a_out, a_in, s_in, s, g, k in zip(
        outer.padding,
        inner.padding,
        outer.growth,
        inner.growth,
        inner.stride,
        stride,
        step,
        kernel,
        strict=True,
    ):
        left = s_in * left_out + left_in
        padding.append((left, a_in + s_in * a_out - left + g * (k - 1) + 1 - s))
    bias = outer.bias.to(weight)
    if inner.has_bias:
        bias = bias + sum_of_taps(outer, inner.bias)
    return AffineConv(weight, bias, stride, tuple(padding), tuple(step), groups)


def chain(layers: Iterable[AffineConv]) -> AffineConv | Refusal:
    """All `layers`, applied in order, as one layer."""
    iterator = iter(layers)
    result = next(iterator)
    for layer in iterator:
        merged = compose(layer, result)
        if isinstance(merged, Refusal):
            return merged
        result = merged
    return result


def stack(*layers: AffineConv, runs: int = 1) -> AffineConv | Refusal:
    """x ↦ [f(x); g(x); …], outputs one below the other.

    Args:
        runs: in so many runs the layers take turns, each with an equal part of its outputs; where
            all layers have as many groups, or a multiple of it, so has the result.
    """
    same = common_window(layers)
    if isinstance(same, Refusal):
        return same
    parts = _in_one_type([f.regroup(runs) for f in same])
    weight = in_turn([f.weight for f in parts], runs)
    return replace(parts[0], weight=weight, bias=in_turn([f.bias for f in parts], runs))


def in_turn(parts: Sequence[Tensor], runs: int) -> Tensor:
    """Tensors put together along their first dimension, taking turns in so many runs."""
    return torch.cat([grouped(part, 0, runs) for part in parts], 1).flatten(0, 1)


def join(*layers: AffineConv) -> AffineConv | Refusal:
    """[x; y; …] ↦ f(x) + g(y) + …"""
    same = common_window(layers)
    if isinstance(same, Refusal):
        return same
    starts = itertools.accumulate((f.in_channels for f in same), initial=0)
    total = sum(f.in_channels for f in same)
    return _assemble(same, [(0, i) for i in list(starts)[:-1]], same[0].out_channels, total)


def direct_sum(*layers: AffineConv) -> AffineConv | Refusal:
    """[x; y; …] ↦ [f(x); g(y); …], as a grouped layer where the groups fit, else dense."""
    same = common_window(layers)
    if isinstance(same, Refusal):
        return same
    block = common_block([f.block for f in same])
    if block and all(f.groups % (block[0] // f.block[0]) == 0 for f in same):
        parts = _in_one_type([f.regroup(f.groups * f.block[0] // block[0]) for f in same])
        return replace(
            parts[0],
            weight=torch.cat([f.weight for f in parts]),
            bias=torch.cat([f.bias for f in parts]),
            groups=sum(f.groups for f in parts),
        )
    rows = itertools.accumulate((f.out_channels for f in same), initial=0)
    columns = itertools.accumulate((f.in_channels for f in same), initial=0)
    n_out, n_in = sum(f.out_channels for f in same), sum(f.in_channels for f in same)
    return _assemble(same, list(zip(rows, columns, strict=True))[:-1], n_out, n_in)


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


def window_of(layers: Sequence[AffineConv]) -> tuple[Ints, Ints, Ints] | Refusal:
    """The smallest (left padding, dilation, kernel) whose taps include those of every layer."""
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
    return tuple(left), tuple(dilation), tuple(kernel)


def _assemble(
    layers: Sequence[AffineConv], corners: Sequence[tuple[int, int]], n_out: int, n_in: int
) -> AffineConv:
    """A dense layer with each layer's weight written at its (output, input) corner.

    Biases of layers that share output rows add up; their weight blocks must not overlap.
    """
    layers = _in_one_type(layers)
    first = layers[0]
    weight = first.weight.new_zeros(n_out, n_in, *first.kernel)
    bias = first.bias.new_zeros(n_out)
    for f, (row, column) in zip(layers, corners, strict=True):
        place = weight[row : row + f.out_channels, column : column + f.in_channels]
        place = grouped(grouped(place, 0, f.groups), 2, f.groups)
        blocks = grouped(f.weight, 0, f.groups)
        place.diagonal(dim1=0, dim2=2).copy_(blocks.movedim(0, -1))
        bias[row : row + f.out_channels] += f.bias
    return replace(first, weight=weight, bias=bias, groups=1)


def _in_one_type(layers: Sequence[AffineConv]) -> list[AffineConv]:
    """The layers in the smallest type that holds all their weights, on one device."""
    dtype = layers[0].weight.dtype
    for f in layers[1:]:
        dtype = torch.promote_types(dtype, f.weight.dtype)
    if sum(f.has_bias for f in layers) > 1:  # biases may be added
        dtype = torch.float64
    return [
        replace(f, weight=f.weight.to(dtype), bias=f.bias.to(dtype)) for f in _on_one_device(layers)
    ]


def _on_one_device(layers: Sequence[AffineConv]) -> list[AffineConv]:
    """Layers made of constants live on the CPU and follow the others."""
    devices = {f.weight.device for f in layers}
    if len(devices) == 1:
        return list(layers)
    device = next(d for d in devices if d.type != "cpu")
    return [replace(f, weight=f.weight.to(device), bias=f.bias.to(device)) for f in layers]


def _border_between(outer: AffineConv, inner: AffineConv) -> Refusal | None:
    """Why the outer layer's padding forbids merging, if it does."""
    if outer.in_channels != inner.out_channels or outer.dims != inner.dims:
        return Refusal("the layers do not fit one another")
    if not outer.pads:
        return None
    if inner.has_bias:
        return Refusal(
            "the second layer pads with zeros what the first layer would fill with its bias"
        )
    for (left, right), (left_in, right_in), span, s in zip(
        outer.padding, inner.padding, inner.span, inner.stride, strict=True
    ):
        sees_left = left > 0 and span - left_in >= s
        sees_right = right > 0 and right_in < span
        if sees_left or sees_right:
            return Refusal(
                "the second layer pads with zeros where the first layer's kernel would still see "
                "its input"
            )
    return None


def _compose_weights(
    outer: AffineConv, inner: AffineConv, step: Ints, kernel: Ints
) -> tuple[Tensor, int]:
    """Weight and groups of outer ∘ inner: products of taps, summed where they meet."""
    outer, inner = _on_one_device([outer, inner])
    product_of: Callable[[Tensor, Tensor], Tensor] = torch.mul
    if outer.is_depthwise and outer.is_pointwise:
        rows = outer.weight.to(torch.float64).reshape(-1, 1, *[1] * inner.dims)
        return inner.weight * rows, inner.groups
    if inner.is_depthwise:
        # Channel j of the inner layer is column j of its group in the outer weight.
        columns = inner.weight.to(torch.float64)
        columns = columns.reshape(outer.groups, 1, -1, *inner.kernel)
        columns = columns.expand(-1, outer.block[1], *columns.shape[2:]).flatten(0, 1)
        if inner.is_pointwise:
            return outer.weight * columns.reshape(
                *columns.shape[:2], *[1] * outer.dims
            ), outer.groups
        factors, groups = (outer.weight, columns), outer.groups
    elif outer.is_depthwise:
        factors, groups = (outer.weight.to(torch.float64), inner.weight), inner.groups
    else:
        groups = math.gcd(outer.groups, inner.groups)
        outer, inner = outer.regroup(groups).in_float64(), inner.regroup(groups).in_float64()
        factors = (grouped(outer.weight, 0, groups), grouped(inner.weight, 0, groups))
        product_of = torch.matmul
    n_in = inner.in_channels // groups
    weight = torch.zeros(
        outer.out_channels, n_in, *kernel, dtype=torch.float64, device=outer.weight.device
    )
    for t in itertools.product(*map(range, outer.kernel)):
        for u in itertools.product(*map(range, inner.kernel)):
            place = tuple(
                (s * d_out * i + d_in * j) // g
                for s, d_out, d_in, i, j, g in zip(
                    inner.stride, outer.dilation, inner.dilation, t, u, step, strict=True
                )
            )
            product = product_of(factors[0][at(t)], factors[1][at(u)])
            weight[at(place)] += product.reshape(outer.out_channels, n_in)
    return weight, groups


def sum_of_taps(layer: AffineConv, value: Tensor) -> Tensor:
    """The layer's response, without its bias, to an input that is `value` everywhere."""
    weight = layer.weight.to(torch.float64)
    taps = weight.flatten(2).sum(2) if layer.dims else weight
    n_in, n_out = layer.block
    per_group = taps.reshape(layer.groups, n_out, n_in)
    values = value.to(taps).reshape(layer.groups, n_in)
    return torch.einsum("goi,gi->go", per_group, values).flatten()


def reads_inside(layer: AffineConv) -> bool:
    """Whether a layer of one tap never reads its zero padding, whatever the input size."""
    return layer.is_pointwise and all(
        left <= 0 and a - left < s
        for (left, _), a, s in zip(layer.padding, layer.growth, layer.stride, strict=True)
    )


def area_after(layers: Sequence[AffineConv]) -> list[float]:
    """Positions after each layer, relative to the chain's input."""
    areas, area = [], 1.0
    for f in layers:
        area /= math.prod(f.stride)
        areas.append(area)
    return areas
