"""Nodes beside the chain: combinations with other tensors, and what others read of a wide value.

In a chain a value stands as [main; carry]. Where the branch multiplies, adds, chooses or
concatenates other tensors, those get ones, zeros, what is not chosen or nothing for the carry.
Where something off the branch reads the main block, it gets a slice; one that is followed by
pooling is taken behind the pooling, next to a layer that it can be merged into.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from rmfx.algebra.affine import AffineConv
from rmfx.algebra.laws import in_turn
from rmfx.errors import fault
from rmfx.ir.elements import Border, ByChannel, Virtual
from rmfx.ir.functions import reads_sizes_alone
from rmfx.ir.laterals import Lateral
from rmfx.ir.net import Net
from rmfx.ir.nodes import data_input
from rmfx.ir.notes import (
    ORIGIN,
    TYPE,
    Shape,
    notes_of,
    set_shape,
    shape_of,
    with_channels,
    without_notes,
)
from rmfx.ir.reading import is_spatial_pool, read

# Far enough to give exactly 1 in every floating type.
ONE_AT: dict[type[nn.Module], float] = {nn.Sigmoid: 40.0, nn.Hardsigmoid: 4.0}
Widths = tuple[int, int]


@dataclass(frozen=True)
class Share:
    """One block of a wide value.

    Attributes:
        block: 0 or 1.
        widths: channels of both blocks.
        runs: in which they take turns.
    """

    block: int
    widths: Widths
    runs: int

    def taken(self, net: Net, wide: fx.Node, dims: int) -> fx.Node:
        """Its channels, at the graph's insert point."""
        count = self.widths[self.block]
        start = self.widths[0] * self.block
        if self.runs == 1:
            return take(net, wide, start, start + count, dims)
        numbers = torch.arange(sum(self.widths)).reshape(self.runs, -1)
        begin = start // self.runs
        own = numbers[:, begin : begin + count // self.runs]
        return pick(net, wide, own.flatten().tolist(), dims)


def may_take_turns(lateral: Lateral) -> bool:
    """Whether a combination may act on one block of a value in which both take turns.

    A factor of one position for each channel is put in their order for next to nothing.
    """
    spread = spread_like_the_value(lateral)
    shapes = [shape_of(spread.get(gate, gate)) for gate in lateral.others]
    small = all(shape is not None and set(shape[2:]) <= {1} for shape in shapes)
    return lateral.node.target is torch.mul and small


def spread_like_the_value(lateral: Lateral) -> dict[fx.Node, fx.Node]:
    """The other tensors that are spread out to the shape of the value, and what they spread out.

    To be asked before anything is rewritten.
    """
    alone = [x for x in lateral.others if x.target == "expand_as" and len(x.users) == 1]
    pairs = [(x, x.args[0]) for x in alone if x.args[1:] == (lateral.value,) and not x.kwargs]
    found: dict[fx.Node, fx.Node] = {}
    for spread, source in pairs:
        shapes = [shape_of(n) for n in (source, lateral.value) if isinstance(n, fx.Node)]
        # With fewer dimensions its channels would be another one of them.
        if isinstance(source, fx.Node) and None not in shapes and len({*map(len, shapes)}) == 1:
            found[spread] = source
    return found


@dataclass(frozen=True)
class _Room:
    """Constant channels before and behind those of an operand, in each run.

    Attributes:
        sizes: how many there are before and behind.
        value: of the constant.
        dims: spatial dimensions.
        runs: in which they take turns with the operand's own.
    """

    sizes: Widths
    value: float
    dims: int
    runs: int


def combine(
    net: Net,
    lateral: Lateral,
    wide: fx.Node,
    share: Share,
    dims: int,
    spread: Mapping[fx.Node, fx.Node],
) -> fx.Node:
    """The lateral's operation on one block of a wide value, at the graph's insert point.

    Args:
        wide: holds both blocks.
        share: which of them the operation concerns.
        spread: see `spread_like_the_value`.
    """
    block, widths, runs = share.block, share.widths, share.runs
    if lateral.is_concatenation:
        return _concatenate(net, lateral, wide, block, widths, dims)
    sizes = (0, widths[1]) if block == 0 else (widths[0], 0)
    operands = [
        _filled(net, lateral.node, x, widths[block], _Room(sizes, value, dims, runs))
        if isinstance(x, fx.Node) and x not in spread and value is not None
        else x
        for x, value in zip(lateral.operands, lateral.neutral, strict=True)
    ]
    operands[lateral.place] = wide
    for i, x in enumerate(operands):
        if x in spread and lateral.neutral[i] is not None:
            # Spread out behind the constants: before them it would be a whole map to copy.
            room = _Room(sizes, lateral.neutral[i] or 0.0, dims, runs)
            inner = _filled(net, x, spread[x], widths[block], room)
            operands[i] = _like(net.graph.call_method("expand_as", (inner, wide)), wide, None)
    node = lateral.node
    made = net.graph.call_function(node.target, tuple(operands), dict(node.kwargs))  # type: ignore[arg-type]
    return _like(made, lateral.node, _resized(lateral.node, sum(widths), dims))


def _concatenate(
    net: Net, lateral: Lateral, wide: fx.Node, block: int, widths: Widths, dims: int
) -> fx.Node:
    before, after = lateral.operands[: lateral.place], lateral.operands[lateral.place + 1 :]
    first, second = (block == 0 and after), (block == 1 and before)
    parts = [wide]
    if first or second:
        parts = [
            take(net, wide, 0, widths[0], dims),
            take(net, wide, widths[0], sum(widths), dims),
        ]
    ours = [*before, parts[-1] if block else parts[0], *after]
    rest = parts[:-1] if block else parts[1:]
    operands = [*rest, *ours] if block else [*ours, *rest]
    made = net.graph.call_function(torch.cat, (operands, lateral.node.args[1]))
    width = lateral.channels_behind(sum(widths), dims)
    return _like(made, lateral.node, _resized(wide, width, dims))


def call_again(net: Net, layer: Border | ByChannel, wide: fx.Node, width: int) -> fx.Node:
    """The padding, pool or interpolation of a wide value, at the graph's insert point."""
    source = data_input(layer.node)
    made = net.graph.node_copy(layer.node, lambda n: wide if n is source else n)
    return _like(made, layer.node, _resized(layer.node, width, layer.dims))


def take(net: Net, wide: fx.Node, start: int, stop: int, dims: int) -> fx.Node:
    """Channels `start` to `stop` of a value, at the graph's insert point."""
    return _pick(net, wide, slice(start or None, stop), stop - start, dims)


def pick(net: Net, wide: fx.Node, channels: list[int], dims: int) -> fx.Node:
    """Some channels of a value, at the graph's insert point."""
    start, count = channels[0], len(channels)
    if channels == [*range(start, start + count)]:
        return take(net, wide, start, start + count, dims)
    return _pick(net, wide, channels, count, dims)


def _pick(net: Net, wide: fx.Node, channels: slice | list[int], count: int, dims: int) -> fx.Node:
    index: Any = (slice(None), channels) if dims else (..., channels)
    made = net.graph.call_function(operator.getitem, (wide, index))
    return _like(made, wide, _resized(wide, count, dims))


def tap(
    net: Net, wide: fx.Node, value: fx.Node, share: Share, readers: Sequence[fx.Node], dims: int
) -> dict[fx.Node, fx.Node]:
    """Let the readers of an old value read its channels of a wide one.

    Returns:
        The slices, by the old nodes whose values they hold: the value's own (a dead one if nobody
        reads it), and those behind pools, which are new nodes in the place of the old ones.
    """
    pooled = [r for r in readers if is_spatial_pool(net, r, dims)]
    sizes = [r for r in readers if reads_sizes_alone(r, value) and share.runs > 1]
    with net.graph.inserting_after(wide):
        slices = {value: share.taken(net, wide, dims)}
        like = take(net, wide, 0, share.widths[share.block], dims) if sizes else slices[value]
    for reader in readers:
        if reader not in pooled:
            reader.replace_input_with(value, like if reader in sizes else slices[value])
    for pool in pooled:
        whole = _remade(net, pool, {value: wide}, sum(share.widths), dims)
        with net.graph.inserting_after(whole):
            part = share.taken(net, whole, dims)
        for reader in set(whole.users) - {part}:
            reader.replace_input_with(whole, part)
        slices[pool] = part
    return slices


def _remade(
    net: Net, node: fx.Node, places: dict[fx.Node, fx.Node], channels: int, dims: int
) -> fx.Node:
    """A new node in the place of one whose input and output get other channels.

    New, because what is known of the old one (shape, range) no longer holds.
    """
    with net.graph.inserting_after(node):
        made = net.graph.node_copy(node, lambda n: places.get(n, n))
    made.meta = without_notes(node)
    shape = shape_of(node)
    if shape is not None:
        set_shape(made, with_channels(shape, channels, dims))
    _succeed(net, node, made)
    return made


def _succeed(net: Net, node: fx.Node, made: fx.Node) -> None:
    """Let a new node take an old one's readers, place and name."""
    node.replace_all_uses_with(made)
    name = node.name
    net.graph.erase_node(node)
    made.name = name


def _filled(net: Net, reader: fx.Node, other: fx.Node, width: int, room: _Room) -> fx.Node:
    """An operand of a node with constants beside its `width` channels."""
    dims = room.dims
    if net.channels(other, dims) == 1 < width:
        rank = net.rank(other) or dims + 2
        sizes = [-1] * rank
        sizes[1 if dims else -1] = width
        expanded = net.graph.call_method("expand", (other, *sizes))
        other = _like(expanded, other, _resized(other, width, dims))
    elif room.value == 1.0:
        return _with_ones(net, reader, other, room)
    return _padded(net, other, room)


def _layer_of_gate(
    net: Net, product: fx.Node, gate: fx.Node
) -> tuple[fx.Node, AffineConv, float] | None:
    """The linear layer of which a factor is the sigmoid, and where that is 1; None of others."""
    one_at = ONE_AT.get(type(net.module(gate)))  # type: ignore[arg-type]
    source = None if one_at is None else data_input(gate)
    if source is None or one_at is None or net.guard(gate) is not None:
        return None
    if set(gate.users) != {product} or set(source.users) != {gate} or net.dtype(source) is None:
        return None
    layer = read(net, source)
    return (source, layer, one_at) if isinstance(layer, AffineConv) else None


def _with_ones(net: Net, reader: fx.Node, gate: fx.Node, room: _Room) -> fx.Node:
    """A factor with ones in the room before and behind its channels.

    Where it is a sigmoid behind a linear layer, that layer gets outputs at which the sigmoid is 1.
    """
    found = _layer_of_gate(net, reader, gate)
    kind = None if found is None else net.dtype(found[0])
    dims = room.dims
    if found is None or found[1].dims != dims or kind is None:
        return _padded(net, gate, room)
    source, layer, one_at = found
    wide = _with_constant_outputs(layer, room.sizes, one_at, room.runs)
    target, data = str(source.target), data_input(source)
    net.release([source])
    with net.graph.inserting_after(source):
        conv = net.put(Virtual(wide, *kind), data, target, source)
    conv.meta |= _like(conv, source, _resized(source, wide.out_channels, dims)).meta
    _succeed(net, source, conv)
    return _remade(net, gate, {}, wide.out_channels, dims)


def _with_constant_outputs(layer: AffineConv, room: Widths, value: float, runs: int) -> AffineConv:
    """A layer with further outputs, before and behind its own in each run, that are constant."""
    parts = [layer.regroup(1)]
    for i, width in enumerate(room):
        weight = layer.weight.new_zeros(width, layer.in_channels, *layer.kernel)
        bias = torch.full((width,), value, dtype=torch.float64, device=layer.weight.device)
        parts.insert(2 * i, replace(layer, weight=weight, bias=bias, groups=1))
    bias = in_turn([part.bias.to(torch.float64) for part in parts], runs)
    weight = in_turn([part.weight for part in parts], runs)
    return replace(parts[1], weight=weight, bias=bias)


def _padded(net: Net, node: fx.Node, room: _Room) -> fx.Node:
    """A tensor with constant channels before and behind its own, in each run."""
    sizes, dims = room.sizes, room.dims
    if sizes == (0, 0):
        return node
    own = net.channels(node, dims)
    if room.runs > 1:
        if own is None:  # a lateral is read where channels are known
            raise fault(node.name, "its channels are not known")
        one = _padded(net, node, replace(room, sizes=(0, 1), runs=1))
        before, behind = (torch.full((n,), own) for n in sizes)
        order = in_turn([before, torch.arange(own), behind], room.runs).tolist()
        return pick(net, one, order, dims)
    amounts = [*(0, 0) * dims, *sizes]
    made = net.graph.call_function(
        F.pad, (node, amounts), {"mode": "constant", "value": room.value}
    )
    return _like(made, node, _resized(node, own + sum(sizes), dims) if own else None)


def _like(made: fx.Node, node: fx.Node, shape: Shape | None) -> fx.Node:
    """A new node with the place and type of another one, and a shape of its own."""
    made.meta = notes_of(node, *ORIGIN, TYPE)
    if shape:
        set_shape(made, shape)
    return made


def _resized(node: fx.Node, channels: int, dims: int) -> Shape | None:
    shape = shape_of(node)
    return None if shape is None else with_channels(shape, channels, dims)
