"""A carry becomes a residual connection again, and what was there for it alone goes.

A carry is channels that every layer of a span hands on by one tap, and every activation leaves as
they are, until a layer reads them together with the main block. With u the value where the carry
begins and K its channels in what the last layer reads,

    y = W·[main; carry]  =  W_main·main + W_K·u

so the columns W_K become a layer beside the span (nothing at all, if they are the identity), the
carry's channels are read by nobody and go, and the activations between need no channels of their
own any more. What was a choice of some channels stays one: W_K reads only what was carried.

Forms handled: carries through Conv1d/2d/3d and Linear of any stride and layout, scaled or not,
through activations that provably leave them alone (by range, PReLU slope 1, bounds, or a mask).
Not handled: carries as pairs [x; -x], and those shifted into a bounded activation; they stay. Where
the branch's own value travels in copies, or its layers were taken apart, these stay, too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from rmfx.algebra.affine import AffineConv
from rmfx.algebra.blockwise import Blockwise
from rmfx.algebra.products import chain as compose_chain
from rmfx.errors import Refusal
from rmfx.ir.elements import Virtual
from rmfx.ir.kinds import is_a
from rmfx.ir.net import Net
from rmfx.ir.nodes import input_of
from rmfx.ir.notes import OF_VALUE, notes_of, why_frozen
from rmfx.ir.reading import read
from rmfx.ir.weights import weight_types
from rmfx.modules.activations import ChannelPReLU
from rmfx.pruning.slicing import put

from .carries import Carry, Origins, hands_on, trimmed


@dataclass(frozen=True, eq=False)
class Split:
    """A layer without what it reads of a carry, and the layer that reads it at its source."""

    main: AffineConv
    source: fx.Node
    skip: AffineConv


def _split(layer: AffineConv, carry: Carry) -> Split | None:
    """Take a layer apart into what it reads of a carry and what else; None if that is nothing."""
    if carry.first.dims != layer.dims:
        return None
    layer = layer.regroup(1)
    mixing = ~hands_on(layer)
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
    made = trimmed(replace(first, weight=first.weight[rows], bias=first.bias[rows]))
    skip = compose_chain([made, way, trimmed(reader)])
    if isinstance(skip, Refusal):
        return None
    # What goes with the carry: its columns here, and its filters where it begins.
    saved = taken.numel() + count * carry.first.weight[0].numel()
    cheaper = _is_identity(skip) or skip.weight.numel() <= saved
    return Split(main, carry.source, skip) if cheaper else None


def _splits(net: Net, origins: Origins) -> dict[fx.Node, list[Split]]:
    """The layers that are to be taken apart, once for each carry that they read."""
    splits: dict[fx.Node, list[Split]] = {}
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
    return splits


def close_all(net: Net, origins: Origins) -> int:
    """Close every carry that pays, and say how many those were; origins: of the net."""
    splits = _splits(net, origins)
    sums: dict[fx.Node, fx.Node] = {}
    for node, found in splits.items():
        for split in found:
            here = sums.get(split.source, split.source)
            total = _close(net, node, replace(split, main=found[-1].main), here)
            sums.setdefault(node, total)  # the next one stands before it
    count = sum(map(len, splits.values()))
    if count:
        net.rewrites["close_all"] += count
        _ungroup(net)
    return count


def _close(net: Net, node: fx.Node, split: Split, source: fx.Node) -> fx.Node:
    """Let a layer and the layer beside it be added; returns the sum."""
    kind = weight_types(net, (node,)).pop()
    put(net, node, split.main)
    known = notes_of(node, *OF_VALUE)
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


def _ungroup(net: Net) -> None:
    """Make layers dense whose groups hold both a carry and something else: each may then go."""
    for node in list(net.graph.nodes):
        layer = read(net, node) if node.op == "call_module" else None
        if not isinstance(layer, AffineConv) or layer.groups == 1 or net.guard(node) is not None:
            continue
        carried = hands_on(layer).reshape(layer.groups, -1)
        n_in, n_out = layer.block  # more outputs than inputs: copies of the main block
        if bool((carried.any(1) & (~carried.all(1) | (n_in < n_out))).any()):
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
        does_nothing = isinstance(layer, AffineConv) and _is_identity(trimmed(layer))
        if source is not None and (does_nothing or type(plain) is nn.Identity):
            node.replace_all_uses_with(source)
