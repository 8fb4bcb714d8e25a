"""How much memory the values of a graph take while it runs, and what a skip costs on a stream.

Values live from the node that makes them to their last reader (linear scan). Views take nothing of
their own; a pointwise operation or an addition writes over an operand that nothing reads later, as
every runtime's planner does. In a plain chain that comes to two buffers.

On hardware that streams rows of pixels from layer to layer nothing is kept but a few rows in each
layer. A skip is different: the values of one operand wait in a FIFO until the other operand's
layers have seen enough rows below to give their first output. A layer gives its output n once it
has read its input at n·s + r, with r = span − padding before; r₁ + s₁·r₂ for two in a row. So the
FIFO of a join holds the difference of the two branches' r, counted in pixels of the join. Pooling
over all of space gives nothing before the last pixel.
"""

from __future__ import annotations

import math
import operator

from torch import fx

from rmfx.algebra.activation import is_activation
from rmfx.ir.kinds import ADDS, SUBS, VIEWING
from rmfx.ir.notes import Shape, shape_of, type_of
from rmfx.modules.activations import OWN_ACTIVATIONS


def size_of(node: fx.Node) -> int:
    """Bytes of a node's value, 0 where its shape is unknown or it is no tensor."""
    shape: Shape | None = shape_of(node)
    if shape is None or type_of(node) is None:
        return 0
    numbers = math.prod(n for n in shape if n is not None)
    return numbers * int(type_of(node)[0].itemsize)


def live_bytes(gm: fx.GraphModule) -> dict[fx.Node, int]:
    """For every node of a traced graph the bytes of all values that live while it runs."""
    owners: dict[fx.Node, fx.Node] = {}  # whose memory a node's value stands in
    last: dict[fx.Node, fx.Node] = {}  # the last reader of that memory
    for node in gm.graph.nodes:
        owners[node] = owners[node.all_input_nodes[0]] if _is_view(gm, node) else node
        for read in node.all_input_nodes:
            last[owners[read]] = node
    alive: dict[fx.Node, int] = {}
    found: dict[fx.Node, int] = {}
    for node in gm.graph.nodes:
        dying = [n for n in alive if last.get(n) is node]
        reused = max((n for n in dying if _may_overwrite(gm, node, n)), key=size_of, default=None)
        if owners[node] is node and node.op not in ("get_attr", "output"):
            alive[node] = size_of(node)
        found[node] = sum(alive.values()) - (alive[reused] if reused else 0)
        for dead in dying:
            del alive[dead]
        if node in alive and node not in last:
            del alive[node]
    return found


def _is_view(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(gm.get_submodule(str(node.target)), VIEWING)
    return node.target is operator.getitem or node.target in ("view", "detach")


def _may_overwrite(gm: fx.GraphModule, node: fx.Node, operand: fx.Node) -> bool:
    """Whether a node's value can stand where an operand stood that nothing reads later."""
    if operand not in node.all_input_nodes or size_of(node) != size_of(operand):
        return False
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return is_activation(module) or isinstance(module, OWN_ACTIVATIONS)
    return node.target in (*ADDS, *SUBS)
