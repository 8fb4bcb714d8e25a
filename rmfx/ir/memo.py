"""Facts about the nodes of a graph, computed on demand and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import fx

T = TypeVar("T")


def on_demand(
    node: fx.Node,
    known: dict[fx.Node, T],
    compute: Callable[[fx.Node], T],
    inputs: Callable[[fx.Node], Sequence[fx.Node]] = lambda node: node.all_input_nodes,
) -> T:
    """The value of a node, computed after those of its inputs, all kept in `known`.

    A loop instead of a recursion: networks are deeper than Python's stack.

    Args:
        inputs: of a node that is computed, by default all that it reads.
    """
    stack = [node]
    while stack:
        here = stack[-1]
        missing = [n for n in inputs(here) if n not in known]
        if here in known:
            stack.pop()
        elif missing:
            stack.extend(missing)
        else:
            known[here] = compute(here)
            stack.pop()
    return known[node]


def succeed(known: dict[fx.Node, T], node: fx.Node, other: fx.Node) -> None:
    """Let what is known of a node be what is known of another one, or nothing."""
    known.pop(node, None)
    if other in known:
        known[node] = known.pop(other)
