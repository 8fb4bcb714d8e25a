"""Regions: where the channels of one linear layer go until other linear layers read them.

A region is a tree: the layer that makes the channels, channelwise nodes behind it, and at every end
a linear layer that sums the channels up. Nothing else reads any value of it, so its channels may be
renamed, merged or cut as long as all its nodes agree.

Its channels come in units that go together. A unit is one output channel of the producer (or all
that one group of a grouped layer reads); behind flattening or a depthwise layer with a multiplier
it is a block of several channels. Unit u of a value of block b is channels u·b to u·b + b − 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from rmfx.algebra.activation import Activation
from rmfx.algebra.affine import AffineConv
from rmfx.ir.elements import Border, Deferred
from rmfx.ir.kinds import BATCH_NORMS, NO_OPS, POOL_DIMS, is_a
from rmfx.ir.net import Net
from rmfx.ir.nodes import input_of, keeps_dims
from rmfx.ir.notes import why_frozen
from rmfx.ir.reading import read
from rmfx.ir.weights import weight_types
from rmfx.modules.activations import OWN_ACTIVATIONS

from .constant_channels import features_behind


@dataclass(frozen=True, eq=False)
class Inner:
    """A channelwise node.

    Attributes:
        node: the node.
        block: channels of a unit behind it.
        dims: spatial dimensions behind it.
        layer: what must be cut when channels go, if it differs from channel to channel.
    """

    node: fx.Node
    block: int
    dims: int
    layer: AffineConv | nn.Module | None = None


@dataclass(frozen=True, eq=False)
class Leaf:
    """A linear layer that reads a value of the region, `block` channels of it for each unit."""

    node: fx.Node
    value: fx.Node
    block: int
    layer: AffineConv


@dataclass(frozen=True, eq=False)
class Region:
    """A producer, the channelwise nodes behind it and the layers that read them."""

    producer: fx.Node
    layer: AffineConv
    units: int
    inner: tuple[Inner, ...]
    leaves: tuple[Leaf, ...]

    @property
    def block(self) -> int:
        """Channels of a unit that the producer makes."""
        return self.layer.out_channels // self.units


def find_region(net: Net, producer: fx.Node, block: int = 1) -> Region | None:
    """The region behind a linear layer, in units of `block` of its channels; None if there is none.

    None too where a value of it reaches anything that is neither channelwise nor linear.
    """
    layer = read(net, producer)
    if not isinstance(layer, AffineConv) or not _may_be_cut(net, producer):
        return None
    if layer.dims and net.rank(producer) != layer.dims + 2:
        return None
    units = layer.out_channels // block
    if units < 2 or layer.block[1] % block or _is_channelwise(layer):
        return None
    ends: list[tuple[fx.Node, int, int]] = [(producer, block, layer.dims)]
    inner: list[Inner] = []
    leaves: list[Leaf] = []
    for value, width, dims in ends:  # grows on the way
        for user in value.users:
            if _reads_batch_size(user):
                continue
            part = _follow(net, user, value, (units, width, dims))
            if part is None:
                return None
            if isinstance(part, Leaf):
                leaves.append(part)
            else:
                inner.append(part)
                ends.append((user, part.block, part.dims))
    if not leaves:
        return None
    return Region(producer, layer, units, tuple(inner), tuple(leaves))


def _is_channelwise(layer: AffineConv, block: int = 1) -> bool:
    """Whether a unit is read by whole groups, so that what they give is a unit as well."""
    return layer.groups > 1 and block % layer.block[0] == 0


def _may_be_cut(net: Net, node: fx.Node) -> bool:
    """Whether a layer that `read` accepts has weights of one type."""
    return node.op == "call_module" and len(weight_types(net, (node,))) == 1


def _reads_batch_size(node: fx.Node) -> bool:
    """x.size(0) and x.shape[0], which do not depend on the channels."""
    if node.op == "call_method" and node.target == "size":
        return node.args[1:] == (0,)
    if node.target is not getattr or node.args[1:] != ("shape",):
        return False
    return all(user.args[1:] == (0,) for user in node.users)


def _follow(
    net: Net, node: fx.Node, value: fx.Node, place: tuple[int, int, int]
) -> Inner | Leaf | None:
    """A reader of a value of (units, block, dims), None where channels must stay as they are."""
    _, block, dims = place
    if why_frozen(node) or node.op == "output" or input_of(node) is not value:
        return None
    element = read(net, node)
    if isinstance(element, AffineConv) and element.dims == dims and _may_be_cut(net, node):
        return _linear(node, value, element, place)
    if isinstance(element, Activation):
        return _activation(net, node, element, place)
    if isinstance(element, Deferred):
        found = _deferred(net, node, element, place)
        if found is not None:
            return found
    if isinstance(element, Border) and element.dims == dims:
        return Inner(node, block, dims)
    return _module(net, node, place) or _mean(node, place)


def _linear(
    node: fx.Node, value: fx.Node, layer: AffineConv, place: tuple[int, int, int]
) -> Inner | Leaf | None:
    units, block, dims = place
    if layer.in_channels != units * block:
        return None
    if _is_channelwise(layer, block):
        return Inner(node, block // layer.block[0] * layer.block[1], dims, layer)
    return None if layer.block[0] % block else Leaf(node, value, block, layer)


def _activation(
    net: Net, node: fx.Node, activation: Activation, place: tuple[int, int, int]
) -> Inner | None:
    units, block, dims = place
    if activation.unfit(units * block, dims, net.rank(node)):
        return None
    module = activation.module if activation.is_per_channel else None
    return None if module is not None and net.guard(node) else Inner(node, block, dims, module)


def _deferred(
    net: Net, node: fx.Node, element: Deferred, place: tuple[int, int, int]
) -> Inner | None:
    """Batch norm; scales, shifts, crops and zero padding that are the same for all channels."""
    units, block, dims = place
    layer = element.resolved(units * block, dims)
    if not isinstance(layer, AffineConv) or layer.block != (1, 1):
        return None
    if layer.in_channels != units * block:
        return None
    module = net.callee(node)
    if type(module) in BATCH_NORMS:
        return Inner(node, block, dims, module) if isinstance(module, nn.Module) else None
    constants = [net.attribute(n) for n in node.all_input_nodes if n.op == "get_attr"]
    uniform = all(isinstance(c, Tensor) and c.numel() == 1 for c in constants)
    return Inner(node, block, dims) if uniform else None


def _module(net: Net, node: fx.Node, place: tuple[int, int, int]) -> Inner | None:
    """Pools, dropout, flattening, and the activations that passes make."""
    units, block, dims = place
    module: Any = net.callee(node)
    if not isinstance(module, nn.Module) or net.guard(node) or len(node.args) != 1:
        return None
    if is_a(module, OWN_ACTIVATIONS):
        tensor = next(iter((*module.parameters(), *module.buffers())))
        fits = _parameters_fit(module, place) and tensor.dim() == dims + 1
        return Inner(node, block, dims, module) if fits else None
    if type(module) in POOL_DIMS:
        pools = POOL_DIMS[type(module)] == dims and not getattr(module, "return_indices", False)
        return Inner(node, block, dims) if pools else None
    if is_a(module, NO_OPS):
        return Inner(node, block, dims)
    if type(module) is not nn.Flatten or (module.start_dim, module.end_dim) != (1, -1):
        return None
    features = features_behind(net, node) if dims else None
    if features is None or features % (units * block):
        return None
    return Inner(node, features // units, 0)


def _mean(node: fx.Node, place: tuple[int, int, int]) -> Inner | None:
    _, block, dims = place
    kept = keeps_dims(node, dims)
    return None if kept is None else Inner(node, block, dims if kept else 0)


def _parameters_fit(module: nn.Module, place: tuple[int, int, int]) -> bool:
    """Whether everything a module holds is one number per channel, or one for all."""
    units, block, _ = place
    tensors = (*module.parameters(), *module.buffers())
    return all(t.numel() in (1, units * block) for t in tensors)
