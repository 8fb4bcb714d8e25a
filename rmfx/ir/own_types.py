"""Whether a value has its type at every call, whatever types the inputs of the network have.

What an example shows of types holds for inputs of its types alone. A layer, though, takes values of
the type of its weights and gives such, so that behind one a cast to that type is none, ever.
"""

from __future__ import annotations

from torch import fx, nn

from .callees import Calls
from .kinds import BATCH_NORMS, LAYER_KINDS, is_a
from .memo import on_demand
from .notes import GUARDED, gives_number


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
        read = node.all_input_nodes if self._told(node) is None else ()
        return [n for n in read if not gives_number(n)]

    def _told(self, node: fx.Node) -> bool | None:
        """The same as far as a node itself tells; None where what it reads does."""
        if node.op == "placeholder":
            return GUARDED in node.meta
        called = self._calls.callee(node)
        if not isinstance(called, nn.Module):
            return None if called is None else True
        if not is_a(called, LAYER_KINDS) or is_a(called, BATCH_NORMS):
            return None  # a batch norm may be wider than its values
        return True if any(True for _ in called.parameters()) else None
