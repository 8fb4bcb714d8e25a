"""Nodes that put channels in another order, take some of them, or some of them several times.

    x.repeat(1, 2, 1, 1)    torch.cat((x, x), 1)    x.flip(1)    x.roll(1, 1)    x[:, [2, 0, 1]]
    x.repeat_interleave(2, 1)    x.index_select(1, order)    nn.ChannelShuffle(2)

What such a node does is found out by running it on numbers that tell where they come from. None of
these operations looks at the numbers, so it does the same with all others.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ._affine import AffineConv
from ._calls import run_node
from ._graph import Net
from ._kinds import is_a

aten = torch.ops.aten
NAMES = ("repeat", "tile", "repeat_interleave", "flip", "roll", "index_select", "channel_shuffle")
FUNCTIONS = (
    *(torch.tile, torch.repeat_interleave, torch.flip, torch.roll, torch.index_select),
    *(torch.cat, operator.getitem, F.channel_shuffle),
    *(aten.repeat.default, aten.tile.default, aten.repeat_interleave.self_int, aten.flip.default),
    *(aten.roll.default, aten.index_select.default, aten.index.Tensor),
    aten.channel_shuffle.default,
)


def may_select(net: Net, node: fx.Node) -> bool:
    """Whether a node is one of those that can put the channels of its input in another order."""
    if node.op == "call_module":
        return is_a(net.module(node), nn.ChannelShuffle)
    if node.op == "call_method":
        return node.target in NAMES
    if node.target is operator.getitem:  # slices are crops
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return any(isinstance(i, (list, fx.Node)) for i in index)
    return node.op == "call_function" and node.target in FUNCTIONS


def selection(net: Net, node: fx.Node, channels: int, dims: int) -> AffineConv | None:
    """The channels that a node takes, as a pointwise layer; None if it does more than that."""
    rank = net.rank(node)
    if rank is not None and rank != dims + 2:
        return None
    sizes = (2, channels, *range(3, 3 + dims))
    probe = torch.arange(math.prod(sizes), dtype=torch.float64).reshape(sizes)
    found = _run(net, node, probe)
    if found is None or found.dim() != probe.dim() or found.numel() == 0:
        return None
    rows = found[0].reshape(found.shape[1], -1)[:, 0].long() // math.prod(sizes[2:])
    if int(rows.max()) >= channels or not torch.equal(found, probe[:, rows]):
        return None
    return AffineConv.pointwise(torch.eye(channels, dtype=torch.bfloat16)[rows], dims=dims)


def _run(net: Net, node: fx.Node, x: Tensor) -> Tensor | None:
    """What a node makes of a value in the place of its input; None if that is not all it reads."""
    values: dict[fx.Node, Any] = {}
    for read in node.all_input_nodes:
        values[read] = net.attribute(read) if read.op == "get_attr" else x
    if any(n.meta.get("number") for n in values) or sum(v is x for v in values.values()) != 1:
        return None
    try:
        found = run_node(node, values, lambda _: net.module(node))  # type: ignore[arg-type, return-value]
    except (RuntimeError, TypeError, ValueError, IndexError):  # it does not run on such a value
        return None
    return found if isinstance(found, Tensor) else None
