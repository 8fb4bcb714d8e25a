"""Whether a value has its type at every call, whatever types the inputs of the network have.

What an example shows of types holds for inputs of its types alone. A layer, though, takes values of
the type of its weights and gives such, so that behind one a cast to that type is none, ever. Before
the first layer floating numbers are taken for such. Where something was decided by that, an input
that nothing shows to hold them has to: a network says so.
"""

from __future__ import annotations

import operator

from torch import fx, nn

from .callees import Calls
from .conditions import AGAIN, demand_that
from .functions import reads_sizes_alone
from .kinds import BATCH_NORMS, CAST_OPERATORS, CASTS, LAYER_KINDS, is_a
from .memo import on_demand
from .notes import GUARDED, KIND, gives_number, type_of


class OwnTypes:
    """Answers about the nodes of one graph.

    Args:
        calls: what its nodes call.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._known: dict[fx.Node, bool] = {}

    def __call__(self, node: fx.Node) -> bool:
        """Whether a value has its type whatever types the inputs have, or these have their own."""
        return on_demand(node, self._known, self._compute, self._asked)

    def _compute(self, node: fx.Node) -> bool:
        told = self._told(node)
        return all(self._known[n] for n in self._asked(node)) if told is None else told

    def _asked(self, node: fx.Node) -> list[fx.Node]:
        if self._told(node) is not None:
            return []
        if is_cast(node):  # to the type of another value
            others = (*node.args[1:], *node.kwargs.values())
            return [n for n in others if isinstance(n, fx.Node)]
        return [n for n in node.all_input_nodes if not gives_number(n)]

    def _told(self, node: fx.Node) -> bool | None:
        """The same as far as a node itself tells; None where what it reads does."""
        if node.op == "placeholder":
            return GUARDED in node.meta
        return True if self._has_weights(node) else None

    def _has_weights(self, node: fx.Node) -> bool:
        """Whether a node calls a layer, other than a batch norm, which may be wider than values."""
        called = self._calls.callee(node)
        if called is None or not isinstance(called, nn.Module):
            return called is not None
        is_layer = is_a(called, LAYER_KINDS) and not is_a(called, BATCH_NORMS)
        return is_layer and any(True for _ in called.parameters())

    def is_free(self, x: fx.Node) -> bool:
        """Whether an input may have other types at a call, where more is done to it than a cast."""
        free, pending = False, [(node, x) for node in x.users]
        for node, value in pending:
            if self._has_weights(node):
                return False
            called = self._calls.callee(node)
            keeps_type = isinstance(called, nn.Module) and is_a(called, LAYER_KINDS)
            if keeps_type or is_cast(node):
                pending += [(user, node) for user in node.users if not self(node)]
            elif node.op != "output" and not reads_sizes_alone(node, value):
                free = True
        return free


def is_cast(node: fx.Node) -> bool:
    """Whether a call gives a value in another type, or in the one that it has."""
    return node.target in (*CASTS, *CAST_OPERATORS)


def demand_kinds(conditions: fx.Graph, graph: fx.Graph, calls: Calls) -> None:
    """Let a graph demand of its inputs to be floating numbers, or none, as those of the example.

    It does so where something was decided by that.

    Args:
        conditions: the conditions, with the graph's inputs.
        graph: of the network.
        calls: what its nodes call.
    """
    types = OwnTypes(calls)
    if not any(KIND in node.meta and not types(node) for node in graph.nodes):
        return
    inputs = {x.name: x for x in graph.find_nodes(op="placeholder")}
    for given in conditions.find_nodes(op="placeholder"):
        x = inputs.get(given.name)
        kind = None if x is None or GUARDED in x.meta else type_of(x)
        if x is None or kind is None or not types.is_free(x):
            continue
        holds = conditions.call_method("is_floating_point", (given,))
        words = "floating point numbers"
        if not kind[0].is_floating_point:
            holds, words = conditions.call_function(operator.not_, (holds,)), "other numbers"
        demand_that(conditions, holds, given, f"the network was converted for {words}; {AGAIN}")
