"""Channels that views put in another order become nn.ChannelShuffle.

    x.view(n, g, c // g, h, w).transpose(1, 2).contiguous().view(n, c, h, w)

is how ShuffleNets, and what is built on them, write it. What such a chain does is found out by
running it on numbers that tell where they come from, at two sizes of all that may change.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ._calls import run_node
from ._infer import on_demand
from ._kinds import is_a
from ._meta import noted, sizes_of_every_call
from ._zero_channels import Fixed, Given

aten = torch.ops.aten


def _every_form(*names: str) -> set[Any]:
    """Methods, functions of torch and aten operators."""
    functions = {getattr(torch, name) for name in names if hasattr(torch, name)}
    packets = [getattr(aten, name) for name in names if hasattr(aten, name)]
    overloads = {getattr(packet, key) for packet in packets for key in packet.overloads()}
    return {*names, *functions, *overloads}


RESHAPES = _every_form("view", "reshape", "flatten", "unflatten", "_unsafe_view")
RESHAPING = (nn.Flatten, nn.Unflatten)
SWAPS = _every_form("transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis")
COPIES = _every_form("contiguous", "clone")
LARGEST = 1 << 24  # numbers in a probe


def find_shuffles(gm: fx.GraphModule) -> list[tuple[fx.Node, fx.Node, nn.Module]]:
    """The last node of each such chain, what it begins with, and the module that does the same."""
    fixed = Fixed(gm)
    found: list[tuple[fx.Node, fx.Node, nn.Module]] = []
    for node in gm.graph.nodes:
        source = _source(gm, node)
        groups = _groups(gm, node, source, fixed) if source is not None else None
        if source is not None and groups is not None:
            found.append((node, source, nn.ChannelShuffle(groups)))
    return found


def _source(gm: fx.GraphModule, last: fx.Node) -> fx.Node | None:
    """What a reshaping, swaps of dimensions and a second reshaping begin with."""
    if not _reshapes(gm, last):
        return None
    here, swapped = _input(last), False
    while here is not None and (here.target in SWAPS or here.target in COPIES):
        swapped = swapped or here.target in SWAPS
        here = _input(here)
    return _input(here) if here is not None and swapped and _reshapes(gm, here) else None


def _reshapes(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return is_a(gm.get_submodule(str(node.target)), RESHAPING)
    return node.op in ("call_function", "call_method") and node.target in RESHAPES


def _input(node: fx.Node) -> fx.Node | None:
    """The tensor that a node reads first, None if others may see or change what it gives."""
    x = node.args[0] if node.args else None
    apart = "frozen" in node.meta or not isinstance(x, fx.Node) or "frozen" in x.meta
    return None if apart else x  # type: ignore[return-value]


def _groups(gm: fx.GraphModule, last: fx.Node, source: fx.Node, fixed: Fixed) -> int | None:
    """Of the shuffle that leads from one node to another, None if something else does."""
    found = set()
    for sizes in _sizes(source, fixed):
        x = torch.arange(math.prod(sizes)).view(sizes)
        try:
            y = _run(gm, last, source, x)
        # It does not run at such a size, or reads what is not known.
        except (RuntimeError, TypeError, ValueError, IndexError, LookupError):
            return None
        found.add(_groups_of(x, y))
    return found.pop() if len(found) == 1 else None


def _groups_of(x: Tensor, y: Any) -> int | None:
    """Of the shuffle that makes y of x."""
    if not isinstance(y, Tensor) or y.shape != x.shape or x.shape[1] < 2:
        return None
    step = int(y[0, 1].flatten()[0]) // (x.numel() // (x.shape[0] * x.shape[1]))
    groups = x.shape[1] // step if 0 < step <= x.shape[1] else 1
    if groups < 2 or x.shape[1] % groups:
        return None
    return groups if torch.equal(F.channel_shuffle(x, groups), y) else None


def _sizes(source: fx.Node, fixed: Fixed) -> set[tuple[int, ...]]:
    """Two sizes of a value, which differ in all that the graph leaves open."""
    shape = source.meta.get("shape")
    if shape is None and isinstance(given := fixed(source), Given):
        shape = (None, given.channels, *[None] * given.dims)
    if shape is None or len(shape) < 3 or shape[1] is None:
        return set()
    known = sizes_of_every_call(source) or (None, shape[1], *[None] * len(shape[2:]))
    probes = {
        tuple(n if isinstance(n, int) else first + i for i, n in enumerate(known))
        for first in (3, 5)
    }
    return {sizes for sizes in probes if math.prod(sizes) <= LARGEST}


def _run(gm: fx.GraphModule, last: fx.Node, source: fx.Node, x: Tensor) -> Any:
    """What becomes of a value in the place of `source`.

    Raises:
        LookupError: something is read that does not follow from it.
    """
    known: dict[fx.Node, Any] = {source: x}

    def follows(node: fx.Node) -> bool:
        return source < node and node.op in ("call_module", "call_function", "call_method")

    def compute(node: fx.Node) -> Any:
        size = _as_size(node, source, x)
        if size is None and not follows(node):
            raise LookupError(node.name)
        return run_node(node, known, gm.get_submodule) if size is None else size

    def inputs(node: fx.Node) -> list[fx.Node]:
        needed = follows(node) and _as_size(node, source, x) is None
        return node.all_input_nodes if needed else []

    return on_demand(last, known, compute, inputs)


def _as_size(number: fx.Node, source: fx.Node, x: Tensor) -> int | None:
    """A number that the graph knows to be a size of `source`, of whichever value it was read."""
    mine: Any
    value: Any
    mine, value = noted(number), noted(source)
    if isinstance(mine, torch.SymInt) and value is not None:
        for size, n in zip(x.shape, value.shape, strict=True):
            if isinstance(n, torch.SymInt) and n.node.expr == mine.node.expr:
                return size
    return None
