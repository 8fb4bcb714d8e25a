"""Whether a rewrite holds for inputs with other numbers of dimensions, too.

Convolutions and pools take one image as well as a batch, linear layers any number of dimensions,
and what acts on each value alone does not ask. Of a network made of these nothing is demanded. A
PReLU with a slope per channel, a slice or a concatenation finds channels by counting dimensions.

A convolution is taken to read a batch. Where that matters it is demanded: of the network's inputs,
and of what a convolution reads if nothing tells how its dimensions follow from those of the inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmfx.algebra.activation import is_activation
from rmfx.modules.activations import OWN_ACTIVATIONS

from .callees import Calls
from .conditions import demand_rank, fits
from .functions import KEEPING_RANK, torch_name
from .kinds import ANY_RANK, ARITHMETIC, COMPARISONS, KEEPING_BATCH, SPREADING, is_a
from .layer_facts import Callee, dims_of
from .nodes import MEANS, data_read
from .notes import gives_container, gives_number, shape_of

BY_RANK = "rmfx_by_rank"  # in a graph's metadata: it was read by the numbers of dimensions
RANKS = ("dim", "ndimension", "ndim")
VALUE_BY_VALUE = frozenset(ARITHMETIC.values())
_FLATTENS = (torch.flatten, "flatten", torch.ops.aten.flatten.using_ints)
_KEEPING = (*SPREADING, *COMPARISONS, *VALUE_BY_VALUE)
_LAYERS = (
    *KEEPING_BATCH,
    *(nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle, nn.Upsample, nn.Softmax2d),
)


def demand_ranks(conditions: fx.Graph, ranks: Mapping[str, int | None]) -> None:
    """Let a graph demand numbers of dimensions, by input, where it demands no sizes yet."""
    for x in conditions.find_nodes(op="placeholder"):
        rank = ranks.get(x.name)
        if rank is not None and not any(user.target is fits for user in x.users):
            demand_rank(conditions, x, rank)


def assumed_ranks(
    graph: fx.Graph, rank_of: Callable[[fx.Node], int | None], layer_of: Callable[[fx.Node], Callee]
) -> dict[fx.Node, int]:
    """The values that layers take for batches, though no demand on the inputs says that they are.

    Args:
        graph: of a network.
        rank_of: the number of dimensions that is demanded of an input.
        layer_of: what a node calls.

    Returns:
        The numbers of dimensions of these values.
    """
    known: dict[fx.Node, int | None] = {}
    assumed: dict[fx.Node, int] = {}
    for node in graph.nodes:
        layer = layer_of(node)
        dims, sources = dims_of(layer), data_read(node)
        if shape_of(node) is not None:
            known[node] = len(shape_of(node))
        elif node.op == "placeholder":
            known[node] = rank_of(node)
        elif dims is not None and sources:
            known[node] = dims + 2
            if known[sources[0]] != dims + 2:
                assumed[sources[0]] = known[sources[0]] = dims + 2
        else:
            known[node] = _rank_behind(node, layer, {known[source] for source in sources})
    return assumed


def _rank_behind(node: fx.Node, layer: Callee, ranks: set[int | None]) -> int | None:
    """The number of dimensions of what a node gives, of tensors of some numbers of dimensions."""
    if torch_name(node).partition(".")[0] in ("view", "reshape"):
        sizes: Any = node.args[1] if isinstance(node.args[1], (list, tuple)) else node.args[1:]
        return len(sizes) if all(isinstance(n, int) or gives_number(n) for n in sizes) else None
    return ranks.pop() if len(ranks) == 1 and _keeps_rank(node, layer) else None


def _keeps_rank(node: fx.Node, layer: Callee) -> bool:
    """Whether a node gives a value of as many dimensions as those that it reads."""
    if layer is not None:
        return not isinstance(layer, nn.Module) or is_activation(layer) or is_a(layer, _LAYERS)
    if node.target is operator.getitem:
        of: Any = node.args[0]
        index = node.args[1]
        parts = index if isinstance(index, tuple) else (index,)
        is_slice = all(isinstance(part, slice) or part is ... for part in parts)
        return is_slice or gives_container(of)
    if node.target in MEANS:
        return node.kwargs.get("keepdim") is True
    return node.target in _KEEPING or torch_name(node).partition(".")[0] in KEEPING_RANK


def demand_assumed(graph: fx.Graph, assumed: Mapping[fx.Node, int]) -> None:
    """Let a graph demand the numbers of dimensions that are assumed of some of its values."""
    for value, rank in assumed.items():
        if any(user.target is fits for user in value.users):
            continue
        with graph.inserting_before(value.next):
            demand_rank(graph, value, rank)


class Snapshot:
    """A graph as it was, to tell what has been read by the numbers of dimensions since."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._calls = {node: _call(node) for node in gm.graph.nodes}
        module = Calls(gm).module
        self._kinds = {node: type(module(node)) for node in gm.graph.nodes}
        self._numbers = {node: _numbers_read(node) for node in gm.graph.nodes}
        self._asked = [node for node in gm.graph.nodes if asks_for_rank(node)]

    def was_read_by_rank(self, gm: fx.GraphModule) -> bool:
        """Whether the graph as it is now means the same for some numbers of dimensions only."""
        if any(node._erased for node in self._asked):
            return True
        return any(self._has_changed(gm, node) for node in gm.graph.nodes)

    def _has_changed(self, gm: fx.GraphModule, node: fx.Node) -> bool:
        before, module = self._calls.get(node), Calls(gm).module(node)
        if node.target in VALUE_BY_VALUE:  # a number of channels was read by its place in a shape
            return _numbers_read(node) < self._numbers.get(node, 0)
        if _call(node) == before:
            return type(module) is not self._kinds[node]  # an instance norm takes single images
        if isinstance(module, nn.Flatten) and before is not None and before[1] in _FLATTENS:
            return False
        return not ignores_rank(node, module)


def _numbers_read(node: fx.Node) -> int:
    """How many numbers a node reads that are computed."""
    return sum(gives_number(n) for n in node.all_input_nodes)


def _call(node: fx.Node) -> tuple[object, ...]:
    """What a node calls, whatever it reads."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: None)
    return (node.op, node.target, args, kwargs)


def asks_for_rank(node: fx.Node) -> bool:
    """Whether a node reads a number of dimensions."""
    by_attribute = node.target is getattr and node.args[1:] == ("ndim",)
    return by_attribute or (node.op == "call_method" and node.target in RANKS)


def ignores_rank(
    node: fx.Node, module: nn.Module | None, constants: Mapping[fx.Node, Any] | None = None
) -> bool:
    """Whether a node does the same whatever the number of dimensions.

    Args:
        node: the node.
        module: that it calls, if it calls one.
        constants: values of the nodes that read the model's tensors, which may add dimensions.
    """
    if node.op in ("placeholder", "output", "get_attr"):
        return True
    if module is not None:
        parts = module.modules() if isinstance(module, OWN_ACTIVATIONS) else [module]
        return all(_is_free(part) for part in parts)
    given = [(constants or {}).get(n) for n in node.all_input_nodes]
    adds_none = not any(isinstance(value, Tensor) and value.dim() for value in given)
    return node.target in VALUE_BY_VALUE and adds_none


def _is_free(module: nn.Module) -> bool:
    if isinstance(module, nn.PReLU):
        return module.num_parameters == 1
    kinds = (*ANY_RANK, *OWN_ACTIVATIONS, nn.ModuleList)
    return is_activation(module) or isinstance(module, kinds)
