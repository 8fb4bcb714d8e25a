"""Spans between a rearrangement and its return are written without either (`spans.py`)."""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from rmfx.ir.kinds import ADDITIVE
from rmfx.ir.net import Net
from rmfx.ir.nodes import is_tensor_node, must_stay, replace_by_number
from rmfx.ir.notes import NUMBER, forget, gives_number, set_shape, shape_of
from rmfx.ir.reading import sizes_of
from rmfx.report import joins_held

from .axis_sizes import AxisSizes
from .layouts import Row
from .rearrangements import may_return
from .span_layers import Write, in_layout
from .spans import Spans, View, sizes_asked
from .swaps import join_before_swaps


def without_detours(gm: fx.GraphModule) -> bool:
    """Write every span that ends where it began as layers on the value as it is.

    Returns:
        Whether there was one.
    """
    if not any(may_return(node) for node in gm.graph.nodes):
        return False
    found = _written(gm)
    if join_before_swaps(gm):
        _written(gm)
        return True
    return found


def _written(gm: fx.GraphModule) -> bool:
    """Write the spans that are there now, and tell whether there was one."""
    net = Net(gm)
    own = dict(zip(net.graph.nodes, gm.graph.nodes, strict=True))
    spans = Spans(net, AxisSizes(net))
    writes: dict[fx.Node, Write] = {}
    for node in net.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr") or gives_number(node):
            continue
        if not spans.follow(node) and (found := in_layout(spans, node)) is not None:
            spans.note(node, found[0])
            writes[node] = found[1]
        _note_law(spans, node)
    closed = spans.closed()
    writer = _Writer(gm, spans, joins_held(gm))
    for node in own:
        if node in closed:
            writer.write(node, own[node], writes)
    gm.graph.eliminate_dead_code(is_impure_node=must_stay)
    return bool(closed)


def _note_law(spans: Spans, node: fx.Node) -> None:
    """Let the sizes of a value that is back be known by those of the one it began with."""
    view = spans.views.get(node)
    began = spans.view(view.origin) if view is not None and view.is_straight else None
    if view is not None and began is not None and view.axes[2:] == began.axes[2:]:
        sizes_of(spans.net).note(node, view.origin)


@dataclass(eq=False)
class _Writer:
    """Writes the nodes of spans.

    Attributes:
        gm: whose nodes they are.
        spans: what is known of them, by nodes of a copy.
        holders: names of the nodes that hold values of joins by the report of an earlier pass.
        straight: node -> what holds its value with the axes in order.
    """

    gm: fx.GraphModule
    spans: Spans
    holders: Collection[str]
    straight: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def write(self, twin: fx.Node, node: fx.Node, writes: dict[fx.Node, Write]) -> None:
        """Let a node stand in the layout in which its span begins."""
        view = self.spans.views[twin]
        if twin in self.spans.moved:
            x: Any = node.args[0]
            self.straight[node] = self.straight.get(x, x)
            if view.is_straight:
                node.replace_all_uses_with(self.straight[node])
                return
        else:
            self._put(node, view, writes[twin])
        if not view.is_straight:
            for user, dim in sizes_asked(node):
                self._ask(self.straight.get(node, node), user, view.rows[dim], view)

    def _put(self, node: fx.Node, view: View, write: Write) -> None:
        read = {n: self.straight.get(n, n) for n in node.all_input_nodes if is_tensor_node(n)}
        node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), lambda n: read.get(n, n))
        write(self.gm, node)
        if not view.is_straight and (node.target in ADDITIVE or node.name in self.holders):
            # Who compares joins by name is to find none whose dimensions stand in another order.
            namespace = self.gm.graph._graph_namespace
            node.name = namespace.create_name(f"{node.name}_straight", None)
        if shape_of(node) is not None:
            set_shape(node, tuple(self.spans.sizes.example(size) for size in view.axes))
        forget(node)

    def _ask(self, value: fx.Node, user: fx.Node, row: Row, view: View) -> None:
        """Let a node ask for the sizes of the axes that make up a dimension."""
        number = 1
        found: fx.Node | None = None
        graph = self.gm.graph
        for part in row:
            if part.size.is_number:
                number *= part.size.number
                continue
            with graph.inserting_before(user):
                one = graph.call_method("size", (value, part.axis))
                one.meta[NUMBER] = True
                if found is not None:
                    one = graph.call_function(operator.mul, (found, one))
                    one.meta[NUMBER] = True
            found = one
        if found is None:
            replace_by_number(user, number)
            return
        if number != 1:
            with graph.inserting_before(user):
                found = graph.call_function(operator.mul, (found, number))
                found.meta[NUMBER] = True
        user.replace_all_uses_with(found)
        graph.erase_node(user)
