"""Sums over an axis of branches become additions.

    torch.stack([a, b], 1).mul(w).sum(1)                         a * w[:, 0] + b * w[:, 1]
    u.view(n, 2, c, h, w).mul(v).sum(1)           u[:, :c] * v[:, 0] + u[:, c:] * v[:, 1]
    u.view(n, 2, c, h, w).sum(1)                                 u[:, :c] + u[:, c:]

is how selective kernels and split attention weigh their branches. A view has such an axis where it
takes apart the channels and nothing else, which two runs without values show, or the numbers in it,
of which the result then demands that they are the sizes of what is viewed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from rmfx.frontend.calls import arguments_of
from rmfx.ir.conditions import AGAIN, demand_sizes
from rmfx.ir.facts import Inference, facts_of
from rmfx.ir.kinds import STACKS, SUMS
from rmfx.ir.many_sizes import FAILURES
from rmfx.ir.notes import (
    OF_BRANCHES,
    SHAPE,
    set_shape,
    shape_of,
    type_of,
    why_frozen,
    without_notes,
)
from rmfx.ir.open_sizes import OpenSizes

from .shuffles import RESHAPES, run_from, two_sizes

KEEPING = (torch.softmax, "softmax", torch.sigmoid, "sigmoid", nn.functional.softmax)


@dataclass(frozen=True)
class _Branches:
    """A value with an axis of branches.

    Attributes:
        count: of the branches.
        part: gives the node of one, at the graph's insert point.
        prove: lets the graph demand what it needs to be so.
    """

    count: int
    part: Callable[[int], fx.Node]
    prove: Callable[[], None] = lambda: None


def add_branches(gm: fx.GraphModule, sizes: OpenSizes) -> None:
    """Write sums over an axis of branches as additions of what the branches give."""
    facts = facts_of(gm, by_readers=True, sizes=sizes)
    for node in list(gm.graph.nodes):
        if SUMS.get(node.target) == "sum" and why_frozen(node) is None:
            _add(gm, node, facts)


def _add(gm: fx.GraphModule, node: fx.Node, facts: Inference) -> None:
    given = arguments_of(node, "input", "dim", "keepdim")
    whole, dim = given.pop("input", None), given.pop("dim", None)
    dim = dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim
    if given.pop("keepdim", False) or given or type(dim) is not int or dim < 1:
        return
    if not isinstance(whole, fx.Node) or why_frozen(whole) is not None or not facts.is_real(whole):
        return
    weight = None
    branches = _branches(gm, whole, dim, facts)
    if branches is None and whole.target is torch.mul and len(whole.users) == 1:
        for value, weight in (whole.args, whole.args[::-1]):
            branches = _branches(gm, value, dim, facts)
            if branches is not None and _size(weight, dim, facts) == branches.count:
                break
        else:
            return
    if branches is None:
        return
    branches.prove()
    with node.graph.inserting_before(node):
        parts = [_part(branches, weight, i, dim, node) for i in range(branches.count)]
        total = parts[0]
        for part in parts[1:]:
            total = node.graph.call_function(torch.add, (total, part))
            total.meta = without_notes(node) | {OF_BRANCHES: True}
    node.replace_all_uses_with(total)
    node.graph.erase_node(node)


def _part(branches: _Branches, weight: Any, i: int, dim: int, node: fx.Node) -> fx.Node:
    """One branch, times its weight if there is one."""
    value = branches.part(i)
    if weight is None:
        return value
    own = node.graph.call_function(operator.getitem, (weight, (*[slice(None)] * dim, i)))
    own.meta = without_notes(weight, SHAPE)
    shape = shape_of(weight)
    if shape is not None:
        set_shape(own, (*shape[:dim], *shape[dim + 1 :]))
    product = node.graph.call_function(torch.mul, (value, own))
    product.meta = without_notes(node)
    return product


def _branches(gm: fx.GraphModule, value: Any, dim: int, facts: Inference) -> _Branches | None:
    """The branches of a value along a dimension; None if that is no axis of branches."""
    if not isinstance(value, fx.Node) or why_frozen(value) is not None:
        return None
    if value.target in STACKS:
        known = arguments_of(value, "tensors", "dim")
        tensors: Any = known.get("tensors")
        same = isinstance(tensors, (list, tuple)) and known.get("dim", 0) == dim
        alike = same and len({type_of(n) for n in tensors}) == 1 and len(tensors) > 1
        return _Branches(len(tensors), lambda i: tensors[i]) if alike else None
    if dim != 1 or value.op == "call_module" or value.target not in RESHAPES:
        return None
    return _of_view(gm, value, facts)


def _of_view(gm: fx.GraphModule, view: fx.Node, facts: Inference) -> _Branches | None:
    source: Any
    sizes: Any
    source, *sizes = view.args
    sizes = list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (list, tuple)) else sizes
    sizes = list(facts.with_numbers(sizes))
    rank = facts.rank(source) if isinstance(source, fx.Node) else None
    if rank is None or rank < 3 or len(sizes) != rank + 1 or view.kwargs:
        return None
    count, channels = sizes[1:3]
    told = facts(source)
    own = told.channels if told.has_channels_in(1) else facts.size(source, 1)
    if type(count) is not int or type(channels) is not int or count < 2:
        return None
    if own != count * channels:
        return None
    space, prove = sizes[3:], lambda: None
    if all(type(n) is int and n > 0 for n in space):
        prove = lambda: _demand(source, [None, own, *space])  # noqa: E731
    elif not _takes_channels_apart(gm, view, source, facts, (count, channels)):
        return None

    def part(i: int) -> fx.Node:
        index = (slice(None), slice(i * channels or None, (i + 1) * channels))
        made = view.graph.call_function(operator.getitem, (source, index))
        made.meta = without_notes(source, SHAPE)
        shape = shape_of(source)
        if shape is not None:
            set_shape(made, (shape[0], channels, *shape[2:]))
        return made

    return _Branches(count, part, prove)


def _demand(source: fx.Node, sizes: list[int | None]) -> None:
    with source.graph.inserting_before(source.next):
        message = f"the network has the size {sizes[2:]} in its code; {AGAIN}"
        demand_sizes(source.graph, source, sizes, message)


def _takes_channels_apart(
    gm: fx.GraphModule, view: fx.Node, source: fx.Node, facts: Inference, parts: tuple[int, int]
) -> bool:
    """Whether a view gives the channels two dimensions, at two sizes of all that may change."""
    found = []
    for sizes in two_sizes([view], source, facts):
        try:
            made = run_from(gm, view, source, torch.empty(sizes, device="meta"))
        except FAILURES:
            return False
        found.append(tuple(made.shape) == (sizes[0], *parts, *sizes[2:]))
    return bool(found) and all(found)


def _size(value: Any, dim: int, facts: Inference) -> int | None:
    """How many branches a weight is for."""
    while isinstance(value, fx.Node) and value.target in KEEPING:
        value = value.args[0] if value.args else None
    if not isinstance(value, fx.Node):
        return None
    known = arguments_of(value, "tensors", "dim") if value.target in STACKS else {}
    if isinstance(known.get("tensors"), (list, tuple)):
        return len(known["tensors"]) if known.get("dim", 0) == dim else facts.size(value, dim)
    if value.op != "call_module" and value.target in RESHAPES and not value.kwargs:
        sizes: Any = value.args[1:]
        sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (list, tuple)) else sizes
        size = facts.with_numbers(sizes)[dim] if dim < len(sizes) else None
        return size if type(size) is int and size > 0 else facts.size(value, dim)
    return facts.size(value, dim)
