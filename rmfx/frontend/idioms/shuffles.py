"""Channels that views put in another order become nn.ChannelShuffle.

    x.view(n, g, c // g, h, w).transpose(1, 2).contiguous().view(n, c, h, w)

is how ShuffleNets, and what is built on them, write it. What such a chain does to the order of
values follows from the sizes between: a first part of them makes up the samples, a second one the
channels, the rest the space, and only the second one may change its order. That is read off runs
without values, at two sizes of all that may change.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rmfx.ir.facts import Inference, facts_of
from rmfx.ir.kinds import is_a
from rmfx.ir.many_sizes import FAILURES
from rmfx.ir.memo import on_demand
from rmfx.ir.nodes import run_node
from rmfx.ir.notes import noted, sizes_of_every_call, why_frozen
from rmfx.ir.open_sizes import LARGEST, OpenSizes, coprime_sizes, largest_number

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
Shuffle = tuple[fx.Node, fx.Node, nn.Module]


def find_shuffles(gm: fx.GraphModule, sizes: OpenSizes) -> list[Shuffle]:
    """The last node of each such chain, what it begins with, and the module that does the same."""
    facts = facts_of(gm, by_readers=True, sizes=sizes)
    found: list[Shuffle] = []
    for node in gm.graph.nodes:
        chain = _chain(gm, node)
        source = _input(chain[0]) if chain else None
        if source is not None and (groups := _groups(gm, chain, source, facts)) is not None:
            found.append((node, source, nn.ChannelShuffle(groups)))
    return found


def _chain(gm: fx.GraphModule, last: fx.Node) -> list[fx.Node]:
    """A reshaping, swaps of dimensions and a second reshaping, in order; empty if it is none."""
    if not _reshapes(gm, last):
        return []
    found, here = [last], _input(last)
    while here is not None and (here.target in SWAPS or here.target in COPIES):
        found.append(here)
        here = _input(here)
    if here is None or not _reshapes(gm, here) or not any(n.target in SWAPS for n in found):
        return []
    return [here, *reversed(found)]


def _reshapes(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return is_a(gm.get_submodule(str(node.target)), RESHAPING)
    return node.op in ("call_function", "call_method") and node.target in RESHAPES


def _input(node: fx.Node) -> fx.Node | None:
    """The tensor that a node reads first, None if others may see or change what it gives."""
    x = node.args[0] if node.args else None
    apart = why_frozen(node) is not None or not isinstance(x, fx.Node) or why_frozen(x) is not None
    return None if apart else x  # type: ignore[return-value]


def _groups(
    gm: fx.GraphModule, chain: list[fx.Node], source: fx.Node, facts: Inference
) -> int | None:
    """Of the shuffle that a chain amounts to, None if it does something else."""
    first, *swaps, last = chain
    found = set()
    for sizes in two_sizes(chain, source, facts):
        x = torch.empty(sizes, device="meta")
        try:
            grouped, y = run_from(gm, first, source, x), run_from(gm, last, source, x)
            order = _order(gm, swaps, grouped.dim())
        except FAILURES:  # it does not run at such a size, or reads what is not known
            return None
        found.add(_groups_of(sizes, grouped.shape, order) if y.shape == x.shape else None)
    return found.pop() if len(found) == 1 else None


def _order(gm: fx.GraphModule, swaps: list[fx.Node], rank: int) -> list[int]:
    """Which dimension stands where behind some swaps."""
    sizes = list(itertools.islice(coprime_sizes(1), rank))
    value = torch.empty(sizes, device="meta")
    for node in swaps:
        value = run_node(node, {node.all_input_nodes[0]: value}, gm.get_submodule)
    return [sizes.index(n) for n in value.shape]


def _groups_of(sizes: Sequence[int], grouped: Sequence[int], order: Sequence[int]) -> int | None:
    """Of the shuffle that a reshaping of `sizes`, another order and a reshaping back amount to."""
    # Dimensions of one value may stand anywhere.
    kept = [dim for dim, size in enumerate(grouped) if size > 1]
    order = [kept.index(dim) for dim in order if dim in kept]
    inner = [grouped[dim] for dim in kept]
    ends = list(itertools.accumulate(inner, operator.mul, initial=1))
    batch, channels = sizes[:2]
    if batch not in ends or batch * channels not in ends:
        return None
    start, stop = ends.index(batch), ends.index(batch * channels)
    outside = [*range(start), *range(stop, len(inner))]
    if [*order[:start], *order[stop:]] != outside:
        return None
    rows = torch.arange(channels).view(inner[start:stop])
    rows = rows.permute([dim - start for dim in order[start:stop]]).flatten()
    groups = channels // int(rows[1]) if channels > 1 and channels >= rows[1] > 0 else 1
    is_one = groups > 1 and channels % groups == 0
    shuffled = F.channel_shuffle(torch.arange(channels).view(1, -1, 1), groups) if is_one else None
    return groups if shuffled is not None and torch.equal(shuffled.flatten(), rows) else None


def two_sizes(chain: list[fx.Node], source: fx.Node, facts: Inference) -> set[tuple[int, ...]]:
    """Two sizes of a value, which differ in all that the graph leaves open."""
    told, rank = facts(source), facts.rank(source)
    channels = told.channels if told.has_channels_in(1) else facts.size(source, 1)
    if channels is None or rank is None or rank < 3:
        return set()
    known = sizes_of_every_call(source) or (None, channels, *[None] * (rank - 2))
    numbers = [n for n in known if type(n) is int]
    above = max(largest_number(_behind(source, chain)), *numbers, channels)
    if above > LARGEST:
        return set()
    others = coprime_sizes(above)
    return {tuple(n if type(n) is int else next(others) for n in known) for _ in range(2)}


def _behind(source: fx.Node, chain: list[fx.Node]) -> set[fx.Node]:
    """The nodes of a chain, and those behind its source that they read numbers of."""
    found, waiting = set(chain), [*chain]
    while waiting:
        read = [n for n in waiting.pop().all_input_nodes if source < n and n not in found]
        found.update(read)
        waiting += read
    return found


def run_from(gm: fx.GraphModule, last: fx.Node, source: fx.Node, x: Tensor) -> Any:
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
