"""A carry becomes a residual connection again, and what was there for it alone goes.

A carry is channels that every layer of a span hands on by one tap, and every activation leaves as
they are, until a layer reads them together with the main block. With u the value where the carry
begins and K its channels in what the last layer reads,

    y = W·[main; carry]  =  W_main·main + W_K·u

so the columns W_K become layers beside the span (nothing at all, if they are the identity), the
carry's channels are read by nobody and go, and the activations between need no channels of their
own any more. What was a choice of some channels stays one: W_K reads only what was carried. The
filter where the carry begins stands before W_K as a layer of its own: made one, a depthwise layer
and a 1x1 would be a dense one. Where what a filter reads was handed on itself, the skip begins
there. All this is done where weights go: an activation may leave a channel of the main block
alone, too, and nothing is gained by calling that a skip.

Forms handled: carries through Conv1d/2d/3d and Linear of any stride and layout, scaled or not,
through activations that provably leave them alone (by range, PReLU slope 1, bounds, or a mask).
Not handled: carries as pairs [x; -x], and those shifted into a bounded activation; they stay.
Where the last layer of a site and the first of the next were merged, they stay merged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmfx.algebra.affine import AffineConv
from rmfx.algebra.blockwise import Blockwise
from rmfx.algebra.products import chain as compose_chain
from rmfx.errors import Refusal
from rmfx.interval import Interval
from rmfx.ir.elements import Virtual
from rmfx.ir.kinds import is_a
from rmfx.ir.net import Net
from rmfx.ir.nodes import input_of
from rmfx.ir.notes import OF_VALUE, notes_of, why_frozen
from rmfx.ir.reading import read
from rmfx.ir.weights import weight_types
from rmfx.modules.activations import ChannelPReLU
from rmfx.pruning.slicing import inputs_read, put

from .carries import Carry, Origins, hands_on, trimmed, weights_of
from .copies import Copies, gathered


@dataclass(frozen=True, eq=False)
class Split:
    """A layer without what it reads of a carry, and the layers that read it at its source.

    Attributes:
        saved: weights that go, in the layer and in those that handed the carry on.
    """

    main: AffineConv
    source: fx.Node
    skip: tuple[AffineConv, ...]
    saved: int


def _split(layer: AffineConv, carry: Carry, equal: Tensor | None) -> Split | None:
    """Take a layer apart into what it adds of a carry and what else; None if it adds nothing.

    Args:
        equal: which channels of the carry's source are equal, as `Copies` has it.
    """
    if carry.first.dims != layer.dims:
        return None
    layer = layer.regroup(1)
    reads = (layer.weight.detach() != 0).reshape(*layer.weight.shape[:2], -1).any(2).cpu()
    carried = carry.rows >= 0
    adds = reads[:, carried].any(1) & reads[:, ~carried].any(1)
    if not bool(adds.any()):
        return None
    where = (adds.reshape(-1, 1) & carried).reshape(*reads.shape, *[1] * layer.dims)
    where = where.to(layer.weight.device)
    main = replace(layer, weight=torch.where(where, 0.0, layer.weight))
    taken = replace(layer, weight=torch.where(where, layer.weight, 0.0))
    taken = replace(taken, bias=torch.zeros_like(layer.bias))
    used = carried & inputs_read(taken.weight, 1)
    saved = int(weights_of(taken).sum() + carry.weights[used].sum())
    return Split(main, carry.source, _few(_at_source(carry, taken, equal)), saved)


def _at_source(carry: Carry, reader: AffineConv, equal: Tensor | None) -> list[AffineConv]:
    """What a layer makes of a carry that is all it reads, as layers that read the carry's source.

    Args:
        equal: which channels of the source are equal.
    """
    reader = reader.regroup(1)
    used = inputs_read(reader.weight, 1)
    taken = reader.weight[:, used.to(reader.weight.device)].to(torch.float64)
    factors = carry.factors[used].to(taken.device).reshape(1, -1, *[1] * reader.dims)
    rows, places = carry.rows[used].to(taken.device).unique(return_inverse=True)
    weight = taken.new_zeros(taken.shape[0], len(rows), *reader.kernel)
    weight.index_add_(1, places, taken * factors)
    ways = [t.expand(len(rows), *t.shape[1:]) for t in (carry.way.weight, carry.way.bias)]
    way = replace(carry.way, weight=ways[0], bias=ways[1], groups=len(rows))
    first = carry.first.regroup(1) if equal is None else gathered(carry.first, equal)
    rows = rows.to(first.weight.device)
    made = replace(first, weight=first.weight[rows], bias=first.bias[rows])
    return [made, way, replace(reader, weight=weight)]


def _few(layers: Iterable[AffineConv]) -> tuple[AffineConv, ...]:
    """The same layers in a row, those merged that only pick channels, without identities."""
    found: list[AffineConv] = []
    for layer in map(trimmed, layers):
        pair = [*found[-1:], layer]
        if len(pair) == 2 and any(_weights([f]) <= max(f.weight.shape[:2]) for f in pair):
            whole = compose_chain(pair)
            if not isinstance(whole, Refusal) and _weights([trimmed(whole)]) <= _weights(pair):
                found[-1] = trimmed(whole)
                continue
        found.append(layer)
    return tuple(f for f in found if not _is_identity(f))


def _splits(net: Net, origins: Origins) -> dict[fx.Node, list[Split]]:
    """The layers that are to be taken apart, once for each carry that they read."""
    splits: dict[fx.Node, list[Split]] = {}
    copies = Copies(net)
    for node in net.graph.nodes:
        source = input_of(node)
        element = read(net, node) if node.op == "call_module" else None
        if not isinstance(element, AffineConv) or source is None or net.guard(node) is not None:
            continue
        for carry in origins.of(source):
            split = _split(element, carry, copies.of(carry.source))
            split = None if split is None else _lifted(split, origins, copies)
            if split is not None and _weights(split.skip) < split.saved:
                splits.setdefault(node, []).append(split)
                element = split.main
    return splits


def _lifted(split: Split, origins: Origins, copies: Copies) -> Split:
    """The same with the skip further up, where what it reads was handed on, too."""
    found: Split | None = split
    while found is not None:
        split, found = found, None
        for carry in origins.of(split.source):
            head = (
                split.skip[0]
                if split.skip
                else AffineConv.identity(len(carry.rows), carry.first.dims)
            )
            used = inputs_read(head.weight, head.groups)
            if head.dims != carry.first.dims or bool((carry.rows[used] < 0).any()):
                continue
            layers = _at_source(carry, head, copies.of(carry.source))
            skip = _few([*layers, *split.skip[1:]])
            if _weights(skip) <= _weights(split.skip):
                saved = split.saved + int(carry.weights[used].sum())
                found = replace(split, source=carry.source, skip=skip, saved=saved)
                break
    return split


def _weights(layers: Iterable[AffineConv]) -> int:
    """How many weights layers have for the inputs that their outputs read."""
    return sum(int(weights_of(layer).sum()) for layer in layers)


def close_all(net: Net, input_range: Interval | None) -> frozenset[str]:
    """Close every carry.

    Returns:
        The names of the nodes between the ends of those that were closed, and of those beside.
    """
    spans = set[fx.Node]()
    # What a skip reads may hold a carry, too: each round leaves fewer weights.
    while splits := _splits(net, Origins(net, input_range)):
        spans |= _close_some(net, splits)
        _ungroup(net)
    return frozenset(node.name for node in spans)


def _close_some(net: Net, splits: Mapping[fx.Node, Sequence[Split]]) -> set[fx.Node]:
    """Carry out some splits; returns the nodes between their ends, and beside."""
    spans = {n for node, found in splits.items() for s in found for n in _between(s.source, node)}
    sums: dict[fx.Node, fx.Node] = {}
    for node, found in splits.items():
        for split in found:
            here = sums.get(split.source, split.source)
            total, beside = _close(net, node, replace(split, main=found[-1].main), here)
            spans.update(beside)
            sums.setdefault(node, total)  # the next one stands before it
        net.rewrites["close_all"] += len(found)
    return spans


def _between(source: fx.Node, node: fx.Node) -> set[fx.Node]:
    """The nodes behind one node up to another."""
    found, open_ends = set[fx.Node](), [node]
    while open_ends:
        here = open_ends.pop()
        if source < here and here not in found:
            found.add(here)
            open_ends += here.all_input_nodes
    return found


def _close(net: Net, node: fx.Node, split: Split, source: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """Let a layer and those beside it be added; returns the sum, and what stands beside."""
    kind = weight_types(net, (node,)).pop()
    put(net, node, split.main)
    beside, last = list[fx.Node](), node
    for layer in split.skip:
        with net.graph.inserting_after(last):
            read_by = beside[-1] if beside else source
            last = net.put(Virtual(layer, *kind), read_by, f"{node.target}_skip", node)
        beside.append(last)
    if beside:
        last.meta |= notes_of(node, *OF_VALUE)
    with net.graph.inserting_after(last):
        total = net.graph.call_function(torch.add, (node, last if beside else source))
    total.meta = dict(node.meta)
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    net.make_stand_for(node, None)
    return total, beside


def _is_identity(layer: AffineConv) -> bool:
    same = AffineConv.identity(layer.in_channels, layer.dims)
    places = (layer.stride, layer.padding, layer.kernel)
    if places != (same.stride, same.padding, same.kernel) or layer.has_bias:
        return False
    if layer.out_channels != layer.in_channels:
        return False
    weight = same.regroup(layer.groups).weight
    return bool((layer.weight.cpu() == weight.cpu()).all())


def _ungroup(net: Net) -> None:
    """Make layers dense whose groups hold both a carry and something else: each may then go."""
    for node in list(net.graph.nodes):
        layer = read(net, node) if node.op == "call_module" else None
        if not isinstance(layer, AffineConv) or layer.groups == 1 or net.guard(node) is not None:
            continue
        carried = hands_on(layer).reshape(layer.groups, -1)
        n_in, n_out = layer.block  # others than square ones: copies, or a carry that was padded
        if bool((carried.any(1) & (~carried.all(1) | (n_in != n_out))).any()):
            put(net, node, layer.regroup(1))


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


def tidy(net: Net) -> None:
    """Take out what was there for the carries only: identities, activations per channel, zeros."""
    for node in list(net.graph.nodes):
        module = net.module(node)
        if module is None or net.guard(node) is not None or why_frozen(node):
            continue
        plain = _uniform(module)
        if plain is not None:
            net.set(node, plain.eval())
        layer, source = read(net, node), input_of(node)
        grouped = layer.split_into_groups() if isinstance(layer, AffineConv) else None
        if grouped is not layer and isinstance(grouped, AffineConv):
            put(net, node, grouped)
        does_nothing = type(plain) is nn.Identity or (
            isinstance(layer, AffineConv) and _is_identity(trimmed(layer))
        )
        if does_nothing and source is not None and not why_frozen(source):
            node.replace_all_uses_with(source)
