"""Nodes that put channels in another order, take some of them, or some of them several times.

    x.repeat(1, 2, 1, 1)    torch.cat((x, x), 1)    x.flip(1)    x.roll(1, 1)    x[:, [2, 0, 1]]
    x.repeat_interleave(2, 1)    x.index_select(1, order)    nn.ChannelShuffle(2)

The arguments prove along which dimensions such a node moves values. That it runs on one value, and
what it makes of that, proves nothing: a roll by 3 leaves 3 rows as they are. Only where it moves
them along the channels alone is it run, on numbers that tell from which channel they come: none of
these operations looks at the numbers, so it does the same with all others, at every place.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rmfx.algebra.affine import AffineConv

from .kinds import is_a
from .net import Net
from .nodes import run_node
from .notes import gives_number, shape_of

aten = torch.ops.aten
Dims = Sequence[Any] | None  # along which values move; None where the arguments do not tell
BEYOND = 2**62  # where a slice of all there is may end


def _of_roll(_: int, shifts: Any, dims: Any = ()) -> Dims:
    shifts, dims = _each(shifts), _each(dims)
    if len(shifts) != len(dims):  # without dimensions it rolls the value as one long row
        return None
    total: Counter[Any] = Counter()
    for shift, dim in zip(shifts, dims, strict=True):
        total[dim] += shift
    return [dim for dim, shift in total.items() if shift != 0]


def _of_flip(_: int, dims: Any) -> Dims:
    return _each(dims)


def _of_repeat(rank: int, repeats: Any) -> Dims:
    if len(repeats) != rank:  # more of them than dimensions make further ones
        return None
    return [dim for dim, count in enumerate(repeats) if count != 1]


def _of_tile(rank: int, dims: Any) -> Dims:
    dims = _each(dims)
    return _of_repeat(rank, [*[1] * (rank - len(dims)), *dims])


def _of_repeat_interleave(_: int, repeats: Any, dim: Any = None, output_size: Any = None) -> Dims:
    return None if dim is None else [dim] if repeats != 1 else []


def _of_index_select(_: int, dim: Any, index: Any) -> Dims:
    return [dim]


def _of_cat(_: int, dim: Any = 0) -> Dims:
    return [dim]


def _of_shuffle(_: int, groups: Any = None) -> Dims:
    return [1]


def _of_getitem(rank: int, index: Any) -> Dims:
    parts = [*index] if isinstance(index, tuple) else [index]
    open_ends = [place for place, part in enumerate(parts) if part is ...]
    if len(open_ends) > 1 or None in parts:
        return None
    for place in open_ends:
        parts[place : place + 1] = [slice(None)] * (rank - len(parts) + 1)
    return [dim for dim, part in enumerate(parts) if not _is_whole(part)]


def _of_index(_: int, indices: Any) -> Dims:
    return [dim for dim, index in enumerate(indices) if index is not None]


MOVES: dict[str, Callable[..., Dims]] = {
    "repeat": _of_repeat,
    "tile": _of_tile,
    "repeat_interleave": _of_repeat_interleave,
    "flip": _of_flip,
    "roll": _of_roll,
    "index_select": _of_index_select,
    "channel_shuffle": _of_shuffle,
}
FUNCTIONS: dict[Any, Callable[..., Dims]] = {
    **{f: MOVES[f.__name__] for f in (torch.tile, torch.repeat_interleave, torch.flip)},
    **{f: MOVES[f.__name__] for f in (torch.roll, torch.index_select, F.channel_shuffle)},
    torch.cat: _of_cat,
    operator.getitem: _of_getitem,
    aten.repeat.default: _of_repeat,
    aten.tile.default: _of_tile,
    aten.repeat_interleave.self_int: _of_repeat_interleave,
    aten.flip.default: _of_flip,
    aten.roll.default: _of_roll,
    aten.index_select.default: _of_index_select,
    aten.index.Tensor: _of_index,
    aten.channel_shuffle.default: _of_shuffle,
}
SIZES_BY_PLACE = ("repeat", "tile", "flip")  # methods that take numbers as well as a list of them


def may_select(net: Net, node: fx.Node) -> bool:
    """Whether a node is one of those that can put the channels of its input in another order."""
    if node.op == "call_module":
        return is_a(net.module(node), nn.ChannelShuffle)
    if node.op == "call_method":
        return node.target in MOVES
    if node.target is operator.getitem:  # slices are crops
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return any(isinstance(i, (list, fx.Node)) for i in index)
    return node.op == "call_function" and node.target in FUNCTIONS


def selection(net: Net, node: fx.Node, channels: int, dims: int) -> AffineConv | None:
    """The channels that a node takes, as a pointwise layer; None if it does more than that."""
    rows = selected(net, node, channels, dims)
    if rows is None:
        return None
    weight = torch.zeros(len(rows), channels, dtype=torch.bfloat16)
    weight[torch.arange(len(rows)), rows] = 1
    return AffineConv.pointwise(weight, dims=dims)


def selected(net: Net, node: fx.Node, channels: int, dims: int) -> list[int] | None:
    """Which channels of its input a node takes, in order; None if it does more than that."""
    source = next(n for n in node.all_input_nodes if n.op != "get_attr")
    rank = net.rank(source) or (dims + 2 if dims else None)
    if rank is None or rank < 2 or (dims and rank != dims + 2):
        return None
    axis = 1 if dims else rank - 1
    moved = _moves(node, rank)
    if moved is None or moved - {axis}:
        return None
    row = [1] * rank
    row[axis] = channels
    found = _run(net, node, torch.arange(channels, dtype=torch.float64).reshape(row))
    if found is None or found.dim() != rank or found.numel() != found.shape[axis]:
        return None
    rows = [int(row) for row in found.flatten().tolist()]  # numbers that weights may not decide
    return rows if rows and _is_noted(node, source, axis, len(rows)) else None


def _moves(node: fx.Node, rank: int) -> set[int] | None:
    """The dimensions along which a node moves values, None where its arguments do not tell."""
    if node.op == "call_module":
        return {1}
    by_method = node.op == "call_method"
    args: Sequence[Any] = node.args[1:]
    if by_method and node.target in SIZES_BY_PLACE and args:
        args = args if isinstance(args[0], (list, tuple)) else [args]
    given = {k: v for k, v in node.kwargs.items() if k not in ("input", "self", "tensors")}
    reader = MOVES[str(node.target)] if by_method else FUNCTIONS[node.target]
    try:
        dims = reader(rank, *args, **given)
    except TypeError:  # other arguments than it is known to take
        return None
    if dims is None or not all(type(dim) is int and -rank <= dim < rank for dim in dims):
        return None
    return {dim % rank for dim in dims}


def _each(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _is_whole(part: Any) -> bool:
    """Whether a part of an index takes all there is along its dimension."""
    if not isinstance(part, slice) or part.start not in (None, 0) or part.step not in (None, 1):
        return False
    return part.stop is None or (type(part.stop) is int and part.stop >= BEYOND)


def _is_noted(node: fx.Node, source: fx.Node, axis: int, count: int) -> bool:
    """Whether the shapes that were noted are those of such a choice of channels."""
    before, behind = shape_of(source), shape_of(node)
    if before is None or behind is None:
        return True
    return bool((*before[:axis], count, *before[axis + 1 :]) == tuple(behind))


def _run(net: Net, node: fx.Node, x: Tensor) -> Tensor | None:
    """What a node makes of a value in the place of its input; None if that is not all it reads."""
    if node.target is torch.cat and len(node.all_input_nodes) > 1:
        return None
    values: dict[fx.Node, Any] = {}
    for read in node.all_input_nodes:
        values[read] = net.constant(read) if read.op == "get_attr" else x
    if any(value is None for value in values.values()):
        return None
    if any(gives_number(n) for n in values) or sum(v is x for v in values.values()) != 1:
        return None
    try:
        found = run_node(node, values, lambda _: net.module(node))  # type: ignore[arg-type, return-value]
    except (RuntimeError, TypeError, ValueError, IndexError):  # it does not run on such a value
        return None
    return found if isinstance(found, Tensor) else None
