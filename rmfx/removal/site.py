"""Finding residual sites: a join, its fork, and the two chains of layers between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx, nn

from rmfx.algebra.affine import AffineConv
from rmfx.algebra.layer import Layer
from rmfx.algebra.products import compose
from rmfx.errors import Refusal
from rmfx.ir.functions import reads_sizes_alone
from rmfx.ir.joins import read_join
from rmfx.ir.kinds import BATCH_NORMS
from rmfx.ir.laterals import Lateral
from rmfx.ir.net import Net
from rmfx.ir.nodes import is_tensor_node
from rmfx.ir.notes import shape_of, why_frozen
from rmfx.ir.reading import is_spatial_pool, sizes_of
from rmfx.ir.size_conditions import agreements, may_spread
from rmfx.ir.weights import weight_types

from .paths import Path, walks


@dataclass(frozen=True, eq=False)
class Norm(Layer):
    """A batch norm that is to stay one: its module and the linear layer it amounts to."""

    module: nn.Module
    affine: AffineConv
    is_linear: ClassVar[bool] = True


@dataclass(frozen=True, eq=False)
class Step:
    """One layer of a branch.

    Attributes:
        layer: what it does.
        nodes: the graph nodes it stands for, in order; none for a layer that was made up.
        value: the node that holds its output, None if no node does.
        channels: of its output.
        tapped: whether that value is read off the branch, too.
        pooled: whether all that read it there pool over space, or ask for its sizes.
        path: of the module that a layer without nodes becomes, where one is known.
    """

    layer: Layer
    nodes: tuple[fx.Node, ...]
    value: fx.Node | None
    channels: int
    tapped: bool = False
    pooled: bool = False
    path: str = ""

    @property
    def affine(self) -> AffineConv:
        """Of a linear layer."""
        layer = self.layer.affine if isinstance(self.layer, Norm) else self.layer
        if not isinstance(layer, AffineConv):
            raise TypeError("only linear layers have a linear form")
        return layer


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
    def shortcut(self) -> int | None:
        """Which branch is the shortcut: the linear one where the other is not; None without one."""
        linear = [all(step.layer.is_linear for step in chain) for chain in self.branches]
        return linear.index(True) if linear[0] != linear[1] else None

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
    if why_frozen(join):
        return Refusal(why_frozen(join), (join.name,))
    (a, factor_a), (b, factor_b) = terms
    found = [
        way if isinstance(way, Refusal) else _site(net, join, way, (factor_a, factor_b), keep_norms)
        for way in walks(net, join, a, b)
    ]
    sites = [one for one in found if isinstance(one, Site)]
    return sites or next(one for one in found if isinstance(one, Refusal))


def innermost(sites: Sequence[Site]) -> Site:
    """The smallest of the sites of a join."""
    return min(sites, key=lambda site: len(site.nodes))


def _site(
    net: Net,
    join: fx.Node,
    way: tuple[fx.Node, tuple[Path, Path]],
    factors: tuple[float, float],
    keep_norms: bool,
) -> Site | Refusal:
    fork, paths = way
    if why_frozen(fork):
        return Refusal(why_frozen(fork), (fork.name,))
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
    if all(layer.reads_one_position for layer in layers):
        return False
    laterals = [x for x in layers if isinstance(x, Lateral) and not x.is_concatenation]
    for lateral in laterals:
        if lateral.spread_dims - {1}:
            cause = "it spreads out a value of fewer positions, beside layers that read several"
            return Refusal(cause, (lateral.node.name,))
    sizes = sizes_of(net)
    open_ones = [x for x in laterals if may_spread(sizes, x.node, x.value)]
    inputs = filter(is_tensor_node, net.graph.find_nodes(op="placeholder"))
    if open_ones and any(shape_of(x) is None for x in inputs):
        cause = (
            "it may spread out a value of fewer positions, beside layers that read several, at "
            "sizes that are not known; pass example_inputs"
        )
        return Refusal(cause, (open_ones[0].node.name,))
    return bool(open_ones)


def _frame(
    net: Net, fork: fx.Node, paths: tuple[Path, Path]
) -> tuple[int, int, torch.dtype, torch.device] | Refusal:
    """Channels, spatial dimensions, type and device of a site."""
    elements = [place.element for path in paths for place in path]
    rank = net.rank(fork)
    dims = next((e.dims for e in elements if isinstance(e, AffineConv)), None)
    if dims is None and net.facts(fork).last:
        dims = 0
    if dims is None and rank is not None and rank >= 2:
        dims = _dims_that_fit(net, fork, elements, rank)
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
        first = next((e for e in own if not e.keeps_channels), None)
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


def _dims_that_fit(net: Net, fork: fx.Node, elements: Sequence[Layer], rank: int) -> int:
    """Spatial dimensions where no layer tells: channels come last where only that fits all."""
    for dims in (rank - 2, 0):
        channels = net.channels(fork, dims)
        found = (element.resolved(channels, dims) for element in elements)
        if channels is not None and not any(isinstance(one, Refusal) for one in found):
            return dims
    return rank - 2


def _resolve(path: Path, channels: int, dims: int, keep_norms: bool, net: Net) -> Chain | Refusal:
    """The steps of a branch, with everything known."""
    steps = []
    on_path = {place.node for place in path}
    for place in path:
        node = place.node
        layer = place.element.resolved(channels, dims)
        if isinstance(layer, Refusal):
            return layer.at(node.name)
        refusal = layer.unfit(channels, dims, net.rank(node))
        if refusal:
            return refusal.at(node.name)
        channels = layer.channels_behind(channels, dims)
        module = net.module(node) if keep_norms else None
        if isinstance(module, BATCH_NORMS) and isinstance(layer, AffineConv):
            layer = Norm(module, layer)
        readers = set(node.users) - on_path
        pooled = bool(readers) and all(
            is_spatial_pool(net, n, dims) or reads_sizes_alone(n, node) for n in readers
        )
        steps.append(Step(layer, (node,), node, channels, place.tapped, pooled))
    return tuple(steps)


def _simplify(chain: Chain) -> Chain:
    """Merge neighbouring linear layers where that is exact and not dearer."""
    result: list[Step] = []
    for step in chain:
        whole = merged(result[-1], step) if result and _absorbs(result[-1], step) else None
        if whole is None:
            result.append(step)
        else:
            result[-1] = whole
    return tuple(result)


def _absorbs(first: Step, second: Step) -> bool:
    """Whether one is a scale, a crop or a stride, which needs no new weight beside the other's."""
    layers = (first.layer, second.layer)
    return any(isinstance(f, AffineConv) and f.is_depthwise and f.is_pointwise for f in layers)


def merged(first: Step, second: Step) -> Step | None:
    """Two linear steps as one, None where that is not exact or the first is read elsewhere too."""
    layers = (second.layer, first.layer)
    if first.tapped or not all(isinstance(layer, AffineConv) for layer in layers):
        return None
    layer = compose(second.affine, first.affine)
    if isinstance(layer, Refusal):
        return None
    return replace(second, layer=layer, nodes=first.nodes + second.nodes)


def _scaled(chain: Chain, factor: float, channels: int, dims: int) -> Chain:
    """The chain times a constant, merged into its last layer if that is linear."""
    scale = AffineConv.scale(torch.full((channels,), factor, dtype=torch.float64), dims=dims)
    step = Step(scale, (), None, channels)
    whole = merged(chain[-1], step) if chain else None
    return (*chain[:-1], whole) if whole else (*chain, step)
