"""Ranges that keep what only clean-up needs: channels whose value is one number.

`Ranges` asks where values lie so that a carry may pass. Here it is refined at the nodes where it
gives up all channels for the sake of a few: a linear layer with rows of zeros behind an unbounded
value, activations that are not monotone, the activations that passes make, flattening and means.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from rmfx.algebra.activation import Activation
from rmfx.algebra.affine import AffineConv
from rmfx.interval import INF, Interval
from rmfx.ir.kinds import AVERAGE_POOLS, is_a
from rmfx.ir.memo import on_demand
from rmfx.ir.net import Net
from rmfx.ir.nodes import MEANS, input_of, keeps_dims
from rmfx.ir.notes import shape_of, why_frozen
from rmfx.ir.reading import read, read_affine

from .ranges import ANYTHING, Range, Ranges, activation_range


class PinnedRanges:
    """Ranges of the values of one net, computed on demand and kept.

    Args:
        net: the net.
        input_range: of the inputs, if known.
    """

    def __init__(self, net: Net, input_range: Interval | None = None) -> None:
        self._net = net
        self._ranges = Ranges(net, input_range)
        self._known: dict[fx.Node, Range] = {}

    def of(self, node: fx.Node) -> Range:
        """The range of a node's value."""
        return on_demand(node, self._known, self._compute)

    def numbers(self, node: fx.Node, channels: int, dims: int) -> tuple[Tensor, Tensor]:
        """Which channels of a value are one finite number, and that number (else 0)."""
        x = self.of(node).on_axis(last=not dims)
        if x.low.numel() not in (1, channels):
            x = ANYTHING
        low, high = x.low.expand(channels), x.high.expand(channels)
        same = (low == high) & low.isfinite()
        return same, torch.where(same, low, 0.0)

    def keep(self, node: fx.Node, chosen: Tensor) -> None:
        """Note that of a node's channels only some are left; chosen: (channels,) booleans."""
        x = self.of(node)
        if x.low.numel() == 1:
            return
        fits = x.low.numel() == chosen.numel()
        self._set(node, Range(x.low[chosen], x.high[chosen], x.last) if fits else ANYTHING)

    def _set(self, node: fx.Node, value: Range) -> None:
        self._known[node] = value
        self._ranges.set(node, value)

    def _compute(self, node: fx.Node) -> Range:
        found = self._ranges.of(node)
        source = input_of(node)
        if why_frozen(node) or source is None or node.op == "output":
            return found
        refined = self._refined(node, self._known[source], found)
        if refined is not None:
            self._ranges.set(node, refined)
        return refined or found

    def _refined(self, node: fx.Node, x: Range, found: Range) -> Range | None:
        net = self._net
        module: Any = net.callee(node)
        if type(module) in AVERAGE_POOLS and module.ceil_mode and net.guard(node) is None:
            return _rounded_up(module, x)
        if type(module) is nn.Flatten and net.guard(node) is None:
            return _flattened(net, node, x)
        if node.target in MEANS:
            kept = keeps_dims(node, (net.rank(node.all_input_nodes[0]) or 0) - 2)
            # Without space the channels are the last dimension.
            return None if kept is None or x.last else Range(x.low, x.high, last=not kept)
        element = read(net, node)
        if isinstance(element, Activation):
            on_features = element.is_per_channel and x.last and net.rank(node) == 2
            return activation_range(element, x) if on_features else None  # which are dimension 1
        return _zero_rows(net, node) if found.unbounded else None


def features_behind(net: Net, flatten: fx.Node) -> int | None:
    """Features of a flattened value: from its shape, else from the Linear layer that reads it."""
    shape = shape_of(flatten)
    if shape is not None:
        fixed = isinstance(shape[-1], int) and not net.is_open(flatten, len(shape) - 1)
        return shape[-1] if fixed else None
    here = flatten
    while len(here.users) == 1:
        here = next(iter(here.users))
        element = read(net, here)
        if isinstance(element, AffineConv):
            return element.in_channels if not element.dims else None
        if not isinstance(element, Activation) and not is_a(net.module(here), nn.Dropout):
            return None
    return None


def _flattened(net: Net, node: fx.Node, x: Range) -> Range | None:
    module: Any = net.callee(node)
    features = features_behind(net, node)
    whole = (module.start_dim, module.end_dim) == (1, -1)
    if not whole or features is None or x.last or features % x.low.numel():
        return None
    each = features // x.low.numel() if x.low.numel() > 1 else 1
    return Range(x.low.repeat_interleave(each), x.high.repeat_interleave(each), last=True)


def _rounded_up(module: Any, x: Range) -> Range:
    """Windows that reach over the edge average what is there; a padded or fixed count does not."""
    padding = (module.padding,) if isinstance(module.padding, int) else module.padding
    if any(padding) or getattr(module, "divisor_override", None):
        return ANYTHING
    return x.on_axis(last=False)


def _zero_rows(net: Net, node: fx.Node) -> Range | None:
    """A linear layer's outputs that its input does not reach are its bias."""
    layer = read_affine(net, node)
    if not isinstance(layer, AffineConv):
        return None
    reached = (layer.weight.flatten(1) != 0).any(1).cpu()
    if bool(reached.all()):
        return None
    bias = layer.bias.detach().to("cpu", torch.float64)
    low, high = torch.where(reached, -INF, bias), torch.where(reached, INF, bias)
    return Range(low, high, last=not layer.dims)
