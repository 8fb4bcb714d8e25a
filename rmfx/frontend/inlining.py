"""Graphs that a graph calls as operators become part of it.

    torch.ops.higher_order.tag_activation_checkpoint(body, x, w, b)[0]

Dynamo puts what `torch.utils.checkpoint` wraps, or what is to be compiled once for all its calls,
into a graph of its own. At inference calling it is all that the operator does.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx
from torch._ops import HigherOrderOperator

from rmfx.ir.converted import attach, copy_graph
from rmfx.ir.names import free_name
from rmfx.ir.nodes import attribute

_FIRST_INPUT = {  # of operators that call a graph with what comes behind it: its place
    "tag_activation_checkpoint": 1,
    "wrap_activation_checkpoint": 1,
    "wrap": 1,
    "invoke_subgraph": 2,
}


def inline_bodies(gm: fx.GraphModule) -> None:
    """Put the nodes of such graphs in the places of their calls."""
    for node in list(gm.graph.nodes):
        body = _body(gm, node)
        if body is not None:
            inline_bodies(body)
            _inline(gm, node, body)


def _body(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    """A copy of the graph that a node calls, if it only calls one and takes its results apart."""
    target: Any = node.target
    if not isinstance(target, HigherOrderOperator) or target.name() not in _FIRST_INPUT:
        return None
    held = node.args[0]
    body = attribute(gm, held) if isinstance(held, fx.Node) and held.op == "get_attr" else None
    if not isinstance(body, fx.GraphModule):
        return None
    inputs = len(node.args) - _FIRST_INPUT[target.name()]
    places = body.graph.find_nodes(op="placeholder")
    results = body.graph.output_node().args[0]
    taken = all(u.target is operator.getitem and isinstance(u.args[1], int) for u in node.users)
    if len(places) != inputs or not isinstance(results, (list, tuple)) or not taken:
        return None
    if list(body.graph.find_nodes(op="call_module")):
        return None
    return fx.GraphModule(body, copy_graph(body))


def _inline(gm: fx.GraphModule, node: fx.Node, body: fx.GraphModule) -> None:
    given = node.args[_FIRST_INPUT[node.target.name()] :]  # type: ignore[union-attr]
    places = body.graph.find_nodes(op="placeholder")
    values: dict[fx.Node, Any] = dict(zip(places, given, strict=True))
    taken: set[str] = set()
    with gm.graph.inserting_before(node):
        results: Any = gm.graph.graph_copy(body.graph, values)
    for own, copied in values.items():
        if own.op == "get_attr" and isinstance(copied, fx.Node):
            copied.target = _held(gm, body, own, taken)
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)


def _held(gm: fx.GraphModule, body: fx.GraphModule, node: fx.Node, taken: set[str]) -> str:
    """The name under which a graph holds what a graph that it called held."""
    value = attribute(body, node)
    name = free_name(gm, str(node.target).replace(".", "_"), taken)
    attach(gm, name, value)
    return name
