"""Interval analysis: between which bounds does every channel of every value lie?

Forward over the graph, channel by channel. A linear layer splits its weights into positive and
negative parts, low = b + W⁺·low + W⁻·high, where 0 joins the input's interval if zero padding is
read; an activation maps the interval through its table row. Unknown operations, and inputs without
a given range, are (−∞, ∞). The result is never narrower than the truth for finite inputs (up to
rounding of the analysis in float64).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import is_fake

from rmfx.algebra.activation import Activation
from rmfx.algebra.affine import AffineConv
from rmfx.algebra.blockwise import Blockwise
from rmfx.errors import OptionError, Refusal, RmfxError
from rmfx.interval import INF, Interval
from rmfx.ir.elements import Border, Deferred
from rmfx.ir.joins import read_join
from rmfx.ir.kinds import HULLS
from rmfx.ir.memo import on_demand
from rmfx.ir.net import Net
from rmfx.ir.nodes import input_of
from rmfx.ir.notes import gives_number, why_frozen
from rmfx.ir.reading import read, read_affine
from rmfx.ir.selections import may_select, selected
from rmfx.options import as_tuple, shown

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Range:
    """low ≤ x ≤ high; tensors of shape (channels,), or (1,) for all channels alike.

    Attributes:
        last: whether channels are the last dimension (behind a Linear layer) instead of the one
            after the batch.
    """

    low: Tensor
    high: Tensor
    last: bool = False

    def on_axis(self, *, last: bool) -> Range:
        """The range per channel of the other axis: the hull, unless the axis is the same."""
        if last == self.last:
            return self
        return Range(self.low.min().reshape(1), self.high.max().reshape(1), last)

    def hull(self, other: Range) -> Range:
        """What holds both, of one axis: channel by channel where both have as many."""
        one, two = self, other
        if one.low.numel() != two.low.numel():
            one, two = (Range(x.low.min()[None], x.high.max()[None], x.last) for x in (one, two))
        return Range(torch.minimum(one.low, two.low), torch.maximum(one.high, two.high), self.last)

    @staticmethod
    def of(low: float, high: float) -> Range:
        ends = torch.tensor([[low], [high]], dtype=torch.float64)
        return Range(ends[0], ends[1])

    @property
    def unbounded(self) -> bool:
        return bool(torch.isneginf(self.low).all() and torch.isposinf(self.high).all())


ANYTHING = Range.of(-INF, INF)


def affine_range(layer: AffineConv, x: Range) -> Range:
    """Range of a linear layer's output for inputs in `x`."""
    low, high = x.low, x.high
    if x.unbounded:
        return ANYTHING
    if not bool(low.any()) and bool(torch.isposinf(high).all()):
        return _of_half_line(layer)
    if layer.pads:
        low, high = low.clamp(max=0), high.clamp(min=0)
    n_in, n_out = layer.block
    low = low.expand(layer.in_channels).reshape(layer.groups, n_in, 1)
    high = high.expand(layer.in_channels).reshape(layer.groups, n_in, 1)
    weight = layer.weight.to("cpu", torch.float64).reshape(layer.groups, n_out, n_in, -1)
    up, down = weight.clamp(min=0).sum(-1), weight.clamp(max=0).sum(-1)
    bias = layer.bias.to("cpu", torch.float64)
    least = bias + (_product(up, low) + _product(down, high)).flatten()
    most = bias + (_product(up, high) + _product(down, low)).flatten()
    return Range(least, most, last=not layer.dims)


def _of_half_line(layer: AffineConv) -> Range:
    """Range for inputs in [0, ∞), the most common case: only the signs of the weights matter."""
    weight, bias = layer.weight.flatten(1), layer.bias.to(torch.float64)
    least = torch.where(weight.amin(1) < 0, -INF, bias)
    most = torch.where(weight.amax(1) > 0, INF, bias)
    return Range(least.cpu(), most.cpu(), last=not layer.dims)


def _product(weight: Tensor, bound: Tensor) -> Tensor:
    """weight @ bound where 0 · ∞ is 0, for weights of one sign and bounds of one side."""
    finite = torch.isfinite(bound)
    total = weight @ torch.where(finite, bound, 0.0)
    endless = (weight != 0).to(weight) @ (~finite).to(weight) > 0
    sign = torch.where((weight @ torch.where(finite, 0.0, bound.sign())) > 0, INF, -INF)
    return torch.where(endless, sign, total)


def activation_range(activation: Activation, x: Range) -> Range:
    """Range of an activation's output for inputs in `x`."""
    low, high = activation.image
    if activation.row.slope is not None:
        ends = [_sloped(activation, v) for v in (x.low, x.high)]
        # Piecewise linear with its kink at 0: the extremes lie at the ends and at 0.
        zero = torch.zeros_like(ends[0])
        crosses = (x.low < 0) & (x.high > 0)
        ends.append(torch.where(crosses, zero, ends[0]))
        stacked = torch.stack(ends)
        return Range(stacked.amin(0), stacked.amax(0), x.last)
    if activation.row.monotone:
        # At infinity a formula may be undefined; the image bounds it there.
        ends = [activation.apply(x.low).nan_to_num(low), activation.apply(x.high).nan_to_num(high)]
        return Range(ends[0].clamp(min=low), ends[1].clamp(max=high), x.last)
    if activation.fixes(x.low, x.high):
        return x
    same = (x.low == x.high) & x.low.isfinite()
    if not bool(same.any()):
        return Range.of(low, high)
    value = activation.apply(torch.where(same, x.low, 0.0))  # of a number it is a number
    same = same & value.isfinite()
    return Range(torch.where(same, value, low), torch.where(same, value, high), x.last)


def _blockwise_range(layer: Blockwise, x: Range) -> Range:
    total = sum(b.width for b in layer.blocks)
    widths = [b.width for b in layer.blocks]
    lows, highs = x.low.expand(total).split(widths), x.high.expand(total).split(widths)
    parts = [
        activation_range(b.activation, Range(low, high)) if b.activation else Range(low, high)
        for b, low, high in zip(layer.blocks, lows, highs, strict=True)
    ]
    return Range(
        torch.cat([p.low.expand(w) for p, w in zip(parts, widths, strict=True)]),
        torch.cat([p.high.expand(w) for p, w in zip(parts, widths, strict=True)]),
        x.last,
    )


def _sloped(activation: Activation, x: Tensor) -> Tensor:
    slope = activation.row.slope(activation.module) if activation.row.slope else 1.0
    slope = torch.as_tensor(slope, dtype=torch.float64).cpu().reshape(-1)
    below = torch.where(slope == 0, torch.zeros_like(slope), slope * x.clamp(max=0))
    return torch.where(x > 0, x, below)


def check_range(input_range: Interval | None, inputs: Any = ()) -> None:
    """Raise RmfxError unless it is None or (low, high), and inputs hold no numbers outside of it.

    Tensors of zeros stand for their shapes.
    """
    if input_range is None:
        return
    is_pair = isinstance(input_range, (tuple, list)) and len(input_range) == 2
    if not is_pair or not all(map(_is_bound, input_range)) or not input_range[0] <= input_range[1]:
        raise RmfxError(f"input_range={shown(input_range)}: pass (low, high) with low <= high")
    low, high = input_range
    for x in as_tuple(inputs):
        if not isinstance(x, Tensor) or x.dtype not in FLOATS or is_fake(x) or x.is_meta:
            continue
        if x.layout is not torch.strided or not x.any():
            continue
        if outside := numbers_outside(x, (low, high)):
            raise OptionError(
                f"input_range=({low:g}, {high:g}): the example inputs hold {outside}; give the "
                "range of all inputs"
            )


def numbers_outside(x: Tensor, bounds: Interval) -> str:
    """What a tensor holds that has numbers outside of a range; "" for others."""
    low, high = bounds
    if bool(((low <= x) & (x <= high)).all()):
        return ""
    return "NaN" if x.isnan().any() else f"numbers from {float(x.min()):g} to {float(x.max()):g}"


def _is_bound(value: object) -> bool:
    """Whether a value is a number, and no whole one that is too large for a float."""
    if not isinstance(value, (int, float)):
        return False
    return isinstance(value, float) or abs(value) <= torch.finfo(torch.float64).max


class Ranges:
    """Ranges of the values of one net, computed on demand and kept.

    Args:
        net: the net.
        input_range: of the inputs, if known.
        weights_vary: whether weights may change, so that they prove nothing, and gradients count.
        measured: extremes found on data, by node name: with the channels in dimension 1, and with
            the channels last.

    Attributes:
        of_known_inputs: whether a range of the inputs was given.
        on_data: whether extremes were.
    """

    def __init__(
        self,
        net: Net,
        input_range: Interval | None = None,
        *,
        weights_vary: bool = False,
        measured: Mapping[str, tuple[Range, Range]] | None = None,
    ) -> None:
        self._measured = measured or {}
        self._net = net
        self.weights_vary = weights_vary
        self._input = Range.of(*input_range) if input_range else ANYTHING
        self.of_known_inputs = input_range is not None
        self.on_data = bool(self._measured)
        if weights_vary:  # at the very ends of an activation's identity its gradient is another one
            self._input = _beyond(self._input)
        self._known: dict[fx.Node, Range] = {}

    def of(self, node: fx.Node) -> Range:
        """The range of a node's value."""
        return on_demand(node, self._known, self._compute)

    def measured(self, node: fx.Node, *, last: bool) -> Range | None:
        """The extremes of a node's value on the data that were given, None if none were."""
        found = self._measured.get(self._net.stands_for(node) or "")
        return found and found[last]

    def set(self, node: fx.Node, value: Range) -> None:
        """Let a new node have the range of the value it stands for."""
        self._known[node] = value

    def known(self, node: fx.Node) -> Range | None:
        return self._known.get(node)

    def fixed_by(self, node: fx.Node, activation: Activation) -> bool:
        """Whether `activation` provably leaves a node's value as it is.

        The last activation before the node often proves it alone; only then is the graph walked.
        """
        here = node
        while self._passes_values(here):
            here = here.all_input_nodes[0]
        element = read(self._net, here) if here.op == "call_module" else None
        if isinstance(element, Activation) and activation.fixes_all_of(*element.image):
            return True
        x = self.of(node)
        return activation.fixes(x.low, x.high)

    def _compute(self, node: fx.Node) -> Range:
        if why_frozen(node) or gives_number(node):
            return ANYTHING
        if node.op == "placeholder":
            return self._input
        terms = read_join(node)
        if isinstance(terms, Refusal):
            return ANYTHING
        if terms is not None:
            return self._sum(terms)
        x = input_of(node)
        if x is None:
            return ANYTHING
        if self._passes_values(node):
            # Pooling runs over dimensions after the channels, or over what would be channels.
            return self._known[x].on_axis(last=False)
        if type(self._net.module(node)) is nn.Flatten and self._net.guard(node) is None:
            return _hull(self._known[x])
        return self._through(node, self._known[x])

    def _passes_values(self, node: fx.Node) -> bool:
        """Whether a node's values lie between those of its input."""
        known = type(self._net.module(node)) in HULLS and len(node.all_input_nodes) == 1
        return known and not why_frozen(node) and self._net.guard(node) is None

    def _through(self, node: fx.Node, x: Range) -> Range:
        if may_select(self._net, node) and self._net.guard(node) is None:
            return self._of_selection(node, x)
        element = read(self._net, node) if node.op != "output" else Refusal("")
        if isinstance(element, Deferred):
            element = read_affine(self._net, node)
        if isinstance(element, Refusal) or (self.weights_vary and element.has_parameters):
            return ANYTHING
        if isinstance(element, Activation):
            # Slopes per channel belong to dimension 1.
            return activation_range(element, x.on_axis(last=False) if element.is_per_channel else x)
        if isinstance(element, Blockwise):
            return _blockwise_range(element, x.on_axis(last=not element.dims))
        if isinstance(element, Border):
            mode, value = element.filling
            in_space = self._net.rank(node) == element.dims + 2  # else it pads channels, too
            x = x.on_axis(last=False) if in_space else _hull(x)
            if mode != "constant":  # it repeats what is there
                return x
            return Range(x.low.clamp(max=value), x.high.clamp(min=value), x.last)
        if not isinstance(element, AffineConv) or self.weights_vary:
            return ANYTHING
        x = x.on_axis(last=not element.dims)
        return affine_range(element, x) if x.low.numel() in (1, element.in_channels) else ANYTHING

    def _of_selection(self, node: fx.Node, x: Range) -> Range:
        """Of some channels, each with its own range."""
        rank = self._net.rank(node)
        source = input_of(node)
        channels = None if rank is None or source is None else self._net.channels(source, rank - 2)
        if rank is None or channels is None:
            return ANYTHING
        rows = selected(self._net, node, channels, rank - 2)
        x = x.on_axis(last=rank == 2)
        if rows is None or x.low.numel() not in (1, channels):
            return ANYTHING
        return Range(x.low.expand(channels)[rows], x.high.expand(channels)[rows], x.last)

    def _sum(self, terms: tuple[tuple[fx.Node, float], ...]) -> Range:
        low, high = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        last = self._known[terms[0][0]].last
        for node, factor in terms:
            x = self._known[node].on_axis(last=last)
            if x.low.numel() != low.numel() and 1 not in (x.low.numel(), low.numel()):
                return ANYTHING
            ends = (x.low, x.high) if factor >= 0 else (x.high, x.low)
            if factor == 0:
                continue
            low, high = low + factor * ends[0], high + factor * ends[1]
        return Range(low, high, last)


def _beyond(x: Range) -> Range:
    """A range that holds another one in its inside."""
    end = torch.tensor(INF, dtype=torch.float64)
    return Range(torch.nextafter(x.low, -end), torch.nextafter(x.high, end), x.last)


def _hull(x: Range) -> Range:
    return Range(x.low.min().reshape(1), x.high.max().reshape(1))
