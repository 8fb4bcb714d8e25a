"""Tensors of one number that meet a value of their sizes become that number.

    y = torch.zeros_like(x);  y += f(x);  y += g(x)        torch.where(mask, x, torch.zeros_like(x))

A sum that begins with zeros is the sum without them, as far as the zeros do not spread it out: in
every dimension they have one place, or as many as the value beside them. How many those are follows
from the layers between, at all sizes of the input; where that is not known they stay.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from rmfx.ir.fillings import Filling, filling, original
from rmfx.ir.kinds import KEEPING_BATCH, is_a
from rmfx.ir.net import Net
from rmfx.ir.nodes import is_tensor_node, must_stay
from rmfx.ir.notes import gives_number, kind_read, why_frozen
from rmfx.ir.numbers import size_read
from rmfx.ir.reading import sizes_of
from rmfx.ir.size_keeping import keeps_sizes, meets

from .sums_of_sizes import Numbers, Sum, added, constant_of

MEETING = (torch.add, torch.sub, torch.mul, torch.div, torch.where)
NEAR = 1000  # values that are looked at on the way from one to another


def numbers_for_fillings(gm: fx.GraphModule) -> None:
    """Put a number in the place of every tensor that holds nothing else and spreads nothing out."""
    if not any(_filled_places(node) for node in gm.graph.nodes):
        return
    net = Net(gm)
    own = dict(zip(net.graph.nodes, gm.graph.nodes, strict=True))
    numbers = Numbers(net)
    for twin, node in own.items():
        args = [*node.args]
        for place, found in _filled_places(twin):
            if _is_neutral(numbers, twin, place, found):
                args[place] = found.number
        node.args = tuple(args)
    gm.graph.eliminate_dead_code(is_impure_node=must_stay)


def _filled_places(node: fx.Node) -> list[tuple[int, Filling]]:
    """The operand of a node that holds one number, beside one that does not."""
    if node.op != "call_function" or node.target not in MEETING or why_frozen(node):
        return []
    tensors = [] if gives_number(node) else _tensors(node)
    found = [(i, filling(x)) for i, x in tensors]
    filled = [(i, one) for i, one in found if one is not None]
    return filled if len(filled) == 1 < len(tensors) else []


def _is_neutral(numbers: Numbers, node: fx.Node, place: int, found: Filling) -> bool:
    """Whether a number does what the tensor of that number does: to type and sizes."""
    filled: Any = node.args[place]
    value: Any = next(x for i, x in _tensors(node) if i != place)
    return _keeps_type(numbers.net, (node, filled, value), found) and all(
        _fits(numbers, found, value, dim) for dim in range(-(_rank(numbers, found) or 0), 0)
    )


def _tensors(node: fx.Node) -> list[tuple[int, Any]]:
    """The operands of a node that are tensors, by their places; a condition is none."""
    start = 1 if node.target is torch.where else 0
    return [(i, x) for i, x in enumerate(node.args) if i >= start and is_tensor_node(x)]


def _rank(numbers: Numbers, found: Filling) -> int | None:
    return len(found.sizes) if found.like is None else numbers.net.rank(found.like)


def _keeps_type(net: Net, nodes: tuple[fx.Node, ...], found: Filling) -> bool:
    """Whether the result has the type of the value beside, which is real."""
    kinds = [kind_read(n) for n in nodes]
    if None not in kinds:
        return bool(kinds[0] == kinds[2] and kinds[2][0].is_floating_point)
    _, filled, value = nodes
    # Without notes: what is made like a value, and not told otherwise, has its type.
    made, known = original(filled), net.dtype(value)
    like = made.args[0] if made.args and not made.kwargs else None
    if not isinstance(like, fx.Node) or gives_number(like) or known is None:
        return False
    return known[0].is_floating_point and net.dtype(like) == known


def _fits(numbers: Numbers, found: Filling, value: fx.Node, dim: int) -> bool:
    """Whether a dimension, counted from the last one, has one place or as many as a value's."""
    net = numbers.net
    at = (net.rank(value) or 0) + dim
    own = found.sizes[dim] if found.like is None else None
    if own == 1 or at < 0:
        return own == 1
    source, place = (found.like, dim) if own is None else (None, None)
    if isinstance(own, fx.Node):
        source, place = size_read(own)
    rank = None if source is None else net.rank(source)
    if source is None or rank is None or not isinstance(place, int):
        return _is_size(numbers, numbers(own), value, at)
    place %= rank
    return (
        (place == at and _follows(net, _of_its_size(net, source, at), value, at))
        or (place == at == 1 and _has_channels(net, source, value))
        or _has_law(net, (source, place), (value, at))
        or _is_size(numbers, numbers.size(source, place), value, at)
    )


def _of_its_size(net: Net, value: fx.Node, dim: int) -> fx.Node:
    """The first value that has a size of another one, which is made of it alone."""
    while True:
        read = [n for n in value.all_input_nodes if is_tensor_node(n)]
        module = net.module(value)
        keeps_batch = dim == 0 and module is not None and is_a(module, KEEPING_BATCH)
        if len(read) != 1 or not (
            keeps_sizes(net, value) or _is_whole(value, dim) or (keeps_batch and net.rank(value))
        ):
            return value
        value = read[0]


def _is_whole(node: fx.Node, dim: int) -> bool:
    """Whether slices of other dimensions give a node."""
    index = node.args[1] if node.target is operator.getitem else None
    slices = isinstance(index, tuple) and all(isinstance(i, slice) for i in index)
    return slices and (*index, *[slice(None)] * (dim + 1))[dim] == slice(None)  # type: ignore[misc]


def _is_size(numbers: Numbers, size: Sum | None, value: fx.Node, at: int) -> bool:
    """Whether a number is a size of a value at all sizes of the inputs."""
    own = _channels(numbers.net, value) if at == 1 else None
    known = numbers.size(value, at) if own is None else {None: own}
    return None not in (size, known) and constant_of(added(known, size, -1)) == 0  # type: ignore[arg-type]


def _has_channels(net: Net, source: fx.Node, value: fx.Node) -> bool:
    """Whether a value has one channel, or as many as another one."""
    own = _channels(net, source)
    return own is not None and own in (1, _channels(net, value))


def _channels(net: Net, value: fx.Node) -> int | None:
    """The channels of a value, None if they may change."""
    rank = net.rank(value)
    return None if rank is None else net.channels(value, max(rank - 2, 0))


def _has_law(net: Net, one: tuple[fx.Node, int], other: tuple[fx.Node, int]) -> bool:
    """Whether sizes of two values follow from one input in the same way.

    Where operands on the way are spread out at some sizes, so is the second value at least.
    """
    (x, place), (y, at) = one, other
    first, second = sizes_of(net).law(x), sizes_of(net).law(y)
    if first is None or second is None or min(place, at) < 2 or first.source is not second.source:
        return False
    if not first.agreed <= second.agreed:
        return False
    laws = ((law.stride[i - 2], law.growth[i - 2]) for law, i in ((first, place), (second, at)))
    return len(set(laws)) == 1


def _follows(net: Net, source: fx.Node, value: fx.Node, dim: int) -> bool:
    """Whether a value is made of another one by calls that keep a size, or spread it out."""
    left, seen = [value], {value}
    while left and len(seen) < NEAR:
        node = left.pop()
        if node is source:
            return True
        if node < source or not _keeps(net, node, dim):
            continue
        fresh = {n for n in node.all_input_nodes if is_tensor_node(n)} - seen
        seen |= fresh
        left += sorted(fresh)
    return False


def _keeps(net: Net, node: fx.Node, dim: int) -> bool:
    """Whether a node gives in a dimension as many places as what it reads has, or more than 1."""
    if node.target is torch.cat:
        return len(node.args) == 2 and isinstance(node.args[1], int) and node.args[1] > dim
    if node.target in MEETING or meets(net, node) or keeps_sizes(net, node):
        return True
    module = net.module(node)
    if dim == 0 and module is not None:
        return net.rank(node) is not None and is_a(module, KEEPING_BATCH)
    return is_a(module, nn.Linear) and dim + 1 < (net.rank(node) or 0)
