"""How a carry is coded so that it passes an activation unchanged, and comes back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rmfx.algebra.activation import Activation
from rmfx.algebra.affine import AffineConv
from rmfx.algebra.blockwise import way_of
from rmfx.algebra.digits import SMALLEST_SCALE, affords, lost_rows, smallest_scale
from rmfx.algebra.products import compose
from rmfx.analysis.ranges import Range
from rmfx.choices import STRATEGIES
from rmfx.errors import Refusal

from .column import Column
from .columns import Linear, Pointwise

BITS_OF_SHIFT = 6  # a shift with few bits is exact itself
ORDER = ("linear", *STRATEGIES).index


# A stretch: indices of the linear column that starts it, of its activations, of the linear column
# that ends it. The carry's value is the same all along.
Stretch = tuple[int, list[int], int]


Bounds = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Code:
    """How a carry is written while it passes activations.

    Attributes:
        encode: the carry's channels to those of the code, without a spatial window.
        decode: back again, behind the activations.
        name: the strategy it serves.
        exactness: of a value that comes back: one of `EXACTNESS`.
        gain: the largest factor, up or down.
        bits: how many of the type's bits the sums on the way cost.
    """

    encode: AffineConv
    decode: AffineConv
    name: str
    exactness: str
    gain: float
    bits: float = 0.0


@dataclass(frozen=True, eq=False)
class Way:
    """New columns for a stretch, by index, and the strategies in use."""

    columns: dict[int, Column]
    names: frozenset[str]
    exactness: str
    gain: float = 1.0
    bits: float = 0.0

    @property
    def name(self) -> str:
        return max(self.names, key=ORDER)


def linear_layer(column: Column) -> Linear:
    """A column that is known to be linear."""
    if not isinstance(column, Linear):
        raise TypeError("a stretch begins and ends with a linear column")
    return column


def uniform_activation(column: Pointwise) -> Activation | None:
    """The activation that acts on the main block's channels alike, if the carry has none itself."""
    act = column.main
    if not isinstance(act, Activation) or act.is_per_channel or column.carry is not None:
        return None
    return act


def may_fix(column: Pointwise) -> Activation | None:
    """Such an activation, if it is the identity somewhere."""
    act = uniform_activation(column)
    return act if act is not None and act.identity[0] < act.identity[1] else None


def bounds_of(x: Range, width: int) -> Bounds:
    """The range of a carry of `width` channels; those beyond the value's own are zero."""
    own = x.low.numel()
    if own == 1:
        return x.low.expand(width), x.high.expand(width)
    zero = x.low.new_zeros(width - own)
    return torch.cat([x.low, zero]), torch.cat([x.high, zero])


def _common_identity(acts: Sequence[Activation]) -> tuple[float, float]:
    """The interval that all of some activations leave alone; empty if there are none."""
    begin = max((a.identity[0] for a in acts), default=math.inf)
    return begin, min((a.identity[1] for a in acts), default=-math.inf)


def scale_code(
    acts: Sequence[Activation], proven: Bounds, like: AffineConv, dtype: torch.dtype
) -> Code | Refusal | None:
    """x ↦ s·x into the interval that all activations leave alone."""
    begin, end = _common_identity(acts)
    scale = scale_into(*proven, begin, end) if begin < end else None
    if scale is None:
        return None
    least = float(scale.min())
    nearest = min((abs(e) for e in (begin, end) if e and math.isfinite(e)), default=math.inf)
    if least < smallest_scale(dtype, nearest):
        return no_digits("scale", dtype, f"multiplies by {least:.1g} and back")
    exactness = exactness_of_scale(scale, *proven, dtype)
    if any(a.row.rounds for a in acts):
        exactness = "rounding"
    return Code(*_both_ways(scale, torch.zeros_like(scale), like), "scale", exactness, 1 / least)


def exactness_of_scale(scale: Tensor, low: Tensor, high: Tensor, dtype: torch.dtype) -> str:
    """Of x ↦ s·x and back: values of a range that holds 0 may be as small as the type allows."""
    smallest = torch.maximum(low, -high).clamp(min=0)
    # A factor of 2, because a computed value may lie a little beyond its proven range.
    normal = (scale == 1) | (scale * smallest >= 2 * torch.finfo(dtype).tiny)
    return "bit-exact" if bool(normal.all()) else "normal numbers"


def no_digits(name: str, dtype: torch.dtype, how: str) -> Refusal:
    """The refusal of a way that a type has no digits for."""
    return Refusal(f"{dtype} has no digits for {name!r}, which {how}: convert in a wider type")


def shift_codes(
    acts: Sequence[Activation], proven: Bounds, data: Bounds, like: AffineConv, dtype: torch.dtype
) -> Sequence[Code | Refusal]:
    """x ↦ s·x + t into that interval: by proven bounds, if they are not far wider than the data."""
    begin, end = _common_identity(acts)
    if not begin < end:
        return []
    info = torch.finfo(dtype)
    largest = float(torch.maximum(-data[0], data[1]).max())
    room = (data[1] - data[0]).clamp(min=largest * info.eps)
    wider = (data[0] - room, data[1] + room)
    codes, lacking = list[Code](), list[Refusal]()
    for bounds, exactness in ((proven, "rounding"), (wider, "calibrated range")):
        found = shift_into(*bounds, begin, end)
        if found is None:
            continue
        scale, shift = found
        offset = _width_of(scale, shift, bounds) / (largest or 1.0)
        bits = math.log2(max(offset, 1.0))
        gain = max(1 / float(scale.min()), offset)
        if affords(dtype, bits) and gain <= 1 / info.tiny:
            codes.append(Code(*_both_ways(*found, like), "shift", exactness, gain, bits))
        else:
            lacking.append(no_digits("shift", dtype, f"costs {bits:.1f} bits"))
    return codes or lacking[-1:]


def _width_of(scale: Tensor, shift: Tensor, bounds: Bounds) -> float:
    """The largest value of a shifted carry, in the units of the carry."""
    ends = [(scale * bound + shift).abs() for bound in bounds]
    return float((torch.maximum(*ends) / scale).max())


def _both_ways(scale: Tensor, shift: Tensor, like: AffineConv) -> tuple[AffineConv, AffineConv]:
    """x ↦ s·x + t for a carry like that of a layer, and back."""
    scale, shift = scale.to(like.weight.device), shift.to(like.weight.device)
    encode = AffineConv.scale(scale, shift, dims=like.dims)
    return encode, AffineConv.scale(1 / scale, -shift / scale, dims=like.dims)


def power_of_two(x: Tensor) -> Tensor:
    """The largest power of two that is at most x and at most 1."""
    return torch.exp2(torch.floor(torch.log2(x.clamp(max=1.0))))


def scale_into(low: Tensor, high: Tensor, begin: float, end: float) -> Tensor | None:
    """The largest powers of two, at most 1, with begin ≤ s·low and s·high ≤ end; None if none."""
    if not begin <= 0 <= end:
        return None
    one = torch.ones_like(low)
    room = torch.minimum(
        torch.where(high > end, end / high, one), torch.where(low < begin, begin / low, one)
    )
    scale = power_of_two(room)
    return scale if bool((scale >= SMALLEST_SCALE).all()) else None


def shift_into(low: Tensor, high: Tensor, begin: float, end: float) -> tuple[Tensor, Tensor] | None:
    """(s, t) with begin ≤ s·low + t and s·high + t ≤ end; t has few bits, so it is exact itself."""
    if not math.isfinite(begin) or not bool(torch.isfinite(low).all()):
        return None
    if math.isinf(end):
        scale = torch.ones_like(low)
        shift = (begin - low).clamp(min=0)
        return scale, _up_to_few_bits(shift)
    if not bool(torch.isfinite(high).all()):
        return None
    grid = 2.0 ** (math.floor(math.log2(end - begin)) - BITS_OF_SHIFT)
    scale = power_of_two((end - begin - grid) / (high - low).clamp(min=1e-300))
    shift = torch.ceil((begin - scale * low) / grid) * grid
    fits = (scale * high + shift <= end) & (scale >= SMALLEST_SCALE)
    return (scale, shift) if bool(fits.all()) else None


def _up_to_few_bits(x: Tensor) -> Tensor:
    grid = torch.exp2(torch.floor(torch.log2(x.clamp(min=1e-300))) - BITS_OF_SHIFT)
    return torch.ceil(x / grid) * grid


def coded(
    columns: Sequence[Column],
    stretch: Stretch,
    acts: dict[int, Pointwise],
    code: Code,
    dtype: torch.dtype,
) -> Iterator[Way | Refusal]:
    """The stretch with its carry in one code all along, where the layers can take it."""
    start, _, end = stretch
    first, last = linear_layer(columns[start]), linear_layer(columns[end])
    encoding, decoding = compose(code.encode, first.carry), compose(last.carry, code.decode)
    if isinstance(encoding, Refusal) or isinstance(decoding, Refusal):
        return
    if loses_weights([(first.carry, encoding), (last.carry, decoding)], dtype):
        yield no_digits(code.name, dtype, f"multiplies weights by {code.gain:.1g}, up or down")
        return
    chosen: dict[int, Column] = {
        start: replace(first, carry=encoding),
        end: replace(last, carry=decoding),
    }
    names = {code.name}
    for i, column in acts.items():
        act = may_fix(column)
        if act is None:
            chosen[i] = column
            names.add(way_of(column.blocks))
        else:
            chosen[i] = replace(column, carry=act)
    yield Way(chosen, frozenset(names), code.exactness, code.gain, code.bits)


def loses_weights(layers: Sequence[tuple[AffineConv, AffineConv]], dtype: torch.dtype) -> bool:
    """Whether one layer of a pair (before, after) has outputs that the type cannot hold."""
    return any(lost_rows(after, dtype) > lost_rows(before, dtype) for before, after in layers)
