"""A clamp on the main block as two ReLU in a row.

    clamp(x, a, b) = a + relu(s·(b − a) − s·relu(b − x)) / s

A clamp takes from a carry what lies outside its bounds, and a carry scaled into them has few bits
left in int8. ReLU takes only what is negative. So every clamp of a plan becomes ReLU, a depthwise
1x1 layer with a Dirac tap beside it, and ReLU; b − x goes into the layer before, a into the layer
behind. Both sums are of the size of b − a however large x is, so rounding costs as much as it
costs the clamp's own largest value: log₂ max(|a|, |b|, b − a) bits of values of the size of 1.

s is for int8, which gives both blocks one scale. A carry that needs this way may be far larger
than b − a; how much larger, only data tell. With s = 1 a carry of 16 times the clamp would leave it
4 of 8 bits; with s = √16 neither block loses more than 2 bits, however large the carry is up to
that. Floating point does not mind a power of two. s stays 1 where no linear layer directly behind
divides by it, and in float16, where small weights have no digits left to divide.

Left as it is, too: a clamp whose bounds are so large that the type does not afford these bits.

Left as it is: a clamp with an infinite end, or that does not directly follow a linear layer whose
output nobody else reads; with a ≠ 0 also one whose output others read, or which is followed by
something else than a linear layer without padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from rmfx.algebra.activation import Activation
from rmfx.algebra.affine import AffineConv
from rmfx.algebra.digits import SMALL_GAIN, SMALLEST_SCALE, affords
from rmfx.algebra.products import compose
from rmfx.errors import Refusal

from .assembly import Plan
from .column import Column
from .columns import Linear, Pointwise

RELU = Activation(nn.ReLU())
RAISED = math.sqrt(SMALL_GAIN)  # a power of two


def without_clamps(plan: Plan, dtype: torch.dtype) -> Plan | None:
    """The plan with two ReLU for every clamp of its main block; None if none allows it."""
    columns = list(plan.columns)
    places = [i for i, column in enumerate(columns) if isinstance(column, Pointwise)]
    for i in reversed(places):  # those before keep their index
        columns[i - 1 : i + 2] = _replaced(columns[i - 1 : i + 2], dtype)
    if len(columns) == len(plan.columns):
        return None
    changed = plan.with_columns(columns)
    return None if isinstance(changed, Refusal) else changed


def bits_of_clamps(plan: Plan) -> float:
    """The bits that values of the size of 1 lose in sums with the bounds of a plan's clamps."""
    acts = (column.main for column in plan.columns if isinstance(column, Pointwise))
    bounds = [act.bounds for act in acts if isinstance(act, Activation)]
    known = (ends for ends in bounds if ends is not None and math.isfinite(sum(ends)))
    return max((_bits(*ends) for ends in known), default=0.0)


def _bits(low: float, high: float) -> float:
    return math.log2(max(1.0, abs(low), abs(high), high - low))


def _replaced(columns: Sequence[Column], dtype: torch.dtype) -> Sequence[Column]:
    """Two ReLU in place of the clamp in the middle of three columns, where that is possible."""
    before, clamp, behind = columns
    if not isinstance(before, Linear) or before.taps or not isinstance(clamp, Pointwise):
        return columns
    act = clamp.main
    if not isinstance(act, Activation) or act.bounds is None or clamp.carry is not None:
        return columns
    low, high = act.bounds
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        return columns
    if not affords(dtype, _bits(low, high)):
        return columns
    turned = compose(_affine(before.main, -1.0, high), before.main)
    s = _room(clamp, behind, dtype)
    read = _reading(behind, _affine(before.main, 1 / s, low)) if s > 1 or low else behind
    if isinstance(turned, Refusal) or read is None or (low and clamp.taps):
        return columns
    device = before.carry.weight.device
    again = Linear(
        main=_affine(before.main, -s, s * (high - low)),
        carry=AffineConv.identity(before.carry.out_channels, before.main.dims, device=device),
    )
    relu = replace(clamp, main=RELU, steps=(), taps=())
    return [replace(before, main=turned), relu, again, replace(clamp, main=RELU), read]


def _room(clamp: Column, behind: Column, dtype: torch.dtype) -> float:
    """How many times its size a clamp's result may have, which the column behind divides by."""
    divides = isinstance(behind, Linear) and not clamp.taps
    return RAISED if divides and torch.finfo(dtype).tiny < SMALLEST_SCALE else 1.0


def _reading(behind: Column, inner: AffineConv) -> Column | None:
    """A column that first applies a layer to its main block; None if it cannot."""
    if not isinstance(behind, Linear):
        return None
    main = compose(behind.main, inner)
    return None if isinstance(main, Refusal) else replace(behind, main=main)


def _affine(like: AffineConv, factor: float, shift: float) -> AffineConv:
    """x ↦ factor·x + shift of a layer's outputs."""
    ones = torch.ones(like.out_channels, dtype=torch.float64, device=like.weight.device)
    return AffineConv.scale(factor * ones, shift * ones, dims=like.dims)
