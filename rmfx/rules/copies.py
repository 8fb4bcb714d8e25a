"""Channels of a value that equal another one of it, and layers that read them.

Two outputs of a layer are equal where their filters and biases are, once the columns of inputs that
are equal have been added; what does the same to each channel leaves them equal. A layer whose
groups all read the same channels is a layer of one group that reads them once:

    [f_1 ⊕ … ⊕ f_t]([x; …; x])  =  [f_1; …; f_t](x)

at the same number of multiply-adds, and what made the copies makes one.

Forms handled: Conv1d/2d/3d and Linear, activations that may differ between channels, indices that
take channels in any order. Of all else nothing is known.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from rmfx.algebra.activation import Activation, Block
from rmfx.algebra.affine import AffineConv
from rmfx.algebra.blockwise import Blockwise
from rmfx.ir.kinds import NO_OPS, is_a
from rmfx.ir.memo import on_demand
from rmfx.ir.net import Net
from rmfx.ir.nodes import input_of
from rmfx.ir.notes import why_frozen
from rmfx.ir.reading import read
from rmfx.ir.selections import may_select, selected
from rmfx.pruning.slicing import inputs_read, put


class Copies:
    """For each value of a net: which channel each of its channels equals, the first of them."""

    def __init__(self, net: Net) -> None:
        self._net = net
        self._known: dict[fx.Node, tuple[Tensor, int] | None] = {}

    def of(self, node: fx.Node) -> Tensor | None:
        """(channels,) places of channels; None if no two are known to be equal."""
        found = on_demand(node, self._known, self._compute)
        return None if found is None else found[0]

    def _compute(self, node: fx.Node) -> tuple[Tensor, int] | None:
        """The same, with the spatial dimensions behind the channels."""
        source = input_of(node)
        if source is None or why_frozen(node):
            return None
        before = self._known[source]
        if before is not None and may_select(self._net, node):
            rows = selected(self._net, node, len(before[0]), before[1])
            unguarded = rows is not None and self._net.guard(node) is None
            return _first([before[0][row] for row in rows or ()], before[1]) if unguarded else None
        if node.op != "call_module":
            return None
        element = read(self._net, node)
        if isinstance(element, AffineConv):
            if self._net.guard(node) is not None or (before and before[1] != element.dims):
                return None
            return _first(_filters(element, before and before[0]), element.dims)
        if before is None or self._net.guard(node) is not None:
            return None
        if is_a(self._net.callee(node), NO_OPS):
            return before
        kinds = _kinds(element, len(before[0])) if before[1] else _kind(element, len(before[0]))
        if kinds is None:
            return None
        return _first(list(zip(before[0].tolist(), kinds, strict=True)), before[1])


def _first(keys: Sequence[Hashable], dims: int) -> tuple[Tensor, int] | None:
    """Where each key stands first; None if all differ."""
    keys = [key.item() if isinstance(key, Tensor) else key for key in keys]
    first: dict[Hashable, int] = {}
    places = [first.setdefault(key, i) for i, key in enumerate(keys)]
    return (torch.tensor(places), dims) if len(first) < len(keys) else None


def _filters(layer: AffineConv, equal: Tensor | None) -> list[Hashable]:
    """What makes each output of a layer what it is."""
    layer = layer if equal is None else gathered(layer, equal)
    tables = [t.detach().cpu().flatten(1) + 0 for t in (layer.weight, layer.bias.unsqueeze(1))]
    texts = torch.cat([t.contiguous().view(torch.uint8) for t in tables], 1).numpy()
    _, n_out = layer.block
    return [(row // n_out, text.tobytes()) for row, text in enumerate(texts)]  # −0 is 0


def _kinds(element: object, count: int) -> list[Hashable] | None:
    """What an activation does to each channel."""
    blocks = element.blocks if isinstance(element, Blockwise) else ()
    blocks = (Block(count, element),) if isinstance(element, Activation) else blocks
    if sum(block.width for block in blocks) != count:
        return None
    kinds: list[Hashable] = []
    for width, act in ((block.width, block.activation) for block in blocks):
        if act is not None and act.is_per_channel:
            kinds += act.module.get_parameter("weight").detach().flatten().tolist()
        else:
            kinds += [act and act.signature] * width
    return kinds


def _kind(element: object, count: int) -> list[Hashable] | None:
    """The same where numbers for each channel might belong to another dimension."""
    alike = isinstance(element, Activation) and not element.is_per_channel
    return _kinds(element, count) if alike else None


def gathered(layer: AffineConv, equal: Tensor) -> AffineConv:
    """A layer that reads each of some equal inputs where it stands first, as one group.

    Args:
        equal: (in,) see `Copies`.
    """
    layer = layer.regroup(1)
    weight = torch.zeros_like(layer.weight)
    weight.index_add_(1, equal.to(weight.device), layer.weight)
    return replace(layer, weight=weight)


def read_once(net: Net) -> int:
    """Let layers whose groups all read the same channels be of one group; returns how many."""
    copies, count = Copies(net), 0
    for node in list(net.graph.nodes):
        source = input_of(node)
        layer = read(net, node) if node.op == "call_module" else None
        if not isinstance(layer, AffineConv) or source is None or net.guard(node) is not None:
            continue
        equal = copies.of(source)
        if equal is None:
            continue
        once = gathered(layer, equal)
        inputs = int(inputs_read(once.weight, 1).sum())
        before = layer.split_into_groups()
        if inputs < int(inputs_read(layer.weight, layer.groups).sum()) and (
            once.out_channels * inputs <= before.out_channels * before.block[0]
        ):
            put(net, node, once)
            count += 1
    if count:
        net.rewrites["read_once"] += count
    return count
