"""Finding residual sites: a join, its fork, and the two chains of layers between them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from rmfx.algebra.activation import Activation, Blockwise
from rmfx.algebra.affine import AffineConv
from rmfx.algebra.laws import compose
from rmfx.errors import Refusal
from rmfx.ir.elements import CHANNEL_BY_CHANNEL, Border, Deferred, MaxPool
from rmfx.ir.joins import read_join
from rmfx.ir.kinds import BATCH_NORMS
from rmfx.ir.laterals import Lateral, added_channels
from rmfx.ir.net import Net
from rmfx.ir.nodes import is_tensor_node
from rmfx.ir.reading import sizes_of
from rmfx.ir.sizes import agreements, may_spread
from rmfx.ir.weights import weight_types

from .paths import Path, walks


@dataclass(frozen=True, eq=False)
class Norm:
    """A batch norm that is to stay one: its module and the linear layer it amounts to."""

    module: nn.Module
    affine: AffineConv


Layer = AffineConv | Activation | Blockwise | Norm | Lateral | Border | MaxPool


@dataclass(frozen=True, eq=False)
class Step:
    """One layer of a branch.

    Attributes:
        layer: what it does.
        nodes: the graph nodes it stands for, in order; none for a layer that was made up.
        value: the node that holds its output, None if no node does.
        channels: of its output.
        tapped: whether that value is read off the branch, too.
    """

    layer: Layer
    nodes: tuple[fx.Node, ...]
    value: fx.Node | None
    channels: int
    tapped: bool = False

    @property
    def affine(self) -> AffineConv:
        """Of a linear layer."""
        layer = self.layer.affine if isinstance(self.layer, Norm) else self.layer
        if not isinstance(layer, AffineConv):
            raise TypeError("only linear layers have a linear form")
        return layer


Chain = tuple[Step, ...]
LIMITS = (torch.maximum, torch.minimum)
KEEP_CHANNELS = (Activation, Blockwise, *CHANNEL_BY_CHANNEL)


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
        sized: whether the result can demand input sizes at which both branches end in equal ones.
        fixed: whether the result holds for inputs of the example's sizes only.
    """

    join: fx.Node
    fork: fx.Node
    branches: tuple[Chain, Chain]
    channels: int
    dims: int
    dtype: torch.dtype
    device: torch.device
    sized: bool = True
    fixed: bool = False

    @property
    def nodes(self) -> list[fx.Node]:
        """The nodes of both branches and the join."""
        return [n for chain in self.branches for step in chain for n in step.nodes] + [self.join]


def find_sites(net: Net, join: fx.Node, *, keep_norms: bool) -> list[Site] | Refusal | None:
    """The sites of a join, one for each way back to a fork; None if the node joins nothing.

    Args:
        keep_norms: whether batch norms are to stay layers of their own.
    """
    terms = read_join(join)
    if terms is None or isinstance(terms, Refusal):
        return terms
    if join.meta.get("frozen"):
        return Refusal(join.meta["frozen"], (join.name,))
    (a, factor_a), (b, factor_b) = terms
    found = [
        way if isinstance(way, Refusal) else _site(net, join, way, (factor_a, factor_b), keep_norms)
        for way in walks(net, join, a, b)
    ]
    sites = [one for one in found if isinstance(one, Site)]
    return sites or next(one for one in found if isinstance(one, Refusal))


def _site(
    net: Net,
    join: fx.Node,
    way: tuple[fx.Node, tuple[Path, Path]],
    factors: tuple[float, float],
    keep_norms: bool,
) -> Site | Refusal:
    fork, paths = way
    if fork.meta.get("frozen"):
        return Refusal(fork.meta["frozen"], (fork.name,))
    frame = _frame(net, fork, paths)
    if isinstance(frame, Refusal):
        return frame
    channels, dims, dtype, device = frame
    chains = []
    for path, factor in zip(paths, factors, strict=True):
        chain = _resolve(path, channels, dims, keep_norms, net)
        if isinstance(chain, Refusal):
            return chain
        chain = _simplify(chain)
        out = chain[-1].channels if chain else channels
        chains.append(chain if factor == 1 else _scaled(chain, factor, out, dims))
    spread = _spread_among_neighbours(net, chains)
    if isinstance(spread, Refusal):
        return spread
    outs = [chain[-1].channels if chain else channels for chain in chains]
    if outs[0] != outs[1]:
        return Refusal(
            f"the operands have {outs[0]} and {outs[1]} channels: the add broadcasts", (join.name,)
        )
    sized = not isinstance(agreements(sizes_of(net), join), Refusal)
    return Site(join, fork, (chains[0], chains[1]), channels, dims, dtype, device, sized, spread)


def _spread_among_neighbours(net: Net, chains: list[tuple[Step, ...]]) -> bool | Refusal:
    """Whether a value may pass a combination that spreads it out over space.

    The other path's value would be spread out beside it, and a layer that reads several positions
    would read others behind the combination than before it. That is refused where it happens at
    the example's sizes, and where none are known. Where it may happen at others, which is the
    answer, the result has to be for those of the example only.
    """
    layers = [step.layer for chain in chains for step in chain]
    if all(map(_reads_one_position, layers)):
        return False
    laterals = [x for x in layers if isinstance(x, Lateral) and not x.is_concatenation]
    for lateral in laterals:
        if lateral.spread_dims - {1}:
            cause = "it spreads out a value of fewer positions, beside layers that read several"
            return Refusal(cause, (lateral.node.name,))
    sizes = sizes_of(net)
    open_ones = [x for x in laterals if may_spread(sizes, x.node, x.value)]
    inputs = filter(is_tensor_node, net.graph.find_nodes(op="placeholder"))
    if open_ones and any("shape" not in x.meta for x in inputs):
        cause = (
            "it may spread out a value of fewer positions, beside layers that read several, at "
            "sizes that are not known; pass example_inputs"
        )
        return Refusal(cause, (open_ones[0].node.name,))
    return bool(open_ones)


def _reads_one_position(layer: object) -> bool:
    if isinstance(layer, AffineConv):
        return math.prod((*layer.weight.shape[2:], *layer.stride)) == 1
    return isinstance(layer, (Activation, Blockwise, Norm, Lateral))


def _frame(
    net: Net, fork: fx.Node, paths: tuple[Path, Path]
) -> tuple[int, int, torch.dtype, torch.device] | Refusal:
    """Channels, spatial dimensions, type and device of a site."""
    elements = [place.element for path in paths for place in path]
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
    kinds = weight_types(net, [place.node for path in paths for place in path])
    channels = net.channels(fork, dims)
    for path in paths:
        own = (place.element for place in path)
        first = next((e for e in own if not isinstance(e, KEEP_CHANNELS)), None)
        if channels is None and isinstance(first, AffineConv):
            channels = first.in_channels
    if channels is None:
        return net.without_channels(fork)
    if len(kinds) > 1:
        return Refusal(f"the weights are of mixed types: {', '.join(sorted(map(str, kinds)))}")
    given = net.dtype(fork)
    if given is not None and kinds and given not in kinds:
        return Refusal(f"the values are {given[0]}, the weights {min(kinds, key=str)[0]}")
    kind = kinds.pop() if kinds else given
    if kind is None:
        return Refusal("the type of the values is unknown; pass example_inputs", (fork.name,))
    if not kind[0].is_floating_point:
        return Refusal(f"{kind[0]} values; only real floating point can be rewritten", (fork.name,))
    return channels, dims, *kind


def _resolve(path: Path, channels: int, dims: int, keep_norms: bool, net: Net) -> Chain | Refusal:
    """The steps of a branch, with everything known."""
    steps = []
    for place in path:
        node, element = place.node, place.element
        layer = element.build(channels, dims) if isinstance(element, Deferred) else element
        if isinstance(layer, Refusal):
            return layer.at(node.name)
        refusal = _unfit(net, node, layer, channels, dims)
        if refusal:
            return refusal.at(node.name)
        channels = _channels_behind(net, layer, channels, dims)
        module = net.module(node)
        is_norm = keep_norms and type(module) in BATCH_NORMS
        whole: Layer = layer
        if is_norm and module is not None and isinstance(layer, AffineConv):
            whole = Norm(module, layer)
        steps.append(Step(whole, (node,), node, channels, place.tapped))
    return tuple(steps)


def _unfit(net: Net, node: fx.Node, layer: Layer, channels: int, dims: int) -> Refusal | None:
    """Why a layer cannot stand where it stands, if it cannot."""
    if isinstance(layer, AffineConv):
        if layer.dims != dims:
            return Refusal(f"a layer of {layer.dims} spatial dimensions among layers of {dims}")
        if layer.in_channels != channels:
            return Refusal(f"a layer for {layer.in_channels} channels on {channels}")
    if isinstance(layer, Blockwise) and (layer.width, layer.dims) != (channels, dims):
        places = f"{layer.width} channels and {layer.dims} spatial dimensions"
        return Refusal(f"activations for {places} on {channels} and {dims}")
    if isinstance(layer, Activation) and layer.is_per_channel:
        if not dims and net.rank(node) != 2:
            return Refusal(
                "PReLU with a slope per channel acts on dimension 1, not on the features"
            )
        if layer.module.num_parameters != channels:
            return Refusal(f"a PReLU for other than {channels} channels")
    if isinstance(layer, Border) and layer.dims > dims:
        return Refusal("padding reaches beyond space")
    if isinstance(layer, MaxPool) and layer.dims != dims:
        return Refusal(f"pooling over {layer.dims} dimensions among layers of {dims}")
    return _unfit_lateral(net, layer, channels, dims) if isinstance(layer, Lateral) else None


def _unfit_lateral(net: Net, layer: Lateral, channels: int, dims: int) -> Refusal | None:
    """Why the channels of the other tensors are not known to meet those of the carry."""
    for other in layer.others:
        rank, own = net.rank(other), net.channels(other, dims)
        if rank is not None and own is None and "shape" in other.meta:
            return net.without_channels(other)
        if rank is None or own is None:
            return Refusal(
                "it reads a second tensor whose shape is unknown; pass example_inputs",
                (other.name,),
            )
        if dims and rank != dims + 2:
            return Refusal(f"a {rank}-D tensor among layers of {dims} dimensions", (other.name,))
        if not layer.is_concatenation and own not in (1, channels):
            return Refusal(
                f"a tensor of {channels} channel meets one of {own}: it broadcasts", (other.name,)
            )
        kind = net.dtype(other)
        if layer.node.target in LIMITS and (kind is None or not kind[0].is_floating_point):
            return Refusal("a limit that is not known to be floating point", (other.name,))
    if layer.is_concatenation:
        axis = layer.node.args[1]
        rank = dims + 2 if dims else net.rank(layer.value)
        along = axis - rank if isinstance(axis, int) and rank and axis >= 0 else axis
        if along != (-dims - 1 if dims else -1):
            return Refusal("a concatenation along another dimension than the channels")
    return None


def _channels_behind(net: Net, layer: Layer, channels: int, dims: int) -> int:
    """Channels behind a layer that fits."""
    if isinstance(layer, AffineConv):
        return layer.out_channels
    return channels + added_channels(net, layer, dims) if isinstance(layer, Lateral) else channels


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
    if first.tapped:
        return None
    # A scale, a crop or a stride is absorbed without a new weight; other merges cost work.
    if not any(f.is_depthwise and f.is_pointwise for f in (first.layer, second.layer)):
        return None
    layer = compose(second.layer, first.layer)
    if isinstance(layer, Refusal):
        return None
    return replace(second, layer=layer, nodes=first.nodes + second.nodes)


def _scaled(chain: Chain, factor: float, channels: int, dims: int) -> Chain:
    """The chain times a constant, merged into its last layer if that is linear."""
    scale = AffineConv.scale(torch.full((channels,), factor, dtype=torch.float64), dims=dims)
    last = chain[-1] if chain else None
    if last is not None and isinstance(last.layer, AffineConv) and not last.tapped:
        merged = compose(scale, last.layer)
        if isinstance(merged, AffineConv):
            return (*chain[:-1], replace(last, layer=merged, value=None))
    return (*chain, Step(scale, (), None, channels))
