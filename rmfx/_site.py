"""Finding residual sites: a join, its fork, and the two chains of layers between them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from ._activation import Activation, Blockwise
from ._affine import AffineConv, compose
from ._dialect import BATCH_NORMS
from ._errors import Refusal
from ._graph import Net, Virtual
from ._layers import Deferred, Element, input_of, is_tensor_node, read, read_join


@dataclass(frozen=True, eq=False)
class Norm:
    """A batch norm that is to stay one: its module and the linear layer it amounts to."""

    module: nn.Module
    affine: AffineConv


@dataclass(frozen=True, eq=False)
class Step:
    """One layer of a branch.

    Attributes:
        layer: what it does.
        nodes: the graph nodes it stands for, in order; none for a layer that was made up.
        value: the node that holds its output, None if no node does.
    """

    layer: AffineConv | Activation | Blockwise | Norm
    nodes: tuple[fx.Node, ...]
    value: fx.Node | None


Chain = tuple[Step, ...]


@dataclass(frozen=True, eq=False)
class Site:
    """A residual site, read but not yet rewritten.

    Attributes:
        join: the add.
        fork: the value both chains start from.
        branches: the chains of the two operands, in the order of computation.
        channels: channels of the fork.
        dims: spatial dimensions of its layers.
        dtype, device: of its weights.
    """

    join: fx.Node
    fork: fx.Node
    branches: tuple[Chain, Chain]
    channels: int
    dims: int
    dtype: torch.dtype
    device: torch.device

    @property
    def nodes(self) -> list[fx.Node]:
        """The nodes of both branches and the join."""
        return [n for chain in self.branches for step in chain for n in step.nodes] + [self.join]


Read = list[tuple[fx.Node, Element]]


def find_site(net: Net, join: fx.Node, *, keep_norms: bool) -> Site | Refusal | None:
    """The site of a join, None if the node joins nothing.

    Args:
        keep_norms: whether batch norms are to stay layers of their own.
    """
    terms = read_join(net, join)
    if terms is None or isinstance(terms, Refusal):
        return terms
    if join.meta.get("frozen"):
        return Refusal(join.meta["frozen"], (join.name,))
    (a, factor_a), (b, factor_b) = terms
    found = _walk_to_fork(net, a, b)
    if isinstance(found, Refusal):
        return found
    fork, reads = found
    if fork.meta.get("frozen"):
        return Refusal(fork.meta["frozen"], (fork.name,))
    frame = _frame(net, fork, reads)
    if isinstance(frame, Refusal):
        return frame
    channels, dims, dtype, device = frame
    chains = []
    for one, factor in zip(reads, (factor_a, factor_b), strict=True):
        chain = _resolve(one, channels, dims, keep_norms, net)
        if isinstance(chain, Refusal):
            return chain
        chain = _simplify(chain)
        out = _out_channels(chain, channels)
        chains.append(chain if factor == 1 else _scaled(chain, factor, out, dims))
    outs = [_out_channels(chain, channels) for chain in chains]
    if outs[0] != outs[1]:
        return Refusal(
            f"the operands have {outs[0]} and {outs[1]} channels: the add broadcasts", (join.name,)
        )
    return Site(join, fork, (chains[0], chains[1]), channels, dims, dtype, device)


def _walk_to_fork(net: Net, a: fx.Node, b: fx.Node) -> tuple[fx.Node, tuple[Read, Read]] | Refusal:
    """Step back from both operands, the later one first, until they meet."""
    heads, paths = [a, b], ([], [])  # type: ignore[var-annotated]
    while heads[0] is not heads[1]:
        side = 0 if heads[1] < heads[0] else 1
        node = heads[side]
        if node.op == "placeholder":
            return Refusal("the operands have no common source", (heads[0].name, heads[1].name))
        element = read(net, node)
        if isinstance(element, Refusal):
            return element
        if len(node.users) > 1:
            names = ", ".join(sorted(u.name for u in node.users))
            return Refusal(f"its value is used outside the branch too, by {names}", (node.name,))
        before = input_of(node)
        if before is None:
            return Refusal("it reads several tensors", (node.name,))
        paths[side].append((node, element))
        heads[side] = before
    return heads[0], (paths[0][::-1], paths[1][::-1])


def _frame(
    net: Net, fork: fx.Node, reads: tuple[Read, Read]
) -> tuple[int, int, torch.dtype, torch.device] | Refusal:
    """Channels, spatial dimensions, type and device of a site."""
    elements = [e for one in reads for _, e in one]
    rank = net.rank(fork)
    dims = next((e.dims for e in elements if isinstance(e, AffineConv)), None)
    if dims is None:
        dims = None if rank is None or rank < 2 else rank - 2
    if dims is None:
        return Refusal("the number of dimensions is unknown; pass example_inputs", (fork.name,))
    if dims and rank is not None and rank != dims + 2:
        return Refusal(
            f"layers of {dims} spatial dimensions on a {rank}-D tensor; use batched inputs",
            (fork.name,),
        )
    kinds = weight_types(net, [n for one in reads for n, _ in one])
    channels = net.channels(fork, dims)
    for one in reads:
        first = next((e for _, e in one if not isinstance(e, (Activation, Blockwise))), None)
        if channels is None and isinstance(first, AffineConv):
            channels = first.in_channels
    if channels is None:
        return Refusal("the number of channels is unknown; pass example_inputs", (fork.name,))
    if len(kinds) > 1:
        return Refusal(f"the weights are of mixed types: {', '.join(sorted(map(str, kinds)))}")
    own = net.dtype(fork)
    if own is not None and kinds and own not in kinds:
        return Refusal(f"the values are {own[0]}, the weights {min(kinds, key=str)[0]}")
    kind = kinds.pop() if kinds else own
    if kind is None:
        return Refusal("the type of the values is unknown; pass example_inputs", (fork.name,))
    if not kind[0].is_floating_point:
        return Refusal(f"{kind[0]} values; only real floating point can be rewritten", (fork.name,))
    return channels, dims, *kind


def weight_types(net: Net, nodes: Iterable[fx.Node]) -> set[tuple[torch.dtype, torch.device]]:
    """Types and devices of all weights that some nodes use."""
    kinds = set()
    for node in nodes:
        made, module = net.replacement(node), net.module(node)
        if isinstance(made, Virtual):
            kinds.add((made.dtype, made.device))
        elif module is not None:
            tensors = (*module.parameters(), *module.buffers())
            kinds |= {(t.dtype, t.device) for t in tensors if t.is_floating_point()}
        for constant in node.all_input_nodes:
            if not is_tensor_node(net, constant) and constant.op == "get_attr":
                value = net.attribute(constant)
                if isinstance(value, torch.Tensor) and value.dim():
                    kinds.add((value.dtype, value.device))
    return kinds


def _resolve(one: Read, channels: int, dims: int, keep_norms: bool, net: Net) -> Chain | Refusal:
    """The steps of a branch, with everything known."""
    steps = []
    for node, element in one:
        layer: AffineConv | Activation | Blockwise | Refusal
        layer = element.build(channels, dims) if isinstance(element, Deferred) else element
        if isinstance(layer, Refusal):
            return layer.at(node.name)
        if isinstance(layer, AffineConv):
            if layer.dims != dims:
                return Refusal(
                    f"a layer of {layer.dims} spatial dimensions among layers of {dims}",
                    (node.name,),
                )
            if layer.in_channels != channels:
                return Refusal(
                    f"a layer for {layer.in_channels} channels on {channels}", (node.name,)
                )
            channels = layer.out_channels
        if isinstance(layer, Activation) and layer.is_per_channel:
            if not dims and net.rank(node) != 2:
                return Refusal(
                    "PReLU with a slope per channel acts on dimension 1, not on the features",
                    (node.name,),
                )
            if layer.module.num_parameters != channels:
                return Refusal(f"a PReLU for other than {channels} channels", (node.name,))
        module = net.module(node)
        is_norm = keep_norms and isinstance(module, BATCH_NORMS)
        if is_norm and module is not None and isinstance(layer, AffineConv):
            steps.append(Step(Norm(module, layer), (node,), node))
        else:
            steps.append(Step(layer, (node,), node))
    return tuple(steps)


def _simplify(chain: Chain) -> Chain:
    """Merge neighbouring linear layers where that is exact and not dearer."""
    result: list[Step] = []
    for step in chain:
        merged = _merge(result[-1], step) if result else None
        if merged is None:
            result.append(step)
        else:
            result[-1] = merged
    return tuple(result)


def _merge(first: Step, second: Step) -> Step | None:
    if not (isinstance(first.layer, AffineConv) and isinstance(second.layer, AffineConv)):
        return None
    # A scale, a crop or a stride is absorbed without a new weight; other merges cost work.
    if not any(f.is_depthwise and f.is_pointwise for f in (first.layer, second.layer)):
        return None
    layer = compose(second.layer, first.layer)
    if isinstance(layer, Refusal):
        return None
    return Step(layer, first.nodes + second.nodes, second.value)


def _scaled(chain: Chain, factor: float, channels: int, dims: int) -> Chain:
    """The chain times a constant, merged into its last layer if that is linear."""
    scale = AffineConv.scale(torch.full((channels,), factor, dtype=torch.float64), dims=dims)
    last = chain[-1] if chain else None
    if last is not None and isinstance(last.layer, AffineConv):
        merged = compose(scale, last.layer)
        if isinstance(merged, AffineConv):
            return (*chain[:-1], replace(last, layer=merged, value=None))
    return (*chain, Step(scale, (), None))


def _out_channels(chain: Chain, channels: int) -> int:
    """Channels behind a chain; activations keep them."""
    for step in reversed(chain):
        if isinstance(step.layer, AffineConv):
            return step.layer.out_channels
    return channels
