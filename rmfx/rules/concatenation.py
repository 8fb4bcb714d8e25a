"""A concatenation of linear branches is one layer: [f(x); g(x)] = stack(f, g)(x).

The kernels are put on a common window, one below the other. Each branch goes back from the
concatenation for as long as all is linear and read nowhere else; x is the last value that all have
in common, and may be a part of the concatenation itself (a branch without layers is the identity).

Forms handled: `torch.cat` along the channels of any number of branches of convolutions of any
kernel, grouped or depthwise, Linear, batch norm, constant scales, average pools, and sequences.

Refused, each with its reason: branches without a common source; a concatenation along another
dimension; branches of different stride or size; a border between the layers of a branch; one layer
that would cost more multiply-adds than the branches, as a dense one for many groups would.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from rmfx.algebra.affine import AffineConv
from rmfx.algebra.laws import stack
from rmfx.algebra.products import chain as compose_chain
from rmfx.errors import Refusal
from rmfx.ir.elements import Virtual
from rmfx.ir.net import Net
from rmfx.ir.nodes import input_of, is_same_there, is_tensor_node
from rmfx.ir.notes import OF_VALUE, notes_of, why_frozen
from rmfx.ir.reading import demands_of, read_affine
from rmfx.ir.weights import weight_types

from .linear import affine_at


@dataclass(frozen=True, eq=False)
class Stack:
    """A concatenation of linear branches.

    Attributes:
        fork: the value they start from.
        nodes: all their layers, in the order of the graph.
        layer: what they amount to.
    """

    fork: fx.Node
    nodes: list[fx.Node]
    layer: Virtual


class ConcatenationRule:
    """Merge linear branches that end in one concatenation along channels."""

    def __init__(self) -> None:
        self.made: set[fx.Node] = set()

    def match(self, net: Net, node: fx.Node) -> Stack | Refusal | None:
        if node.target is not torch.cat or why_frozen(node) or len(node.args) != 2:
            return None
        if not isinstance(node.args[0], (list, tuple)):  # parts of a split, say
            return None
        operands = list(node.args[0])
        if not all(is_tensor_node(x) for x in operands):
            return None
        paths = [_linear_path(net, x, node) for x in operands]
        shared = set(paths[0]).intersection(*paths[1:])
        if not shared:
            return Refusal("the parts have no common source, or not all are linear from there on")
        fork = max(shared)
        branches = [path[: path.index(fork)][::-1] for path in paths]
        nodes = sorted({n for branch in branches for n in branch})
        if not all(is_same_there(fork, branch[0] if branch else node, node) for branch in branches):
            return Refusal(why_frozen(fork), (fork.name,))
        kinds, dims = weight_types(net, nodes), {affine_at(net, n).dims for n in nodes}
        if len(kinds) != 1 or len(dims) != 1:
            return None
        layer = _stacked(net, node, fork, branches, dims.pop())
        if isinstance(layer, Refusal):
            return layer
        before = sum(affine_at(net, n).weight.numel() for n in nodes)
        if layer.weight.numel() > before:
            return Refusal("one layer would cost more multiply-adds", by_choice=True)
        return Stack(fork, nodes, Virtual(layer, *kinds.pop()))

    def rewrite(self, net: Net, node: fx.Node, match: Stack) -> None:
        first = next((n for n in match.nodes if n.op == "call_module"), node)
        target, name = str(first.target) if first is not node else node.name, first.name
        net.demand(demands_of(net, match.nodes))
        net.fix_channels(match.fork, match.layer.layer.dims)
        net.release(match.nodes)
        with net.graph.inserting_before(node):
            made = net.put(match.layer, match.fork, target, node)
        made.meta |= notes_of(node, *OF_VALUE)
        node.replace_all_uses_with(made)
        for old in (node, *reversed(match.nodes)):
            net.graph.erase_node(old)
        made.name = name
        self.made.add(made)


def _linear_path(net: Net, node: fx.Node, reader: fx.Node) -> list[fx.Node]:
    """The node and what lies behind it for as long as all is linear and read nowhere else."""
    path = [node]
    while True:
        here = path[-1]
        before = input_of(here)
        alone = set(here.users) == {reader}
        if before is None or not alone or isinstance(read_affine(net, here), Refusal):
            return path
        reader = here
        path.append(before)


def _stacked(
    net: Net, node: fx.Node, fork: fx.Node, branches: list[list[fx.Node]], dims: int
) -> AffineConv | Refusal:
    """The branches as one layer, if they are concatenated along the channels."""
    rank, channels = net.rank(node.all_input_nodes[0]), net.channels(fork, dims)
    if rank is None or channels is None:
        return net.without_channels(fork)
    if node.args[1] not in ((1, 1 - rank) if dims else (rank - 1, -1)):
        return Refusal("a concatenation along another dimension than the channels")
    layers = []
    for branch in branches:
        identity = AffineConv.identity(channels, dims)
        layer = compose_chain([affine_at(net, n) for n in branch] or [identity])
        if isinstance(layer, Refusal):
            return layer.at(*(n.name for n in branch))
        layers.append(layer)
    return stack(*layers)
