"""The algebra of linear layers: composition, Δ (duplicate), ⊕ (direct sum) and ∇ (add).

Laws (each has a property test):
    compose(outer, inner)(x) = outer(inner(x))          where no border comes between
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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rmfx.errors import Refusal

from .affine import AffineConv, Ints, Pads, at, grouped


def compose(outer: AffineConv, inner: AffineConv) -> AffineConv | Refusal:
    """outer ∘ inner as one layer.

    Exact unless the outer layer reads its zero padding where the merged layer would read something
    else: the inner layer's bias, or inputs that an inner kernel still sees from outside its border.
    """
    refusal = _border_between(outer, inner)
    if refusal:
        return refusal
    window = _window_of_product(outer, inner)
    weight, groups = _compose_weights(outer, inner, window.dilation, window.kernel)
    bias = outer.bias.to(weight)
    if inner.has_bias:
        bias = bias + sum_of_taps(outer, inner.bias)
    return AffineConv(weight, bias, window.stride, window.padding, window.dilation, groups)


class _Window(NamedTuple):
    """Where a layer reads."""

    stride: Ints
    padding: Pads
    dilation: Ints
    kernel: Ints


def _window_of_product(outer: AffineConv, inner: AffineConv) -> _Window:
    """Where outer ∘ inner reads."""
    stride = tuple(a * b for a, b in zip(outer.stride, inner.stride, strict=True))
    step, kernel, padding = [], [], []
    for i in range(inner.dims):
        s, taps = inner.stride[i], (outer.kernel[i] > 1, inner.kernel[i] > 1)
        steps = (s * outer.dilation[i] * taps[0], inner.dilation[i] * taps[1])
        grid = math.gcd(*steps) or 1
        span = s * outer.span[i] + inner.span[i]
        left = s * outer.padding[i][0] + inner.padding[i][0]
        growth = inner.growth[i] + s * outer.growth[i]
        step.append(grid)
        kernel.append(span // grid + 1)
        padding.append((left, growth - left + span + 1 - stride[i]))
    return _Window(stride, tuple(padding), tuple(step), tuple(kernel))


@dataclass(frozen=True, eq=False)
class Unmerged(AffineConv):
    """Linear layers in a row as one layer whose weights are not multiplied yet.

    It has the shape of the product, and zeros without memory for weights. Where it stands may be
    changed (stride, padding, more channels); `merged` is then the product standing there.

    Attributes:
        factors: the layers, the first one first.
    """

    factors: tuple[AffineConv, ...] = ()

    def pad_channels(self, n_in: int, n_out: int) -> AffineConv:
        """More channels, as of any layer."""
        kernel, bias = self.kernel, self.bias[:1].expand(n_out)
        return replace(self, weight=_nothing(self, n_out, n_in, *kernel), bias=bias, groups=1)

    def merged(self) -> AffineConv | Refusal:
        """The product."""
        made = chain(self.factors)
        if isinstance(made, Refusal):
            return made
        made = replace(made, stride=self.stride, padding=self.padding)
        return made.pad_channels(self.in_channels, self.out_channels)


def unmerged(factors: Sequence[AffineConv]) -> AffineConv | Refusal:
    """Linear layers in a row as one layer, of which the shape is known and asked first.

    The first one may be such a product itself.
    """
    whole = factors[0]
    first = whole.factors if isinstance(whole, Unmerged) else (whole,)
    for outer in factors[1:]:
        refusal = _border_between(outer, whole)
        if refusal:
            return refusal
        window = _window_of_product(outer, whole)
        groups = math.gcd(outer.groups, whole.groups)
        if outer.is_depthwise or whole.is_depthwise:
            groups = min(outer.groups, whole.groups)
        weight = _nothing(outer, outer.out_channels, whole.in_channels // groups, *window.kernel)
        bias = weight.new_full((1,), float(outer.has_bias or whole.has_bias))
        bias = bias.expand(outer.out_channels)
        place = (window.stride, window.padding, window.dilation, groups)
        whole = Unmerged(weight, bias, *place, (*first, *factors[1:]))
    return whole


def _nothing(like: AffineConv, *sizes: int) -> Tensor:
    return like.weight.new_zeros(()).expand(sizes)


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


def stack(*layers: AffineConv, groups: int = 1, runs: int = 1) -> AffineConv | Refusal:
    """x ↦ [f(x); g(x); …], outputs one below the other, or in `runs`."""
    same = common_window(layers)
    if isinstance(same, Refusal):
        return same
    return _assemble(same, groups, (groups, runs), shares_input=True)


def join(*layers: AffineConv, groups: int = 1, runs: int = 1) -> AffineConv | Refusal:
    """[x; y; …] ↦ f(x) + g(y) + …, inputs one below the other, or in `runs`."""
    same = common_window(layers)
    if isinstance(same, Refusal):
        return same
    return _assemble(same, groups, (runs, 1), shares_output=True)


def spread(
    *layers: AffineConv, groups: int = 1, runs: tuple[int, int] = (1, 1)
) -> AffineConv | Refusal:
    """[x; y; …] ↦ [f(x); g(y); …], a share of each in every group; runs: before and behind."""
    same = common_window(layers)
    return same if isinstance(same, Refusal) else _assemble(same, groups, runs)


def direct_sum(*layers: AffineConv, runs: int = 1) -> AffineConv | Refusal:
    """[x; y; …] ↦ [f(x); g(y); …], as a grouped layer where the groups fit, else dense."""
    same = common_window(layers)
    if isinstance(same, Refusal):
        return same
    counts = groups_side_by_side(same)
    if counts is None:
        return _assemble(same, 1, (runs, runs))
    parts = _in_one_type([f.regroup(n) for f, n in zip(same, counts, strict=True)])
    return replace(
        parts[0],
        weight=in_turn([f.weight for f in parts], runs),
        bias=in_turn([f.bias for f in parts], runs),
        groups=sum(counts),
    )


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
    layers: Sequence[AffineConv],
    groups: int,
    runs: tuple[int, int],
    *,
    shares_input: bool = False,
    shares_output: bool = False,
) -> AffineConv:
    """One layer of so many groups with the weights of each in their place, by views.

    Args:
        runs: of inputs and outputs.
        shares_input, shares_output: whether all layers read, or give, the same channels; biases of
            those that do are added.
    """
    layers = _in_one_type([f.regroup(groups) for f in layers])
    first, (before, behind) = layers[0], runs
    outs = [f.out_channels // behind for f in layers]  # in a run
    ins = [f.in_channels // before for f in layers]
    n_out, n_in = outs[0] if shares_output else sum(outs), ins[0] if shares_input else sum(ins)
    kernel, per_group = first.kernel, before // groups
    weight = first.weight.new_zeros(behind, n_out, per_group, n_in, *kernel)
    bias = first.bias.new_zeros(behind, n_out)
    row = column = 0
    for f, height, width in zip(layers, outs, ins, strict=True):
        blocks = f.weight.reshape(behind, height, per_group, width, *kernel)
        weight[:, row : row + height, :, column : column + width].copy_(blocks)
        bias[:, row : row + height] += f.bias.reshape(behind, height)
        row += 0 if shares_output else height
        column += 0 if shares_input else width
    weight = weight.reshape(behind * n_out, per_group * n_in, *kernel)
    return replace(first, weight=weight, bias=bias.flatten(), groups=groups)


def _in_one_type(layers: Sequence[AffineConv]) -> list[AffineConv]:
    """The layers in the smallest type that holds all their numbers, on one device."""
    dtype = layers[0].weight.dtype
    for tensor in itertools.chain(*((f.weight, f.bias) for f in layers)):
        dtype = torch.promote_types(dtype, tensor.dtype)
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
