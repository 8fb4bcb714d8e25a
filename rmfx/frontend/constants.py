"""Values that follow from the model's own tensors alone are computed once.

A weight-standardised convolution normalises its weight at every call, a layer scale is reshaped
before it is used. What does not depend on the network's input becomes a constant, so that the layer
behind it is an ordinary one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.node import _side_effectful_functions

from rmfx.algebra.activation import is_activation
from rmfx.errors import WeightValueError
from rmfx.ir.nodes import attribute, run_node
from rmfx.ir.notes import OF_VALUE, gives_number, notes_of, why_frozen

from .effects import effects_of
from .masks import INDEXING
from .watches import Watch

# A constant that is spread out needs memory that the model did not.
LARGEST_GROWTH = 4
SMALL = 1 << 16


def fold_constants(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """Replace every value that depends on parameters and buffers only by a buffer.

    Returns:
        The nodes that gave the values, by the names of the buffers.
    """
    known = _known(gm)
    made = 0
    made_by: dict[str, fx.Node] = {}
    for node in [node for node in known if _is_to_be_kept(node, known)]:
        name, made = _free_name(gm, made)
        gm.register_buffer(name, known[node])
        made_by[name] = node
        with gm.graph.inserting_before(node):
            constant = gm.graph.get_attr(name)
        constant.meta = notes_of(node, *OF_VALUE)
        node.replace_all_uses_with(constant)
    for node, value in known.items():
        if isinstance(value, (int, float)):
            _write_down(node, value)
    for node in reversed(list(known)):
        if not node.users:
            gm.graph.erase_node(node)
    return made_by


def values_that_decide(gm: fx.GraphModule) -> dict[fx.Node, Any]:
    """The model's constants, where sizes or numbers follow from their values.

    Nobody knows these of fake tensors, on which shapes are found. Where the graph writes to one of
    the constants nothing is known.
    """
    if not any(_asks_for_values(node) for node in gm.graph.nodes):
        return {}
    with unset_fake_temporarily():
        known = _known(gm)
    if any(one in known for node in gm.graph.nodes for one in effects_of(gm, node).writes):
        return {}
    return known


def _asks_for_values(node: fx.Node) -> bool:
    """Whether a node may give a number, or as many values as others say."""
    if node.target is operator.getitem or node.target in INDEXING:
        index = [n for n in node.all_input_nodes[1:] if not gives_number(n)]
        return bool(index)
    name = str(getattr(node.target, "__name__", node.target))
    return any(part in name for part in ("item", "nonzero", "argwhere", "masked_select", "unique"))


def constants_without_values(gm: fx.GraphModule) -> dict[fx.Node, Tensor]:
    """What depends on parameters and buffers only, as tensors that have shape and memory alone."""
    mode = FakeTensorMode(static_shapes=True)
    with mode:
        known = _known(gm, mode.from_tensor)
    return {node: value for node, value in known.items() if isinstance(value, Tensor)}


def _known(
    gm: fx.GraphModule, stands_for: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> dict[fx.Node, Any]:
    """The values that depend on parameters and buffers only, and these.

    Args:
        gm: the graph.
        stands_for: what to compute with in the place of a tensor of the model.
    """
    known: dict[fx.Node, Any] = {}
    for node in gm.graph.nodes:
        if why_frozen(node):
            continue
        if node.op == "get_attr":
            value = attribute(gm, node)
            if isinstance(value, Tensor):
                known[node] = stands_for(value)
        elif _is_constant(gm, node, known):
            try:
                with torch.no_grad(), Watch(known[n] for n in node.all_input_nodes):
                    known[node] = run_node(node, known, gm.get_submodule)
            # An operation that fails now fails when the model runs, and not before; one that draws
            # at random draws when the model runs.
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
                continue
            except WeightValueError:  # what a number decides stays in the graph
                continue
    return known


def _write_down(node: fx.Node, value: float) -> None:
    """Let the readers of a number have it as an argument."""
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = fx.map_arg(user.kwargs, lambda n: value if n is node else n)


def _is_constant(gm: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Any]) -> bool:
    inputs = node.all_input_nodes
    if not inputs or any(n not in known for n in inputs) or node.op == "output":
        return False
    effects = effects_of(gm, node)
    if effects.draws or effects.writes or effects.owned:
        return False  # another constant may have been read before the write
    if node.op == "call_module":
        return is_activation(gm.get_submodule(str(node.target)))
    return node.target not in _side_effectful_functions


def _is_to_be_kept(node: fx.Node, known: dict[fx.Node, Any]) -> bool:
    """Whether something that is no constant reads a constant, and it is not too large to keep."""
    value = known[node]
    read = any(user not in known for user in node.users)
    if node.op == "get_attr" or not read or not isinstance(value, Tensor):
        return False
    sources = [known[n] for n in node.all_input_nodes]
    size = max((s.numel() for s in sources if isinstance(s, Tensor)), default=0)
    return value.numel() <= max(LARGEST_GROWTH * size, SMALL)


def _free_name(gm: fx.GraphModule, start: int) -> tuple[str, int]:
    while hasattr(gm, f"_constant_{start}"):
        start += 1
    return f"_constant_{start}", start + 1
