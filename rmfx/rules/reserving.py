"""A sum of parallel linear branches lets the first channels of its input pass.

    y = act(b_1(x) + … + b_n(x))    becomes    y[:r] = x[:r],   y[r:] as before

What RMNet (arXiv 2111.00687, section 3.4) does to RepVGG, whose deep networks are hard to train:
with a residual connection around a nonlinear block a network would not be one convolution a block
any more, with channels that pass it still is. Of the branches only the filters from r on are left.

Written as act(pad(x[:r]) + pad(b(x)[r:])) where act leaves all that comes out of the activation
before it as it is (ReLU behind ReLU), whatever the weights are; so `merge_branches` makes one layer
of it. Elsewhere the channels that pass stand outside the activation, and `remove_residuals` carries
them through.

Forms handled: sums of any number of branches from one value, nested as well, of convolutions,
batch norms, identities, average pools, paddings and scales in any order; an activation behind or
none. Refused, each with its reason: a block that changes channels or size, a branch that is not
linear, a value inside that is read elsewhere, layers that are shared, hooked or parametrized.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from rmfx.algebra.activation import Activation, is_activation
from rmfx.algebra.affine import CONVS, AffineConv
from rmfx.errors import Refusal
from rmfx.ir.elements import Border
from rmfx.ir.joins import read_join
from rmfx.ir.kinds import AVERAGE_POOLS, BATCH_NORMS, MAX_POOLS
from rmfx.ir.net import Net
from rmfx.ir.nodes import input_of
from rmfx.ir.notes import ORIGIN, forget, notes_of, set_shape, why_frozen
from rmfx.ir.reading import read, read_affine
from rmfx.ir.sizes import SizeLaw
from rmfx.pruning.slicing import cut_module

from .noop import does_nothing

Layers = dict[fx.Node, AffineConv | None]  # the linear nodes of a block; sums and no-ops are None


@dataclass(frozen=True, eq=False)
class Branches:
    """A sum of parallel linear branches.

    Attributes:
        fork: the value they start from.
        nodes: all their layers and sums, in the order of the graph.
        channels: of the fork and of the last.
        dims: spatial dimensions.
    """

    fork: fx.Node
    nodes: list[fx.Node]
    channels: int
    dims: int


# ---- which blocks -------------------------------------------------------------------------------


def find_blocks(net: Net) -> list[tuple[fx.Node, Branches | Refusal]]:
    """The sums of linear branches, parts of others aside, and the blocks that they end."""
    found: list[tuple[fx.Node, Branches | Refusal]] = []
    inside: set[fx.Node] = set()
    for join in reversed(net.graph.nodes):
        reader = next(iter(join.users)) if len(join.users) == 1 else None
        is_part = join in inside or (reader is not None and _terms(net, reader))
        block = _block(net, join) if _terms(net, join) and not is_part else None
        if block is not None:
            found.append((join, block))
        if isinstance(block, Branches):
            inside.update(block.nodes)
    return found[::-1]


def _terms(net: Net, node: fx.Node) -> list[fx.Node]:
    """What a node adds or subtracts, nothing if it does neither."""
    terms = None if why_frozen(node) else read_join(node)
    return [] if terms is None or isinstance(terms, Refusal) else [value for value, _ in terms]


def _block(net: Net, join: fx.Node) -> Branches | Refusal | None:
    """The block that a sum ends, None if it is no sum of linear branches from one value."""
    found = _back_to_fork(net, join)
    if found is None:
        return None
    fork, layers = found
    dims = next((one.dims for node, one in layers.items() if one and _is_conv(net, node)), None)
    if dims is None:
        return None
    for node in layers:
        if node is not join and not layers.keys() >= node.users.keys():
            return Refusal(f"{node.name} is read elsewhere")
    channels, made = net.channels(fork, dims), net.channels(join, dims)
    if channels is None or channels != made:
        return Refusal(f"{channels} channels become {made}")
    if not _keeps_size(net, fork, layers, dims):
        return Refusal("the size changes")
    return Branches(fork, list(layers), channels, dims)


def _back_to_fork(net: Net, join: fx.Node) -> tuple[fx.Node, Layers] | None:
    """The fork, and all linear nodes from there to the join, in the order of the graph.

    The fork is the last value through which everything goes that reaches the join.
    """
    layers: Layers = {}
    reached = {join}
    while not layers or len(reached) > 1:
        node = max(reached)
        keeps = _terms(net, node) or does_nothing(net, node)
        layer = None if keeps else _layer(net, node)
        if isinstance(layer, Refusal):
            return None
        layers[node] = layer
        reached = (reached - {node}) | set(_inputs(net, node))
    return reached.pop(), dict(reversed(layers.items()))


def _inputs(net: Net, node: fx.Node) -> list[fx.Node]:
    """What a sum, a linear layer or an activation reads, constants aside."""
    source = input_of(node)
    return _terms(net, node) or ([] if source is None else [source])


def _is_conv(net: Net, node: fx.Node) -> bool:
    return type(net.module(node)) in CONVS[1:]


def _layer(net: Net, node: fx.Node) -> AffineConv | Refusal:
    """A node as a linear layer; what fills borders counts as one."""
    layer = read(net, node)
    return layer.geometry(1) if isinstance(layer, Border) else read_affine(net, node)


def _keeps_size(net: Net, fork: fx.Node, layers: Layers, dims: int) -> bool:
    """Whether all branches lead to the size of the fork."""
    start = SizeLaw(fork, (1,) * dims, (0,) * dims)
    laws = {fork: {start}}
    for node, layer in layers.items():
        found = {law for value in _inputs(net, node) for law in laws[value]}
        laws[node] = {law.through(layer.stride, layer.growth) for law in found} if layer else found
    return found == {start}


def _to_activation(net: Net, join: fx.Node) -> list[fx.Node]:
    """The activation that alone reads a sum, and no-ops before it; nothing if there is none."""
    nodes = [join]
    while len(nodes[-1].users) == 1:
        nodes += nodes[-1].users
        if isinstance(read(net, nodes[-1]), Activation):
            return nodes[1:]
        if not does_nothing(net, nodes[-1]):
            break
    return []


def _fixes_all_of(net: Net, act: fx.Node, fork: fx.Node) -> bool:
    """Whether an activation changes nothing of what another one can give, with any weights."""
    while type(net.module(fork)) in MAX_POOLS:
        (fork,) = fork.all_input_nodes
    here, before = read(net, act), read(net, fork)
    if not isinstance(here, Activation) or not isinstance(before, Activation):
        return False
    return here.fixes_all_of(*before.image)


# ---- letting channels pass ----------------------------------------------------------------------


def let_pass(net: Net, blocks: Iterable[tuple[Branches, int]]) -> None:
    """Let the first channels of blocks' inputs pass, so many of each; blocks in their order."""
    renewed: dict[fx.Node, fx.Node] = {}  # what blocks gave, and what they give now
    for block, reserved in blocks:
        fork = renewed.get(block.fork, block.fork)
        value, whole = _reserve(net, replace(block, fork=fork), reserved)
        renewed[value] = whole
        net.rewrites["let_pass"] += 1


def _reserve(net: Net, block: Branches, reserved: int) -> tuple[fx.Node, fx.Node]:
    """Let the first channels of a block's input pass; gives what was read and what is instead."""
    behind = _to_activation(net, block.nodes[-1])
    if behind and not _fixes_all_of(net, behind[-1], block.fork):
        block = replace(block, nodes=[*block.nodes, *behind])
    value = block.nodes[-1]
    readers = list(value.users)
    _narrow(net, block, reserved)
    space = [0] * (2 * block.dims)
    call = net.graph.call_function
    with net.graph.inserting_before(value.next):
        passing = _part(net, block.fork, slice(None, reserved))
        first = call(F.pad, (passing, [*space, 0, block.channels - reserved]))
        others = call(F.pad, (value, [*space, reserved, 0]))
        whole = call(torch.add, (first, others))
    for node in (passing, first, others, whole):
        node.meta = notes_of(value, *ORIGIN)
    for reader in readers:
        reader.replace_input_with(value, whole)
    return value, whole


def _narrow(net: Net, block: Branches, start: int) -> None:
    """Leave of the last value the channels from `start` on, and what is needed for them."""
    asked: dict[fx.Node, list[tuple[int, fx.Node]]] = defaultdict(list)  # from where on, by whom
    starts = {block.fork: 0}
    for node in reversed(block.nodes):
        first = min((at for at, _ in asked[node]), default=start)
        starts[node], needed = _cut(net, node, first, block.channels)
        for source in _inputs(net, node):
            asked[source].append((needed, node))
    for source, wishes in asked.items():
        for at, reader in wishes:
            if at > starts[source]:
                with net.graph.inserting_before(reader):
                    part = _part(net, source, slice(at - starts[source], None))
                reader.replace_input_with(source, part)


def _cut(net: Net, node: fx.Node, start: int, channels: int) -> tuple[int, int]:
    """Leave the channels of a node's value from `start` on, or from earlier on.

    Returns:
        From where on they are left, and from where on those of its input are needed.
    """
    module: Any = net.module(node)
    needed = start
    if _is_conv(net, node):
        channels = module.out_channels
        outs = channels // module.groups
        start -= start % outs if module.groups > 1 else 0
        needed = start // outs * (module.in_channels // module.groups)
    elif type(module) in BATCH_NORMS:
        channels = module.num_features
    elif not (_terms(net, node) or does_nothing(net, node) or _is_channelwise(module)):
        return 0, 0  # a constant or a padding: all of it is computed
    forget(node)
    set_shape(node, None)
    if start and module is not None:
        net.set(node, cut_module(module, torch.arange(channels) >= start))
    return start, needed


def _is_channelwise(module: nn.Module | None) -> bool:
    return module is not None and (is_activation(module) or type(module) in AVERAGE_POOLS)


def _part(net: Net, value: fx.Node, channels: slice) -> fx.Node:
    """Some channels of a value, at the graph's insert point."""
    part = net.graph.call_function(operator.getitem, (value, (slice(None), channels)))
    part.meta = notes_of(value, *ORIGIN)
    return part
