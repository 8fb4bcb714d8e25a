"""How a carry passes the activations of a branch.

    identity     its proven range lies where the activation is the identity
    scale        multiplied by a power of two, its proven range lies there: bit for bit
    per-channel  PReLU with slope 1 on the carry, or a clamp with infinite bounds there: bit for bit
    odd-pair     x travels as [x; −x], because act(x) − act(−x) = κ·x: twice the channels
    shift        scaled and shifted, its range lies there: costs the rounding of a sum
    masked       `where(carry, x, act(x))`: bit for bit

A *code* is what the carry is written as between two linear layers: the layer before encodes it, the
layer behind decodes it, and no layer is added. Behind a Dirac tap a code goes on unchanged, so a
carry is decoded only where it is merged or where its shortcut's own layer stands.

A proven range can be far wider than the values, and a sum with such a shift would drown them in
rounding. So a shift is used only where data show how large the values are: with the proven range if
that costs little, else with the range of the data and as much again on both sides, outside of which
the result is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ._activation import Activation, way_of
from ._affine import AffineConv
from ._algebra import chain, compose, direct_sum, join, stack
from ._columns import Column, Linear, Normalised, Plan, Pointwise, work_of
from ._errors import Refusal
from ._range import Range, Ranges

# The simplest first; of those allowed, the first that works is used.
STRATEGIES = ("identity", "scale", "per-channel", "odd-pair", "shift", "masked")
# Those that pass every carry bit for bit at its own width.
AUTO = ("identity", "scale", "per-channel", "masked")
# Those that leave the activation as it is.
SAME_ACTIVATION = ("identity", "scale", "odd-pair", "shift")
# Of a carry that arrives, the best first.
EXACTNESS = ("bit-exact", "rounding", "calibrated range")
SMALLEST_SCALE = 2.0**-40
LARGEST_ROUNDING = 1e-5  # of a proven shift, relative to the largest value on the data
BITS_OF_SHIFT = 6  # a shift with few bits is exact itself


@dataclass(frozen=True, eq=False)
class Code:
    """How a carry is written while it passes activations.

    Attributes:
        encode: the carry's channels to those of the code, without a spatial window.
        decode: back again, behind the activations.
        name: the strategy it serves.
        exactness: of a value that comes back: one of `EXACTNESS`.
    """

    encode: AffineConv
    decode: AffineConv
    name: str
    exactness: str


@dataclass(frozen=True, eq=False)
class Settled:
    """A plan in which every activation is known to leave the carry intact.

    Attributes:
        strategy: the least simple one in use, "linear" where there is no activation.
        exactness: of the carry that arrives: the worst of `EXACTNESS`.
    """

    plan: Plan
    strategy: str
    exactness: str


def settle(
    plan: Plan, ranges: Ranges, allowed: Collection[str], dtype: torch.dtype = torch.float32
) -> Settled | Refusal:
    """Choose how the carry passes each activation, by the simplest strategy that is allowed.

    Args:
        dtype: of the values.
    """
    columns, used, exactness = list(plan.columns), [], ["bit-exact"]
    for stretch in _stretches(columns):
        options = list(_options(columns, stretch, ranges, allowed, torch.finfo(dtype).eps))
        fits = [one for one in options if one.names <= {*allowed}]
        if not fits:
            needed = max(options[0].names - {*allowed}, key=STRATEGIES.index)
            reason = f"it needs the strategy {needed!r}, which the option activation excludes"
            if ranges.weights_vary and "odd-pair" in allowed:
                reason += (
                    "; for gradients (differentiable=True) an odd pair is none, as where the carry "
                    "is 0 a slope that jumps there has another gradient than the carry"
                )
            return Refusal(reason)
        best = min(fits, key=lambda one: STRATEGIES.index(one.name))
        for i, column in best.columns.items():
            columns[i] = column
        used.append(best.name)
        exactness.append(best.exactness)
    worst = max(exactness, key=EXACTNESS.index)
    strategy = max(used, key=STRATEGIES.index, default="linear")
    if tuple(columns) == plan.columns:
        return Settled(plan, strategy, worst)
    work = work_of(columns)
    if isinstance(work, Refusal):
        return work
    return Settled(replace(plan, columns=tuple(columns), work=work), strategy, worst)


@dataclass(frozen=True, eq=False)
class _Option:
    """New columns for a stretch, by index, and the strategies in use."""

    columns: dict[int, Column]
    names: frozenset[str]
    exactness: str

    @property
    def name(self) -> str:
        return max(self.names, key=STRATEGIES.index)


# A stretch: indices of the linear column that starts it, of its activations, of the linear column
# that ends it. The carry's value is the same all along.
Stretch = tuple[int, list[int], int]


def _stretches(columns: Sequence[Column]) -> Iterator[Stretch]:
    start, inside = 0, list[int]()
    for i, column in enumerate(columns):
        if isinstance(column, Pointwise):
            inside.append(i)
        if i == 0 or not isinstance(column, Linear) or _is_dirac(column.carry):
            continue
        if inside:
            yield start, inside, i
        start, inside = i, []
    if inside:
        yield start, inside, len(columns) - 1


def _is_dirac(layer: AffineConv) -> bool:
    """Whether a layer of the carry only picks values."""
    unit = layer.is_depthwise and layer.is_pointwise and not layer.has_bias
    return unit and bool((layer.weight == 1).all())


def _options(
    columns: Sequence[Column],
    stretch: Stretch,
    ranges: Ranges,
    allowed: Collection[str],
    eps: float,
) -> Iterator[_Option]:
    """Ways to pass all activations of a stretch, the one without a code first."""
    start, inside, end = stretch
    acts = {i: c for i in inside if isinstance(c := columns[i], Pointwise)}
    yield _uncoded(acts, ranges)
    carried = next(iter(acts.values())).carried
    one_value = all(c.carried is carried for c in acts.values())
    has_norm = any(isinstance(c, Normalised) for c in columns[start:end])
    if carried is None or not one_value or has_norm:
        return
    if not {"scale", "shift", "odd-pair"} & {*allowed}:
        return
    like = _linear(columns[start]).carry
    low, high = _bounds(ranges.of(carried).on_axis(last=not like.dims), like.out_channels)
    fixing = [act for c in acts.values() if (act := _may_fix(c))]
    seen = ranges.measured(carried, last=not like.dims) if "shift" in allowed else None
    codes = [_scale_code(fixing, low, high, like) if "scale" in allowed else None]
    if seen is not None:
        data = _bounds(seen, like.out_channels)
        codes.append(_shift_code(fixing, (low, high), data, like, eps))
    for code in codes:
        if code is not None:
            yield from _coded(columns, stretch, acts, code)
    has_kink = any(isinstance(c.main, Activation) and c.main.has_kink for c in acts.values())
    if "odd-pair" in allowed and not (ranges.weights_vary and has_kink):
        yield from _as_pair(columns, stretch, acts, low, high)


def _linear(column: Column) -> Linear:
    if not isinstance(column, Linear):
        raise TypeError("a stretch begins and ends with a linear column")
    return column


def _uncoded(acts: dict[int, Pointwise], ranges: Ranges) -> _Option:
    """Every activation acts on the whole column where it leaves the carry as it is."""
    chosen: dict[int, Column] = {}
    names, rounds = set(), False
    for i, column in acts.items():
        act, node = _uniform(column), column.carried
        if act is not None and node is not None and ranges.fixed_by(node, act):
            column = replace(column, carry=act)
            rounds = rounds or act.row.rounds
        chosen[i] = column
        names.add(way_of(column.blocks))
    return _Option(chosen, frozenset(names), "rounding" if rounds else "bit-exact")


def _uniform(column: Pointwise) -> Activation | None:
    """The activation that acts on the main block's channels alike, if the carry has none itself."""
    act = column.main
    if not isinstance(act, Activation) or act.is_per_channel or column.carry is not None:
        return None
    return act


def _may_fix(column: Pointwise) -> Activation | None:
    """Such an activation, if it is the identity somewhere."""
    act = _uniform(column)
    return act if act is not None and act.identity[0] < act.identity[1] else None


# ---- scale and shift ----------------------------------------------------------------------------


Bounds = tuple[Tensor, Tensor]


def _bounds(x: Range, width: int) -> Bounds:
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


def _scale_code(
    acts: Sequence[Activation], low: Tensor, high: Tensor, like: AffineConv
) -> Code | None:
    """x ↦ s·x into the interval that all activations leave alone."""
    begin, end = _common_identity(acts)
    scale = _scale_into(low, high, begin, end) if begin < end else None
    if scale is None:
        return None
    exactness = "rounding" if any(a.row.rounds for a in acts) else "bit-exact"
    return _affine_code(scale, torch.zeros_like(scale), "scale", exactness, like)


def _shift_code(
    acts: Sequence[Activation], proven: Bounds, data: Bounds, like: AffineConv, eps: float
) -> Code | None:
    """x ↦ s·x + t into that interval: by proven bounds, if they are not far wider than the data."""
    begin, end = _common_identity(acts)
    if not begin < end:
        return None
    largest = float(torch.maximum(-data[0], data[1]).max())
    found = _shift_into(*proven, begin, end)
    if found is not None:
        scale, shift = found
        width = torch.maximum((scale * proven[0] + shift).abs(), (scale * proven[1] + shift).abs())
        if float((eps * width / scale).max()) <= LARGEST_ROUNDING * largest:
            return _affine_code(scale, shift, "shift", "rounding", like)
    room = (data[1] - data[0]).clamp(min=largest * eps)
    found = _shift_into(data[0] - room, data[1] + room, begin, end)
    if found is None:
        return None
    return _affine_code(*found, "shift", "calibrated range", like)


def _affine_code(scale: Tensor, shift: Tensor, name: str, exactness: str, like: AffineConv) -> Code:
    scale, shift = scale.to(like.weight.device), shift.to(like.weight.device)
    encode = AffineConv.scale(scale, shift, dims=like.dims)
    decode = AffineConv.scale(1 / scale, -shift / scale, dims=like.dims)
    return Code(encode, decode, name, exactness)


def _power_of_two(x: Tensor) -> Tensor:
    """The largest power of two that is at most x and at most 1."""
    return torch.exp2(torch.floor(torch.log2(x.clamp(max=1.0))))


def _scale_into(low: Tensor, high: Tensor, begin: float, end: float) -> Tensor | None:
    """The largest powers of two, at most 1, with begin ≤ s·low and s·high ≤ end; None if none."""
    if not begin <= 0 <= end:
        return None
    one = torch.ones_like(low)
    room = torch.minimum(
        torch.where(high > end, end / high, one), torch.where(low < begin, begin / low, one)
    )
    scale = _power_of_two(room)
    return scale if bool((scale >= SMALLEST_SCALE).all()) else None


def _shift_into(
    low: Tensor, high: Tensor, begin: float, end: float
) -> tuple[Tensor, Tensor] | None:
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
    scale = _power_of_two((end - begin - grid) / (high - low).clamp(min=1e-300))
    shift = torch.ceil((begin - scale * low) / grid) * grid
    fits = (scale * high + shift <= end) & (scale >= SMALLEST_SCALE)
    return (scale, shift) if bool(fits.all()) else None


def _up_to_few_bits(x: Tensor) -> Tensor:
    grid = torch.exp2(torch.floor(torch.log2(x.clamp(min=1e-300))) - BITS_OF_SHIFT)
    return torch.ceil(x / grid) * grid


def _coded(
    columns: Sequence[Column], stretch: Stretch, acts: dict[int, Pointwise], code: Code
) -> Iterator[_Option]:
    """The stretch with its carry in one code all along, where the layers can take it."""
    start, _, end = stretch
    first, last = _linear(columns[start]), _linear(columns[end])
    encoding, decoding = compose(code.encode, first.carry), compose(last.carry, code.decode)
    if isinstance(encoding, Refusal) or isinstance(decoding, Refusal):
        return
    chosen: dict[int, Column] = {
        start: replace(first, carry=encoding),
        end: replace(last, carry=decoding),
    }
    names = {code.name}
    for i, column in acts.items():
        act = _may_fix(column)
        if act is None:
            chosen[i] = column
            names.add(way_of(column.blocks))
        else:
            chosen[i] = replace(column, carry=act)
    yield _Option(chosen, frozenset(names), code.exactness)


# ---- odd pairs ----------------------------------------------------------------------------------


def _as_pair(
    columns: Sequence[Column],
    stretch: Stretch,
    acts: dict[int, Pointwise],
    low: Tensor,
    high: Tensor,
) -> Iterator[_Option]:
    """The stretch with its carry as [s·x; −s·x], decoded and written anew between activations.

    Behind ReLU the pair is [x⁺; x⁻], which the next ReLU leaves alone: there it goes on as it is.
    """
    start, _, end = stretch
    odd = {i: c.main for i, c in acts.items() if isinstance(c.main, Activation) and c.main.odd}
    if len(odd) < len(acts) or any(c.carry is not None for c in acts.values()):
        return
    reach = min(a.reach for a in odd.values())
    size = torch.maximum(-low, high)
    scale = _scale_into(-size, size, -reach, reach)
    if scale is None:
        return
    chosen: dict[int, Column] = {}
    before: Activation | None = None  # whose odd part the pair holds
    linear = [i for i in range(start, end + 1) if isinstance(columns[i], Linear)]
    for i, following in zip(linear, [*linear[1:], end], strict=True):
        column, gap = _linear(columns[i]), [odd[k] for k in range(i, following) if k in odd]
        carry: AffineConv | Refusal
        if gap and _passes_pair(before, gap[0], reach):
            carry = direct_sum(column.carry, column.carry)
        else:
            carry = _pair_layer(column.carry, scale, before, gap[0] if gap else None)
            before = gap.pop(0) if gap else None
        if isinstance(carry, Refusal) or not all(_passes_pair(before, a, reach) for a in gap):
            return
        chosen[i] = replace(column, carry=carry)
    for i, act in acts.items():
        chosen[i] = replace(act, carry=act.main, widths=(act.widths[0], 2 * act.widths[1]))
    exact = all(a.splits for a in odd.values())
    yield _Option(chosen, frozenset({"odd-pair"}), "bit-exact" if exact else "rounding")


def _passes_pair(before: Activation | None, after: Activation, reach: float) -> bool:
    """Whether a pair split by one activation passes another one unchanged."""
    return before is not None and before.splits and after.fixes_all_of(0.0, reach)


def _pair_layer(
    carry: AffineConv, scale: Tensor, before: Activation | None, after: Activation | None
) -> AffineConv | Refusal:
    """A layer of the carry with pairs on the sides where there is an activation."""
    scale = scale.to(carry.weight.device)
    layers = [carry]
    if before:
        layers.insert(0, _both_signs(join, 1 / (before.odd * scale), carry.dims))
    if after:
        layers.append(_both_signs(stack, scale, carry.dims))
    return chain(layers)


def _both_signs(law: Callable[..., AffineConv | Refusal], scale: Tensor, dims: int) -> AffineConv:
    layer = law(AffineConv.scale(scale, dims=dims), AffineConv.scale(-scale, dims=dims))
    if isinstance(layer, Refusal):
        raise TypeError(f"two scales always fit together: {layer}")
    return layer
