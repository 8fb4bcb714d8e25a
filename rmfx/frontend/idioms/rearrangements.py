"""Calls that put the axes of a value elsewhere, as laws on its layout.

transpose, permute, movedim, swapaxes, x.mT, nn.Flatten, flatten, unflatten, view, reshape,
view_as, unsqueeze, squeeze, x[:, None], x[:, :, 0] of one position, contiguous, clone
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from rmfx.frontend.calls import arguments_of
from rmfx.ir.fillings import COPIES
from rmfx.ir.functions import torch_name
from rmfx.ir.kinds import is_a
from rmfx.ir.many_sizes import FAILURES
from rmfx.ir.net import Net
from rmfx.ir.nodes import run_node
from rmfx.ir.notes import gives_container, gives_number
from rmfx.ir.numbers import shape_read
from rmfx.ir.open_sizes import coprime_sizes

from .axis_sizes import AxisSizes
from .layouts import ONE, Row, Rows, Size, reshaped, size_of

_SWAPPED = ("mT", "T")  # attributes, and operators when they are exported
SWAPS = ("transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "numpy_T")
VIEWS = ("view", "reshape", "_unsafe_view")
LIKE = ("view_as", "reshape_as")


def rearranged(net: Net, sizes: AxisSizes, node: fx.Node, rows: Rows) -> Rows | None:
    """The layout behind a node that only rearranges a value of a layout; None if it does not."""
    module = net.module(node)
    if module is not None:
        return _by_module(module, rows)
    if node.target in COPIES and not _others(node):
        return rows
    name = torch_name(node).partition(".")[0]
    if node.target is operator.getitem:
        return _indexed(node.args[1], rows)
    order = order_of(node, len(rows))
    if order is not None:
        return tuple(rows[dim] for dim in order)
    if name in VIEWS:
        return _viewed(sizes, node, rows)
    if name in LIKE:
        other = node.args[1] if len(node.args) == 2 else None
        wanted = sizes.all_of(other) if isinstance(other, fx.Node) else None
        return None if wanted is None else reshaped(rows, wanted)
    law = _LAWS.get(name)
    given = arguments_of(node, "input", *law[0]) if law else {}
    given.pop("input", None)
    if law is None or any(isinstance(n, fx.Node) and not gives_number(n) for n in given.values()):
        return None
    try:
        return law[1](sizes, rows, **given)
    except TypeError:  # other arguments than it is known to take
        return None


def may_return(node: fx.Node) -> bool:
    """Whether a node may bring axes back to where they were; flattening alone does not."""
    name = torch_name(node).partition(".")[0]
    names = (*SWAPS, *_SWAPPED, *VIEWS, *LIKE, *_LAWS)
    return name in names or _reads_swapped(node) or _adds_or_takes(node)


def _adds_or_takes(node: fx.Node) -> bool:
    """Whether a node indexes a tensor by more than slices, which keep every axis."""
    if node.target is not operator.getitem or gives_container(node.args[0]):  # type: ignore[arg-type]
        return False
    index = node.args[1]
    return any(
        not isinstance(part, slice) and part is not ...
        for part in (index if isinstance(index, tuple) else (index,))
    )


def _reads_swapped(node: fx.Node) -> bool:
    return node.target is getattr and node.args[1] in _SWAPPED


def _others(node: fx.Node) -> bool:
    """Whether a copy is told more than what to copy."""
    return bool(set(node.kwargs) - {"memory_format"}) or len(node.args) > 1


def _by_module(module: nn.Module, rows: Rows) -> Rows | None:
    own: Any = module
    if is_a(module, nn.Flatten):
        return _flattened(None, rows, own.start_dim, own.end_dim)
    if is_a(module, nn.Unflatten) and isinstance(own.dim, int):
        parts = [Size(n) if n > 0 else None for n in own.unflattened_size]
        return _divided(rows, own.dim, parts)
    return None


def order_of(node: fx.Node, rank: int) -> list[int] | None:
    """Which dimension of its input each one is behind a node that puts them in another order.

    It is read off a value of other sizes each; None if the node does anything else.
    """
    by_name = torch_name(node).partition(".")[0] in (*SWAPS, *_SWAPPED)
    if not (by_name or _reads_swapped(node)) or len(node.all_input_nodes) != 1:
        return None
    sizes = list(itertools.islice(coprime_sizes(1), rank))
    value = {node.all_input_nodes[0]: torch.empty(sizes, device="meta")}
    try:
        found = run_node(node, value)
    except FAILURES:  # it does not run on so many dimensions
        return None
    return [sizes.index(n) for n in found.shape]


def _viewed(sizes: AxisSizes, node: fx.Node, rows: Rows) -> Rows | None:
    given: Any = node.args[1:] or tuple(v for k, v in node.kwargs.items() if k in ("shape", "size"))
    given = given[0] if len(given) == 1 else given
    if isinstance(given, fx.Node):
        whole = shape_read(given)
        if whole is not None:  # view(x.shape)
            found = sizes.all_of(whole)
            return None if found is None else reshaped(rows, found)
    listed = given if isinstance(given, (list, tuple)) else (given,)
    return _to_sizes(sizes, listed, lambda parts: reshaped(rows, parts))


def _to_sizes(
    sizes: AxisSizes, given: Sequence[Any], law: Callable[[list[Size | None]], Rows | None]
) -> Rows | None:
    """What a law makes of sizes that are written out, of which -1 is what is left."""
    parts = [None if n == -1 else sizes.number(n) for n in given]
    unknown = any(part is None and n != -1 for part, n in zip(parts, given, strict=True))
    return None if unknown else law(parts)


# ---- laws that are told by arguments -----------------------------------------------------------
def _flattened(_: object, rows: Rows, start_dim: int = 0, end_dim: int = -1) -> Rows | None:
    rank = len(rows)
    start, end = start_dim % rank, end_dim % rank
    kept = [size_of(row) for row in rows]
    return reshaped(rows, [*kept[:start], None, *kept[end + 1 :]]) if start <= end else None


def _unflattened(known: AxisSizes, rows: Rows, dim: int, sizes: Any) -> Rows | None:
    return _to_sizes(known, sizes, lambda parts: _divided(rows, dim, parts))


def _divided(rows: Rows, dim: int, parts: Sequence[Size | None]) -> Rows | None:
    dim %= len(rows)
    inner = reshaped((rows[dim],), parts)
    return None if inner is None else (*rows[:dim], *inner, *rows[dim + 1 :])


def _unsqueezed(_: object, rows: Rows, dim: int) -> Rows | None:
    dim %= len(rows) + 1
    return (*rows[:dim], (), *rows[dim:])


def _squeezed(_: object, rows: Rows, dim: Any) -> Rows | None:
    """Dimensions of one position go; those that have more at some sizes are not known to stay."""
    gone = {d % len(rows) for d in (dim if isinstance(dim, (list, tuple)) else (dim,))}
    if any(not size_of(rows[d]).is_number for d in gone):
        return None
    return tuple(row for d, row in enumerate(rows) if d not in gone or size_of(row) != ONE)


def _selected(_: object, rows: Rows, dim: int, index: Any) -> Rows | None:
    """The first of one position."""
    dim %= len(rows)
    is_only = type(index) is int and index in (0, -1) and size_of(rows[dim]) == ONE
    return (*rows[:dim], *rows[dim + 1 :]) if is_only else None


def _indexed(index: Any, rows: Rows) -> Rows | None:
    """x[:, None] and x[..., 0] of one position."""
    parts = [*index] if isinstance(index, tuple) else [index]
    taken = sum(part is not None and part is not ... for part in parts)
    if parts.count(...) > 1 or taken > len(rows):
        return None
    if ... not in parts:
        parts.append(...)
    place = parts.index(...)
    parts[place : place + 1] = [slice(None)] * (len(rows) - taken)
    left = list(rows)
    found: list[Row] = []
    for part in parts:
        if part is None:
            found.append(())
            continue
        row = left.pop(0)
        if isinstance(part, slice) and part == slice(None):
            found.append(row)
        elif type(part) is not int or part not in (0, -1) or size_of(row) != ONE:
            return None
    return tuple(found)


_LAWS: dict[str, tuple[tuple[str, ...], Callable[..., Rows | None]]] = {
    "flatten": (("start_dim", "end_dim"), _flattened),
    "unflatten": (("dim", "sizes"), _unflattened),
    "unsqueeze": (("dim",), _unsqueezed),
    "squeeze": (("dim",), _squeezed),
    "select": (("dim", "index"), _selected),
}
