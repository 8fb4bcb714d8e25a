"""Closing carries: the way back from a plain chain to a residual connection.

A carry is channels that every layer of a span hands on by one tap, and every activation leaves as
they are, until a layer reads them together with the main block. With u the value where the carry
begins and K its channels in what the last layer reads,

    y = W·[main; carry]  =  W_main·main + W_K·u

so the columns W_K become a layer beside the span (nothing at all, if they are the identity), the
carry's channels are read by nobody and go, and the activations between need no channels of their
own any more. What was a choice of some channels stays one: W_K reads only what was carried.

Forms handled: carries through Conv1d/2d/3d and Linear of any stride and layout, scaled or not,
through activations that provably leave them alone (by range, PReLU slope 1, bounds, or a mask).
Not handled: carries as pairs [x; -x], and those shifted into a bounded activation; they stay.
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
from rmfx.algebra.laws import chain as compose_chain
from rmfx.algebra.laws import compose, reads_inside
from rmfx.analysis.channel_labels import Channels
from rmfx.analysis.constant_channels import PinnedRanges
from rmfx.analysis.ranges import check_range
from rmfx.errors import Refusal, ShapeError
from rmfx.frontend.tracing import trace
from rmfx.interval import Interval
from rmfx.ir.elements import Virtual
from rmfx.ir.kinds import NO_OPS, is_a
from rmfx.ir.memo import on_demand
from rmfx.ir.net import Net
from rmfx.ir.nodes import input_of
from rmfx.ir.reading import read
from rmfx.ir.undisturbed import undisturbed
from rmfx.ir.weights import weight_types
from rmfx.modules.activations import OWN_ACTIVATIONS, ChannelPReLU
from rmfx.oracle.verification import Domain, checked
from rmfx.pruning.allocation import spare
from rmfx.pruning.cutting import without
from rmfx.pruning.families import Widths
from rmfx.pruning.slicing import put
from rmfx.report import META_KEY


@dataclass(frozen=True, eq=False)
class Carry:
    """Channels of a value that a layer made and all nodes since have handed on.

    Attributes:
        source: what that layer reads.
        first: the layer.
        rows: (channels,) which of its outputs, -1 where it is none.
        factors: (channels,) by what they have been multiplied since.
        way: which of its places they are, as a layer of one channel and one tap.
    """

    source: fx.Node
    first: AffineConv
    rows: Tensor
    factors: Tensor
    way: AffineConv

    def only(self, keep: Tensor) -> Carry:
        """The same without some channels; keep: (channels,) booleans."""
        return replace(self, rows=torch.where(keep, self.rows, -1))


Carries = tuple[Carry, ...]


class _Origins:
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
        if source is None or node.op != "call_module" or node.meta.get("frozen"):
            return ()
        element = read(self._net, node)
        if isinstance(element, AffineConv):
            before = [c for c in self._known[source] if c.first.dims == element.dims]
            return _through_layer(element, source, before)
        left = [c.only(self._passed(node, source, c)) for c in self._known[source]]
        return tuple(c for c in left if bool((c.rows >= 0).any()))

    def _gated(self, node: fx.Node) -> Carries:
        """Behind a product: what the other factor provably multiplies by 1."""
        found: list[Carry] = []
        for value, gate in itertools.permutations(node.all_input_nodes):
            if value.meta.get("shape") != node.meta.get("shape"):
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
        blocks = element.blocks if isinstance(element, Blockwise) else ()
        blocks = (Block(count, element),) if isinstance(element, Activation) else blocks
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
    singles = _single_weights(layer)
    mixed = _columns_read(layer, [row for row, *_ in singles])
    for row, column, tap, weight in singles:
        # Where the main block reads a channel too, a carry begins.
        carry = next((c for c in before if c.rows[column] >= 0 and not mixed[column]), None)
        way = None if carry is None else _hop(layer, tap, carry.way)
        if carry is None or way is None:
            continue
        key = (id(carry), tap)
        if key not in found:
            empty = nowhere.clone()
            found[key] = replace(carry, rows=empty, factors=empty.to(torch.float64), way=way)
        found[key].rows[row] = carry.rows[column]
        found[key].factors[row] = carry.factors[column] * weight
        own[row] = -1
    identity = AffineConv.identity(1, layer.dims)
    begins = Carry(x, layer, own, torch.ones(total, dtype=torch.float64), identity)
    return (*found.values(), begins)


def _columns_read(layer: AffineConv, without: list[int]) -> Tensor:
    """Which inputs the outputs of a layer read, but for some of them: (in,) booleans."""
    used = layer.weight.detach() != 0
    used[without] = False
    n_in, n_out = layer.block
    return used.reshape(layer.groups, n_out, n_in, -1).any(3).any(1).flatten().cpu()


def _single_weights(layer: AffineConv) -> list[tuple[int, int, int, float]]:
    """Output, input, tap and weight of the outputs that have one weight and no bias."""
    weight = layer.weight.detach().cpu().flatten(1)
    single = ((weight != 0).sum(1) == 1) & (layer.bias.detach().cpu() == 0)
    rows = single.nonzero().flatten()
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
    own = _trimmed(own)
    if not reads_inside(own):
        return None
    whole = compose(own, way)
    return None if isinstance(whole, Refusal) or not reads_inside(whole) else whole


def _trimmed(layer: AffineConv) -> AffineConv:
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


# ---- the rewrite --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Split:
    """A layer without what it reads of a carry, and the layer that reads it at its source."""

    main: AffineConv
    source: fx.Node
    skip: AffineConv


def _split(layer: AffineConv, carry: Carry) -> _Split | None:
    """Take a layer apart into what it reads of a carry and what else; None if that is nothing."""
    if layer.groups != 1 or carry.first.dims != layer.dims:
        return None
    mixing = torch.ones(layer.out_channels, dtype=torch.bool)
    mixing[[row for row, *_ in _single_weights(layer)]] = False  # those hand a channel on
    carried = carry.rows >= 0
    space = [1] * layer.dims
    where = (mixing.reshape(-1, 1) & carried.reshape(1, -1)).reshape(
        *layer.weight.shape[:2], *space
    )
    where = where.to(layer.weight.device)
    main = replace(layer, weight=torch.where(where, 0.0, layer.weight))
    taken = torch.where(where, layer.weight, 0.0)[:, carried].to(torch.float64)
    if not bool(taken.any()) or not bool(main.weight[mixing].any()):
        return None
    factors = carry.factors[carried].to(taken.device).reshape(1, -1, *space)
    reader = replace(layer, weight=taken * factors, bias=torch.zeros_like(layer.bias))
    count = taken.shape[1]
    ways = [t.expand(count, *t.shape[1:]) for t in (carry.way.weight, carry.way.bias)]
    way = replace(carry.way, weight=ways[0], bias=ways[1], groups=count)
    first = carry.first.regroup(1)
    rows = carry.rows[carried].to(first.weight.device)
    made = _trimmed(replace(first, weight=first.weight[rows], bias=first.bias[rows]))
    skip = compose_chain([made, way, _trimmed(reader)])
    if isinstance(skip, Refusal):
        return None
    # What goes with the carry: its columns here, and its filters where it begins.
    saved = taken.numel() + count * carry.first.weight[0].numel()
    cheaper = _is_identity(skip) or skip.weight.numel() <= saved
    return _Split(main, carry.source, skip) if cheaper else None


def _close(net: Net, node: fx.Node, split: _Split, source: fx.Node) -> fx.Node:
    """Let a layer and the layer beside it be added; returns the sum."""
    kind = weight_types(net, (node,)).pop()
    put(net, node, split.main)
    known: dict[str, Any] = {k: node.meta[k] for k in ("shape", "dtype") if k in node.meta}
    with net.graph.inserting_after(node):
        beside = source
        if not _is_identity(split.skip):
            beside = net.put(Virtual(split.skip, *kind), source, f"{node.target}_skip", node)
            beside.meta |= known
    with net.graph.inserting_after(node if beside is source else beside):
        total = net.graph.call_function(torch.add, (node, beside))
    total.meta = dict(node.meta)
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    net.make_stand_for(node, None)
    return total


def _is_identity(layer: AffineConv) -> bool:
    same = AffineConv.identity(layer.in_channels, layer.dims)
    places = (layer.stride, layer.padding, layer.kernel)
    if places != (same.stride, same.padding, same.kernel) or layer.has_bias:
        return False
    if layer.out_channels != layer.in_channels:
        return False
    weight = same.regroup(layer.groups).weight
    return bool((layer.weight.cpu() == weight.cpu()).all())


def _left_alone(block: Block, low: Tensor, high: Tensor) -> Tensor:
    """Which channels of a block between two bounds an activation returns unchanged."""
    if block.activation is None:
        return torch.ones_like(low, dtype=torch.bool)
    if isinstance(block.activation.module, nn.PReLU):
        slope = block.activation.module.weight.detach().cpu().flatten()
        return (slope == 1) | (low >= 0)
    begin, end = block.activation.identity
    return (begin <= low) & (high <= end)


def _uniform(module: nn.Module) -> nn.Module | None:
    """The activation that one per channel amounts to where it is the same for all channels."""
    if is_a(module, (nn.PReLU, ChannelPReLU)):
        weight: Any = module.weight
        slopes = set(weight.detach().flatten().tolist())
        return {0.0: nn.ReLU(), 1.0: nn.Identity()}.get(*slopes) if len(slopes) == 1 else None
    own = Blockwise.of(module)
    blocks = own.blocks if own is not None else ()
    if len({block.activation and block.activation.signature for block in blocks}) != 1:
        return None
    activation = blocks[0].activation
    return activation.module if activation is not None else nn.Identity()


@undisturbed
def close_carries(
    model: nn.Module | Any,
    example_inputs: Any,
    *,
    input_range: Interval | None = None,
    verify: bool = True,
) -> fx.GraphModule:
    """Turn carries back into residual connections: the inverse of `remove_residuals`, as exact.

    A skip costs no multiply-adds and a carry does, so this pays where a network that was made plain
    and pruned has kept a carry everywhere. Channels of it that were pruned stay pruned.

    Args:
        model: `nn.Module`, `GraphModule` or `ExportedProgram` in eval mode; not changed. Batch norm
            must be folded (`fold_batch_norm`) where a carry passes it.
        example_inputs: a tensor or a tuple of arguments.
        input_range: (low, high) of every input value, if known. Values outside it may give wrong
            results.
        verify: compare the result with the model, on random inputs of several sizes, before it is
            returned; see `rmfx.verify`.

    Returns:
        A new module that computes the same; without carries it is the same network.

    Raises:
        ShapeError: there are no example inputs.
        RmfxError: the model cannot be traced or its weights cannot be used.

    Example:
        >>> import rmfx, torch
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b = (torch.nn.Conv2d(4, 4, 3, padding=1) for _ in "ab")
        ...     def forward(self, x):
        ...         return x + self.b(torch.relu(self.a(x)))
        >>> x = torch.randn(1, 4, 8, 8)
        >>> plain = rmfx.remove_residuals(Block().eval(), x)
        >>> back = rmfx.close_carries(plain, x)
        >>> [m.out_channels for m in back.children() if isinstance(m, torch.nn.Conv2d)]
        [4, 4]
    """
    check_range(input_range)
    if example_inputs is None:
        raise ShapeError("close_carries needs example inputs: it follows channels by their shapes")
    net = Net(trace(model, example_inputs))
    closed = _closed(net, example_inputs, input_range)
    return checked(
        "close_carries",
        model,
        net.source,
        closed,
        example_inputs,
        wanted=verify,
        domain=Domain(input_range),
    )


def _closed(net: Net, example_inputs: Any, input_range: Interval | None) -> fx.GraphModule:
    """The network with its carries closed, and without what was there for them only."""
    origins = _Origins(net, input_range)
    splits: dict[fx.Node, list[_Split]] = {}
    for node in net.graph.nodes:
        source = input_of(node)
        element = read(net, node) if node.op == "call_module" else None
        if not isinstance(element, AffineConv) or source is None or net.guard(node) is not None:
            continue
        for carry in origins.of(source):
            split = _split(element, carry)
            if split is not None:
                splits.setdefault(node, []).append(split)
                element = split.main
    sums: dict[fx.Node, fx.Node] = {}
    for node, found in splits.items():
        for split in found:
            here = sums.get(split.source, split.source)
            total = _close(net, node, replace(split, main=found[-1].main), here)
            sums.setdefault(node, total)  # the next one stands before it
    if splits:
        _ungroup(net)
    closed = net.finish()
    closed.meta.pop(META_KEY, None)  # its nodes may hold other values now
    if not splits:
        return closed
    net = Net(trace(closed, example_inputs))
    net.sweep()
    widths = Widths(net, Channels(net))
    keep = widths.used()
    smaller = without(net, widths, spare(widths, keep.to(torch.float64), keep), {})
    return _tidied(Net(trace(smaller, example_inputs)))


def _ungroup(net: Net) -> None:
    """Make layers dense whose groups hold both a carry and something else: each may then go."""
    for node in list(net.graph.nodes):
        layer = read(net, node) if node.op == "call_module" else None
        if not isinstance(layer, AffineConv) or layer.groups == 1 or net.guard(node) is not None:
            continue
        carried = torch.zeros(layer.out_channels)
        carried[[row for row, *_ in _single_weights(layer)]] = 1
        share = carried.reshape(layer.groups, -1).mean(1)
        if bool(((share > 0) & (share < 1)).any()):
            put(net, node, layer.regroup(1))


def _tidied(net: Net) -> fx.GraphModule:
    """Without what was there for the carries only: identities, activations per channel, zeros."""
    for node in list(net.graph.nodes):
        module = net.module(node)
        if module is None or net.guard(node) is not None or node.meta.get("frozen"):
            continue
        plain = _uniform(module)
        if plain is not None:
            net.set(node, plain.eval())
        layer, source = read(net, node), input_of(node)
        grouped = layer.split_into_groups() if isinstance(layer, AffineConv) else None
        if grouped is not layer and isinstance(grouped, AffineConv):
            put(net, node, grouped)
        does_nothing = isinstance(layer, AffineConv) and _is_identity(_trimmed(layer))
        if source is not None and (does_nothing or type(plain) is nn.Identity):
            node.replace_all_uses_with(source)
    return net.finish()
