"""A carry that passes activations as an odd pair: x travels as [x; −x], at twice the channels.

It comes back because act(x) − act(−x) = κ·x; see `rmfx.algebra.activation.Activation.odd`. Beside
slopes that differ between channels the pair has slope 0: [x; −x] becomes [x⁺; x⁻].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rmfx.algebra.activation import Activation
from rmfx.algebra.affine import AffineConv
from rmfx.algebra.blockwise import all_means
from rmfx.algebra.digits import affords, factor_up_or_down, smallest_scale
from rmfx.algebra.laws import direct_sum, join, stack
from rmfx.algebra.products import chain
from rmfx.errors import Refusal

from .codes import (
    Bounds,
    Stretch,
    Way,
    exactness_of_scale,
    linear_layer,
    loses_weights,
    no_digits,
    power_of_two,
    scale_into,
)
from .column import Column
from .columns import Linear, Pointwise


@dataclass(frozen=True, eq=False)
class Values:
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


def as_pair(
    columns: Sequence[Column], stretch: Stretch, acts: dict[int, Pointwise], values: Values
) -> Iterator[Way | Refusal]:
    """The stretch with its carry as [s·x; −s·x], decoded and written anew between activations.

    Behind ReLU the pair is [x⁺; x⁻], which the next ReLU leaves alone: there it goes on as it is.
    """
    start, _, end = stretch
    odd = {i: law for i, c in acts.items() if (law := _beside(c)) is not None}
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
        chosen[i] = replace(act, carry=odd[i], widths=(act.widths[0], 2 * act.widths[1]))
    yield replace(fact, columns=chosen)


def _beside(column: Pointwise) -> Activation | None:
    """What a pair goes through beside an activation, None if it cannot.

    It is the activation itself, or ReLU where there is a slope for each channel already.
    """
    main = column.main
    if isinstance(main, Activation) and main.odd:
        return main
    sloped = main is not None and main.is_per_channel
    return Activation(nn.ReLU()) if sloped and "slopes" in all_means(column.blocks) else None


def _scale_of_pair(
    acts: Sequence[Activation], values: Values
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
