"""Products of linear layers: two or more in a row as one.

    compose(outer, inner)(x) = outer(inner(x))          where no border comes between

Shapes are known before any weight is multiplied: see `Unmerged`.
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

from .affine import AffineConv, Ints, Pads, at, grouped, on_one_device


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
    outer, inner = on_one_device([outer, inner])
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
