"""Carries: channels of a value that every node since a layer has handed on.

With u what that layer reads, F its filters, and every node since handing channel k on by one tap,

    x_k[n]  =  f_k · F_r(k)(u)[way(n)]

where r(k) is the filter, f_k the product of the weights met on the way, and `way` the place, again
a layer of one tap. A layer hands a channel on where an output has one weight and no bias; where
another output reads the channel as well, a carry begins anew.

Forms handled: Conv1d/2d/3d and Linear of any stride and layout; activations that provably leave
channels alone (by range, PReLU slope 1, bounds, or a mask); products with what is 1 on them;
indices that take channels in any order.
Not followed: taps that read padding somewhere, since zeros there are none of F's values; pairs
[x; -x]; what is shifted into a bounded activation; modules with hooks, shared ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmfx.algebra.activation import Activation, Block
from rmfx.algebra.affine import AffineConv
from rmfx.algebra.blockwise import Blockwise
from rmfx.algebra.laws import reads_inside
from rmfx.algebra.products import compose
from rmfx.analysis.constant_channels import PinnedRanges
from rmfx.errors import Refusal
from rmfx.interval import Interval
from rmfx.ir.kinds import NO_OPS, is_a
from rmfx.ir.memo import on_demand
from rmfx.ir.net import Net
from rmfx.ir.nodes import input_of
from rmfx.ir.notes import shape_of, why_frozen
from rmfx.ir.reading import read
from rmfx.ir.selections import may_select, selected
from rmfx.modules.activations import OWN_ACTIVATIONS


@dataclass(frozen=True, eq=False)
class Carry:
    """Channels of a value that a layer made and all nodes since have handed on.

    Attributes:
        source: what that layer reads.
        first: the layer.
        rows: (channels,) which of its outputs, -1 where it is none.
        factors: (channels,) by what they have been multiplied since.
        weights: (channels,) how many the layers have for them, the first one too; see `weights_of`.
        way: which of its places they are, as a layer of one channel and one tap.
    """

    source: fx.Node
    first: AffineConv
    rows: Tensor
    factors: Tensor
    weights: Tensor
    way: AffineConv

    def only(self, keep: Tensor) -> Carry:
        """The same without some channels; keep: (channels,) booleans."""
        return replace(self, rows=torch.where(keep, self.rows, -1))


Carries = tuple[Carry, ...]


class Origins:
    """The carries in every value of a net."""

    def __init__(self, net: Net, input_range: Interval | None) -> None:
        self._net = net
        self._ranges = PinnedRanges(net, input_range)
        self._known: dict[fx.Node, Carries] = {}

    def of(self, node: fx.Node) -> Carries:
        return on_demand(node, self._known, self._compute)

    def _compute(self, node: fx.Node) -> Carries:
        if node.target is torch.mul and len(node.all_input_nodes) == 2:
            return self._gated(node)
        source = input_of(node)
        if source is None or why_frozen(node):
            return ()
        if may_select(self._net, node):
            return self._selected(node, source)
        if node.op != "call_module":
            return ()
        element = read(self._net, node)
        if isinstance(element, AffineConv):
            before = [c for c in self._known[source] if c.first.dims == element.dims]
            found = _through_layer(element, source, before)
            # Behind the carry, what is written to may be another value.
            return tuple(c for c in found if not why_frozen(c.source))
        left = [c.only(self._passed(node, source, c)) for c in self._known[source]]
        return tuple(c for c in left if bool((c.rows >= 0).any()))

    def _selected(self, node: fx.Node, source: fx.Node) -> Carries:
        """Behind an index into channels: some of them, in another order."""
        found: list[Carry] = []
        if self._net.guard(node) is not None:
            return ()
        for carry in self._known[source]:
            chosen = selected(self._net, node, len(carry.rows), carry.first.dims)
            if chosen is not None:
                rows, factors, weights = (
                    t[chosen] for t in (carry.rows, carry.factors, carry.weights)
                )
                found.append(replace(carry, rows=rows, factors=factors, weights=weights))
        return tuple(c for c in found if bool((c.rows >= 0).any()))

    def _gated(self, node: fx.Node) -> Carries:
        """Behind a product: what the other factor provably multiplies by 1."""
        found: list[Carry] = []
        for value, gate in itertools.permutations(node.all_input_nodes):
            if shape_of(value) != shape_of(node):
                continue  # it is repeated over space
            for carry in self._known[value]:
                count = len(carry.rows)
                number, size = self._ranges.numbers(gate, count, carry.first.dims)
                left = carry.only(number & (size == 1))
                found += [left] if bool((left.rows >= 0).any()) else []
        return tuple(found)

    def _passed(self, node: fx.Node, source: fx.Node, carry: Carry) -> Tensor:
        """Which channels an activation provably leaves as they are, (channels,) booleans."""
        count, dims = len(carry.rows), carry.first.dims
        nothing = torch.zeros(count, dtype=torch.bool)
        module: Any = self._net.callee(node)
        if self._net.guard(node) is not None:
            return nothing
        if is_a(module, NO_OPS):
            return ~nothing
        x = self._ranges.of(source).on_axis(last=not dims)
        if x.low.numel() not in (1, count) or not self._is_on_axis(module, source, carry):
            return nothing
        element = read(self._net, node)
        blocks = element.over(count) if isinstance(element, Activation | Blockwise) else ()
        widths = [block.width for block in blocks]
        if sum(widths) != count:
            return nothing
        ends = (end.expand(count).split(widths) for end in (x.low, x.high))
        return torch.cat([*map(_left_alone, blocks, *ends)])

    def _is_on_axis(self, module: nn.Module | None, source: fx.Node, carry: Carry) -> bool:
        """Whether what an activation has for each channel belongs to the carry's channels."""
        own = [*module.parameters(), *module.buffers()] if module is not None else []
        sizes = {t.numel() for t in own if t.dim()}
        if sizes <= {1}:
            return True
        if isinstance(module, OWN_ACTIVATIONS):
            placed = all(t.dim() == carry.first.dims + 1 for t in own if t.numel() > 1)
        else:  # dimension 1
            placed = carry.first.dims > 0 or self._net.rank(source) == 2
        return placed and sizes <= {1, len(carry.rows)}


def _through_layer(layer: AffineConv, x: fx.Node, before: Sequence[Carry]) -> Carries:
    """The carries behind a layer: it begins one, and outputs of one weight hand channels on."""
    total = layer.out_channels
    nowhere = torch.full((total,), -1)
    own = torch.arange(total)
    found: dict[tuple[int, int], Carry] = {}
    weights = weights_of(layer)
    alone = _readers(layer) == 1
    for row, column, tap, weight in _single_weights(layer):
        # Where a channel is read by others, too, a carry begins.
        carry = next((c for c in before if c.rows[column] >= 0 and alone[column]), None)
        way = None if carry is None else _hop(layer, tap, carry.way)
        if carry is None or way is None:
            continue
        key = (id(carry), tap)
        if key not in found:
            empty = nowhere.clone()
            sizes = empty.to(torch.float64), empty.clone()
            found[key] = Carry(carry.source, carry.first, empty, *sizes, way)
        found[key].rows[row] = carry.rows[column]
        found[key].factors[row] = carry.factors[column] * weight
        found[key].weights[row] = carry.weights[column] + weights[row]
        own[row] = -1
    identity = AffineConv.identity(1, layer.dims)
    begins = Carry(x, layer, own, torch.ones(total, dtype=torch.float64), weights, identity)
    return (*found.values(), begins)


def weights_of(layer: AffineConv) -> Tensor:
    """How many weights each output has for the inputs that it reads: (out,)."""
    reads = (layer.weight.detach() != 0).reshape(*layer.weight.shape[:2], -1).any(2)
    return reads.sum(1).cpu() * math.prod(layer.kernel)


def _readers(layer: AffineConv) -> Tensor:
    """How many outputs read each input: (in,)."""
    reads = (layer.weight.detach() != 0).reshape(*layer.weight.shape[:2], -1).any(2)
    found: Tensor = reads.unflatten(0, (layer.groups, -1)).sum(1)
    return found.flatten().cpu()


def hands_on(layer: AffineConv) -> Tensor:
    """Which outputs have one weight and no bias: (out,) booleans."""
    weights = (layer.weight.detach() != 0).flatten(1).sum(1)
    return ((weights == 1) & (layer.bias.detach() == 0)).cpu()


def _single_weights(layer: AffineConv) -> list[tuple[int, int, int, float]]:
    """Output, input, tap and weight of the outputs that hand a channel on."""
    weight = layer.weight.detach().cpu().flatten(1)
    rows = hands_on(layer).nonzero().flatten()
    place = (weight[rows] != 0).int().argmax(1)
    size = math.prod(layer.kernel)
    n_in, n_out = layer.block
    columns = place // size + rows // n_out * n_in
    own = weight[rows, place].to(torch.float64)
    return list(
        zip(rows.tolist(), columns.tolist(), (place % size).tolist(), own.tolist(), strict=True)
    )


def _hop(layer: AffineConv, tap: int, way: AffineConv) -> AffineConv | None:
    """Where one tap of a layer reads, behind the way up to the layer; None if outside the map."""
    only = torch.zeros(1, 1, math.prod(layer.kernel), dtype=torch.float64)
    only[..., tap] = 1
    own = replace(
        layer,
        weight=only.reshape(1, 1, *layer.kernel),
        bias=torch.zeros(1, dtype=torch.float64),
        groups=1,
    )
    own = trimmed(own)
    if not reads_inside(own):
        return None
    whole = compose(own, way)
    return None if isinstance(whole, Refusal) or not reads_inside(whole) else whole


def trimmed(layer: AffineConv) -> AffineConv:
    """The same layer without taps at the edges of its kernel that are zero everywhere."""
    weight, padding = layer.weight, []
    for i in range(layer.dims):
        used = (weight != 0).transpose(0, i + 2).flatten(1).any(1).nonzero().flatten().tolist()
        size, step = weight.shape[i + 2], layer.dilation[i]
        first, last = (used[0], used[-1]) if used else (0, 0)
        left, right = layer.padding[i]
        padding.append((left - first * step, right - (size - 1 - last) * step))
        weight = weight.narrow(i + 2, first, last - first + 1)
    return replace(layer, weight=weight, padding=tuple(padding))


def _left_alone(block: Block, low: Tensor, high: Tensor) -> Tensor:
    """Which channels of a block between two bounds an activation returns unchanged."""
    if block.activation is None:
        return torch.ones_like(low, dtype=torch.bool)
    if isinstance(block.activation.module, nn.PReLU):
        slope = block.activation.module.weight.detach().cpu().flatten()
        return (slope == 1) | (low >= 0)
    begin, end = block.activation.identity
    return (begin <= low) & (high <= end)
