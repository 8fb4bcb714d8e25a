"""How a carry passes the activations of a branch.

    identity     its proven range lies where the activation is the identity
    scale        multiplied by a power of two, its proven range lies there: bit for bit unless it is
                 tiny, so that a scaled value is no normal number
    per-channel  PReLU with slope 1 on the carry, or a clamp with infinite bounds there: bit for bit
    odd-pair     x travels as [x; −x], because act(x) − act(−x) = κ·x: twice the channels
    shift        scaled and shifted, its range lies there: costs the rounding of a sum
    double-relu  a clamp between a and b is written as a + relu((b − a) − relu(b − x)), which the
                 carry passes by the ways above: costs the rounding of that sum, in the main block
    masked       `where(carry, x, act(x))`: bit for bit

A *code* is what the carry is written as between two linear layers: the layer before encodes it, the
layer behind decodes it, and no layer is added. Behind a Dirac tap a code goes on unchanged, so a
carry is decoded only where it is merged or where its shortcut's own layer stands.

A proven range can be far wider than the values, and a sum with such a shift would drown them in
rounding. So a shift is used only where data show how large the values are: with the proven range if
that costs little, else with the range of the data and as much again on both sides, outside of which
the result is wrong.

No way is chosen that the type has no digits for: see `algebra/digits.py`. Who asks for "relu"
quantises, so there a way of a small gain comes before a simpler one of a large gain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rmfx.algebra.activation import Activation, way_of
from rmfx.algebra.affine import AffineConv
from rmfx.algebra.digits import (
    EXACTNESS,
    SMALL_GAIN,
    affords,
    exactness_of_taps,
    factor_up_or_down,
    smallest_scale,
)
from rmfx.algebra.laws import chain, direct_sum, join, stack
from rmfx.analysis.ranges import Ranges
from rmfx.choices import STRATEGIES
from rmfx.errors import OptionError, Refusal

from .assembly import work_of
from .codes import (
    ORDER,
    Bounds,
    Stretch,
    Way,
    bounds_of,
    coded,
    exactness_of_scale,
    linear_layer,
    loses_weights,
    may_fix,
    no_digits,
    power_of_two,
    scale_code,
    scale_into,
    shift_codes,
    uniform_activation,
)
from .columns import Column, Linear, Normalised, Plan, Pointwise, linear_of
from .double_relu import bits_of_clamps, without_clamps

# Those that pass every carry bit for bit at its own width.
AUTO = ("identity", "scale", "per-channel", "masked")


# Those that need no activation but the network's own, and ReLU.
SAME_ACTIVATION = ("identity", "scale", "odd-pair", "shift", "double-relu")


@dataclass(frozen=True, eq=False)
class Settled:
    """A plan in which every activation is known to leave the carry intact.

    Attributes:
        strategy: the least simple one in use, "linear" where there is no activation.
        exactness: of the carry that arrives: the worst of `EXACTNESS`.
        gain: the largest factor, up or down, that the carry meets on the way.
        bits: how many of the type's bits the worst stretch costs it.
    """

    plan: Plan
    strategy: str
    exactness: str
    gain: float = 1.0
    bits: float = 0.0


def allowed_ways(activation: str | Collection[str]) -> Collection[str]:
    """The strategies that an option allows.

    Raises:
        OptionError: there is none of the name.
    """
    if activation == "auto":
        return AUTO
    chosen = {activation} if isinstance(activation, str) else set(activation)
    unknown = chosen - {*STRATEGIES, "relu"}
    if unknown or not chosen:
        raise OptionError(
            f"activation={activation!r}: choose 'auto', 'relu' or some of {', '.join(STRATEGIES)}"
        )
    return chosen | {*SAME_ACTIVATION} if "relu" in chosen else chosen


def settle(
    plan: Plan, ranges: Ranges, allowed: Collection[str], dtype: torch.dtype = torch.float32
) -> Settled | Refusal:
    """Choose how the carry passes each activation, by the simplest strategy that is allowed.

    Args:
        allowed: names of `STRATEGIES`; with "relu" among them a small gain comes first.
        dtype: of the values.
    """
    own = _settle(plan, ranges, allowed, dtype)
    if "double-relu" not in allowed or _is_good(own, allowed):
        return own
    other = without_clamps(plan, dtype)
    if other is None:
        return own
    found = _settle(other, ranges, {"identity", *allowed}, dtype)
    if isinstance(found, Refusal) or not (isinstance(own, Refusal) or _is_good(found, allowed)):
        return own
    return replace(
        found,
        strategy=max("double-relu", found.strategy, key=ORDER),
        exactness=max("rounding", found.exactness, key=EXACTNESS.index),
        bits=max(found.bits, bits_of_clamps(plan)),
    )


def is_large(settled: Settled, allowed: Collection[str]) -> bool:
    """Whether a gain is more than whoever quantises can do with."""
    return "relu" in allowed and settled.gain > SMALL_GAIN


def _is_good(found: Settled | Refusal, allowed: Collection[str]) -> bool:
    """Whether there is a way that is right for all values, without a large gain."""
    if isinstance(found, Refusal) or found.exactness == "calibrated range":
        return False
    return not is_large(found, allowed)


def _settle(
    plan: Plan, ranges: Ranges, allowed: Collection[str], dtype: torch.dtype
) -> Settled | Refusal:
    """The same with the activations as they are."""
    columns, used = list(plan.columns), list[Way]()
    for stretch in _stretches(columns):
        best = _best(list(_options(columns, stretch, ranges, allowed, dtype)), allowed)
        if isinstance(best, Refusal):
            return best
        for i, column in best.columns.items():
            columns[i] = column
        used.append(best)
    settled = Settled(
        plan,
        max((one.name for one in used), key=ORDER, default="linear"),
        max([_exactness_of_rest(plan, dtype), *(o.exactness for o in used)], key=EXACTNESS.index),
        max((one.gain for one in used), default=1.0),
        max((one.bits for one in used), default=0.0),
    )
    if tuple(columns) == plan.columns:
        return settled
    work = work_of(columns)
    if isinstance(work, Refusal):
        return work
    return replace(settled, plan=replace(plan, columns=tuple(columns), work=work))


def _exactness_of_rest(plan: Plan, dtype: torch.dtype) -> str:
    """Of what the columns do to a carry beside its ways past activations."""
    # An identity batch norm takes a mean away and adds it; a single layer adds 1 to weights.
    if len(linear_of(plan.columns)) == 1 or any(
        isinstance(column, Normalised) for column in plan.columns
    ):
        return "rounding"
    return exactness_of_taps(dtype)


def _best(options: Sequence[Way | Refusal], allowed: Collection[str]) -> Way | Refusal:
    """The simplest of those allowed, where it counts with a small gain."""
    found = [one for one in options if isinstance(one, Way)]
    fits = [one for one in found if one.names <= {*allowed}]
    if fits:
        small = [one for one in fits if one.gain <= SMALL_GAIN] if "relu" in allowed else []
        return min(small or fits, key=lambda one: ORDER(one.name))
    needed = max(found[0].names - {*allowed}, key=ORDER)
    reason = f"it needs the strategy {needed!r}, which the option activation excludes"
    lacking = [one.reason for one in options if isinstance(one, Refusal)]
    return Refusal("; ".join([reason, *lacking]))


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
    dtype: torch.dtype,
) -> Iterator[Way | Refusal]:
    """Ways to pass all activations of a stretch, the one without a code first.

    A refusal stands for a way that the type has no digits for.
    """
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
    like = linear_layer(columns[start]).carry
    low, high = bounds_of(ranges.of(carried).on_axis(last=not like.dims), like.out_channels)
    fixing = [act for c in acts.values() if (act := may_fix(c))]
    seen = ranges.measured(carried, last=not like.dims) if "shift" in allowed else None
    data = None if seen is None else bounds_of(seen, like.out_channels)
    codes = [scale_code(fixing, (low, high), like, dtype) if "scale" in allowed else None]
    if data is not None:
        codes += shift_codes(fixing, (low, high), data, like, dtype)
    for code in codes:
        if isinstance(code, Refusal):
            yield code
        elif code is not None:
            yield from coded(columns, stretch, acts, code, dtype)
    has_kink = any(isinstance(c.main, Activation) and c.main.has_kink for c in acts.values())
    if "odd-pair" in allowed and ranges.weights_vary and has_kink:
        yield Refusal(
            "for gradients (differentiable=True) an odd pair is none: where the carry is 0 a slope "
            "that jumps there has another gradient than the carry"
        )
    elif "odd-pair" in allowed:
        yield from _as_pair(columns, stretch, acts, _Values(low, high, data, dtype))


def _uncoded(acts: dict[int, Pointwise], ranges: Ranges) -> Way:
    """Every activation acts on the whole column where it leaves the carry as it is."""
    chosen: dict[int, Column] = {}
    names, rounds = set(), False
    for i, column in acts.items():
        act, node = uniform_activation(column), column.carried
        if act is not None and node is not None and ranges.fixed_by(node, act):
            column = replace(column, carry=act)
            rounds = rounds or act.row.rounds
        chosen[i] = column
        names.add(way_of(column.blocks))
    return Way(chosen, frozenset(names), "rounding" if rounds else "bit-exact")


# ---- odd pairs ----------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class _Values:
    """What is known of a carry's values.

    Attributes:
        low, high: proven.
        data: the extremes on data, None if there are none.
    """

    low: Tensor
    high: Tensor
    data: Bounds | None
    dtype: torch.dtype

    @property
    def size(self) -> Tensor:
        return torch.maximum(-self.low, self.high)

    @property
    def usual(self) -> float:
        """How large they are: of order one in a trained network, where nothing tells more."""
        known = (
            1.0 if self.data is None else float(torch.maximum(-self.data[0], self.data[1]).max())
        )
        return min(known, float(self.size.max())) or 1.0


def _as_pair(
    columns: Sequence[Column], stretch: Stretch, acts: dict[int, Pointwise], values: _Values
) -> Iterator[Way | Refusal]:
    """The stretch with its carry as [s·x; −s·x], decoded and written anew between activations.

    Behind ReLU the pair is [x⁺; x⁻], which the next ReLU leaves alone: there it goes on as it is.
    """
    start, _, end = stretch
    odd = {i: c.main for i, c in acts.items() if isinstance(c.main, Activation) and c.main.odd}
    if len(odd) < len(acts) or any(c.carry is not None for c in acts.values()):
        return
    coded = _scale_of_pair([*odd.values()], values)
    if isinstance(coded, Refusal):
        yield coded
    if coded is None or isinstance(coded, Refusal):
        return
    scale, fact = coded
    reach = min(a.reach for a in odd.values())
    chosen: dict[int, Column] = {}
    before: Activation | None = None  # whose odd part the pair holds
    linear = [i for i in range(start, end + 1) if isinstance(columns[i], Linear)]
    for i, following in zip(linear, [*linear[1:], end], strict=True):
        column, gap = linear_layer(columns[i]), [odd[k] for k in range(i, following) if k in odd]
        carry: AffineConv | Refusal
        if gap and _passes_pair(before, gap[0], reach):
            carry = direct_sum(column.carry, column.carry)
        else:
            carry = _pair_layer(column.carry, scale, before, gap[0] if gap else None)
            before = gap.pop(0) if gap else None
        if isinstance(carry, Refusal) or not all(_passes_pair(before, a, reach) for a in gap):
            return
        if loses_weights([(column.carry, carry)], values.dtype):
            yield no_digits("odd-pair", values.dtype, f"multiplies weights by {fact.gain:.1g}")
            return
        chosen[i] = replace(column, carry=carry)
    for i, act in acts.items():
        chosen[i] = replace(act, carry=act.main, widths=(act.widths[0], 2 * act.widths[1]))
    yield replace(fact, columns=chosen)


def _scale_of_pair(
    acts: Sequence[Activation], values: _Values
) -> tuple[Tensor, Way] | Refusal | None:
    """The scale s of a pair [s·x; −s·x], and what is known of a carry that travels so."""
    reach, size, dtype = min(a.reach for a in acts), values.size, values.dtype
    scale = scale_into(-size, size, -reach, reach)
    if scale is None:
        return None
    # A slope of more than 1 would take the largest values beyond the type.
    steepest = max(abs(a.odd - 1) for a in acts)
    scale = scale.clamp(max=float(power_of_two(torch.tensor(1 / max(steepest, 1.0)))))
    ends = float(scale.min()), float(scale.max())
    gain = factor_up_or_down(*ends, *(a.odd * s for a in acts for s in ends))
    bits = max(math.log2(a.terms(values.usual)) for a in acts)
    if not affords(dtype, bits):
        return no_digits(
            "odd-pair", dtype, f"costs {bits:.1f} bits, here by a factor of {gain:.1g}"
        )
    if ends[0] < smallest_scale(dtype, reach):
        return no_digits("odd-pair", dtype, f"multiplies by {ends[0]:.1g} and back")
    splits = all(a.splits for a in acts)
    exactness = exactness_of_scale(scale, values.low, values.high, dtype) if splits else "rounding"
    return scale, Way({}, frozenset({"odd-pair"}), exactness, gain, bits)


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
