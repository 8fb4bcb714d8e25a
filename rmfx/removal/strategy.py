"""How a carry passes the activations of a branch.

    identity     its proven range lies where the activation is the identity
    scale        multiplied by a power of two, its proven range lies there: bit for bit unless it is
                 tiny, so that a scaled value is no normal number
    per-channel  PReLU with slope 1 on the carry, or a clamp with infinite bounds there: bit for bit
    odd-pair     x travels as [x; −x], because act(x) − act(−x) = κ·x: twice the channels
    shift        scaled and shifted, its range lies there: costs the rounding of a sum
    double-relu  a clamp between a and b is written as a + relu((b − a) − relu(b − x)), which the
                 carry passes by the ways above: costs the rounding of that sum, in the main block,
                 which stands at four times its size beside the carry
    masked       `where(carry, x, act(x))`: bit for bit

A *code* is what the carry is written as between two linear layers: the layer before encodes it, the
layer behind decodes it, and no layer is added. Behind a Dirac tap a code goes on unchanged, so a
carry is decoded only where it is merged or where its shortcut's own layer stands.

A proven range can be far wider than the values, and a sum with such a shift would drown them in
rounding. So a shift is used only where data show how large the values are: with the proven range if
that costs little, else with the range of the data and as much again on both sides, outside of which
the result is wrong.

No way is chosen that the type has no digits for: see `algebra/digits.py`. Who asks for "relu"
may quantise, so there no way of a large gain is chosen, unless one that multiplies is named beside
"relu".
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence, Set
from dataclasses import dataclass, replace

import torch

from rmfx.algebra.activation import Activation
from rmfx.algebra.affine import AffineConv
from rmfx.algebra.blockwise import WAYS
from rmfx.algebra.digits import (
    EXACTNESS,
    SMALL_GAIN,
    exactness_of_taps,
)
from rmfx.analysis.ranges import Ranges
from rmfx.choices import STRATEGIES
from rmfx.errors import OptionError, Refusal
from rmfx.options import shown

from .assembly import Plan
from .codes import (
    ORDER,
    Stretch,
    Way,
    bounds_of,
    coded,
    linear_layer,
    may_fix,
    scale_code,
    shift_codes,
    uniform_activation,
)
from .column import Column
from .columns import Linear, Normalised, Pointwise, linear_of
from .double_relu import bits_of_clamps, without_clamps
from .odd_pairs import Values, as_pair
from .target import TIME, Target

# Those that pass every carry bit for bit at its own width.
AUTO = ("identity", "scale", "per-channel", "masked")


# Those that need no activation but the network's own, and ReLU; and those that multiply.
SAME_ACTIVATION = ("identity", "scale", "odd-pair", "shift", "double-relu")
MULTIPLYING = {"scale", "odd-pair", "shift"}


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

    @property
    def price(self) -> float:
        """What the plan is chosen by, its activations counted."""
        return self.plan.price + self.plan.beyond


def allowed_ways(activation: str | Collection[str], target: Target = TIME) -> Collection[str]:
    """The strategies that an option allows; "relu" stays among them where gains must be small.

    Args:
        target: may count what an activation costs that differs between channels: an odd pair needs
            none.

    Raises:
        OptionError: there is none of the name.
    """
    names = [activation] if isinstance(activation, str) else [*activation]
    if names == ["auto"]:
        return (*AUTO, "odd-pair") if target.beyond else AUTO
    if not names or not all(isinstance(n, str) and n in (*STRATEGIES, "relu") for n in names):
        raise OptionError(
            f"activation={shown(activation)}: choose 'auto', 'relu' or some of "
            f"{', '.join(STRATEGIES)}"
        )
    chosen = {*names}
    if "relu" not in chosen:
        return chosen
    any_gain = {"relu"} if chosen & MULTIPLYING else set()
    return (chosen | {*SAME_ACTIVATION}) - any_gain


def settle(
    plan: Plan, ranges: Ranges, allowed: Collection[str], dtype: torch.dtype = torch.float32
) -> Settled | Refusal:
    """Choose how the carry passes each activation, by the simplest strategy that is allowed.

    Where the target counts what activations cost that differ between channels, the cheaper of two
    is taken: with them, or with odd pairs.

    Args:
        allowed: names of `STRATEGIES`; with "relu" among them gains must be small.
        dtype: of the values.
    """
    if plan.target.beyond:
        either = ({*allowed} - {"odd-pair"}, {*allowed} - {"per-channel", "masked"})
        found = [_simplest(plan, ranges, ways, dtype) for ways in either]
        fits = [one for one in found if isinstance(one, Settled)]
        sure = [one for one in fits if one.exactness != EXACTNESS[-1]]
        if fits:
            return min(sure or fits, key=lambda settled: settled.price)
    return _simplest(plan, ranges, allowed, dtype)


def _simplest(
    plan: Plan, ranges: Ranges, allowed: Collection[str], dtype: torch.dtype
) -> Settled | Refusal:
    """The same by the simplest strategies, whatever they cost."""
    own = _settle(plan, ranges, allowed, dtype)
    if "double-relu" not in allowed or _is_right(own):
        return own
    other = without_clamps(plan, dtype)
    if other is None:
        return own
    found = _settle(other, ranges, {"identity", *allowed}, dtype)
    if isinstance(found, Refusal) or not (isinstance(own, Refusal) or _is_right(found)):
        return own
    return replace(
        found,
        strategy=max("double-relu", found.strategy, key=ORDER),
        exactness=max("rounding", found.exactness, key=EXACTNESS.index),
        bits=max(found.bits, bits_of_clamps(plan)),
    )


def _is_right(found: Settled | Refusal) -> bool:
    """Whether there is a way that is right for all values."""
    return isinstance(found, Settled) and found.exactness != EXACTNESS[-1]


def _settle(
    plan: Plan, ranges: Ranges, allowed: Collection[str], dtype: torch.dtype
) -> Settled | Refusal:
    """The same with the activations as they are."""
    columns, used = list(plan.columns), list[Way]()
    for stretch in _stretches(columns):
        options = _options(columns, stretch, ranges, allowed, (dtype, plan.target))
        best = _best(options, {*allowed})
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
    changed = plan.with_columns(columns)
    return changed if isinstance(changed, Refusal) else replace(settled, plan=changed)


def _exactness_of_rest(plan: Plan, dtype: torch.dtype) -> str:
    """Of what the columns do to a carry beside its ways past activations."""
    # An identity batch norm takes a mean away and adds it; a single layer adds 1 to weights.
    if len(linear_of(plan.columns)) == 1 or any(
        isinstance(column, Normalised) for column in plan.columns
    ):
        return "rounding"
    return exactness_of_taps(dtype)


def _best(options: Iterator[Way | Refusal], allowed: Set[str]) -> Way | Refusal:
    """The simplest of those allowed; options: see `_options`."""
    first = next(options)
    if isinstance(first, Way) and first.names == {"identity"} and "identity" in allowed:
        return first  # nothing is simpler
    all_of_them = [first, *options]
    found = [one for one in all_of_them if isinstance(one, Way)]
    most = SMALL_GAIN if "relu" in allowed else math.inf
    fits = [one for one in found if one.names <= allowed]
    small = [one for one in fits if one.gain <= most]
    if small:
        return min(small, key=lambda one: ORDER(one.name))
    needed = max(found[0].names - allowed, key=ORDER)
    reasons = [f"it needs the strategy {needed!r}, which the option activation excludes; allow it"]
    reasons += [
        f"or name {one.name!r} beside 'relu', which alone takes a gain of {most:g} at most, here"
        f" {one.gain:.3g}: floating point does not mind, int8 does"
        for one in fits
    ]
    reasons += [one.reason for one in all_of_them if isinstance(one, Refusal)]
    return Refusal("; ".join(reasons))


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
    place: tuple[torch.dtype, Target],
) -> Iterator[Way | Refusal]:
    """Ways to pass all activations of a stretch, the one without a code first.

    A refusal stands for a way that the type has no digits for, or of which too little is known.

    Args:
        place: the type of the values, and what is to be cheap.
    """
    (start, inside, end), (dtype, target) = stretch, place
    acts = {i: c for i in inside if isinstance(c := columns[i], Pointwise)}
    yield _uncoded(acts, ranges, allowed, target)
    fixing = [act for c in acts.values() if (act := may_fix(c))]
    yield from _lacking(fixing, ranges, allowed)
    carried = next(iter(acts.values())).carried
    one_value = all(c.carried is carried for c in acts.values())
    has_norm = any(isinstance(c, Normalised) for c in columns[start:end])
    if carried is None or not one_value or has_norm:
        return
    if not {"scale", "shift", "odd-pair"} & {*allowed}:
        return
    like = linear_layer(columns[start]).carry
    low, high = bounds_of(ranges.of(carried).on_axis(last=not like.dims), like.out_channels)
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
        yield from as_pair(columns, stretch, acts, Values(low, high, data, dtype))


def _lacking(
    fixing: Sequence[Activation], ranges: Ranges, allowed: Collection[str]
) -> Iterator[Refusal]:
    """What the caller could tell, so that a carry may pass activations that leave some values."""
    if not fixing or ranges.weights_vary:
        return
    if {"identity", "scale"} & {*allowed} and not ranges.of_known_inputs:
        yield Refusal("or pass an input_range=(low, high), which may prove that a simpler one does")
    if "shift" in allowed and not ranges.on_data:
        yield Refusal("or pass calibration=[batch, ...], which a shift needs")


def _uncoded(
    acts: dict[int, Pointwise], ranges: Ranges, allowed: Collection[str], target: Target
) -> Way:
    """Every activation acts on the whole column where it leaves the carry as it is."""
    chosen: dict[int, Column] = {}
    names, rounds = set(), False
    for i, column in acts.items():
        act, node = uniform_activation(column), column.carried
        if act is not None and node is not None and ranges.fixed_by(node, act):
            column = replace(column, carry=act)
            rounds = rounds or act.row.rounds
        means = target.means(column.blocks, allowed)
        chosen[i] = replace(column, means=means)
        names.add(WAYS[means])
    return Way(chosen, frozenset(names), "rounding" if rounds else "bit-exact")
