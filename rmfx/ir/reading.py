"""Reading graph nodes as layers: which node is linear, which is an activation, which is a join.

`read` gives a node's meaning as a value of the algebra:
    AffineConv   a linear layer with everything known
    Deferred     linear, but its channel count or number of spatial dimensions comes from its
                 neighbours (scales, crops, paddings, average pools, batch norm)
    Activation   a pointwise activation
    Blockwise    an activation that differs from channel to channel, left by an inner site
    Border       padding with other values than zeros
    MaxPool      the largest of some neighbours
    Interpolation  values at other positions
    Refusal      anything else, with the reason
`laterals` reads a node that combines a value with other tensors: a product, a sum, a maximum, a
choice, a concatenation.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from rmfx.algebra.activation import Activation, is_activation
from rmfx.algebra.affine import CONVS, TRANSPOSED, AffineConv
from rmfx.algebra.blockwise import Blockwise
from rmfx.algebra.layer import Layer
from rmfx.algebra.modules import from_batch_norm, from_conv, from_transposed_conv
from rmfx.errors import Refusal

from .callees import is_touched
from .conditions import Condition
from .elements import Deferred, Interpolation, MaxPool, Virtual
from .interpolations import interpolation
from .kinds import (
    ADAPTIVE_AVERAGES,
    ADDS,
    AVERAGE_POOLS,
    BATCH_NORMS,
    BORDERS,
    CAST_OPERATORS,
    CASTS,
    MAX_POOLS,
    PADS,
    POOL_DIMS,
    SCALES,
    SUBS,
    is_a,
)
from .net import Net
from .nodes import data_read, describe, each, input_of, keeps_dims
from .notes import type_of, why_frozen
from .paddings import border, read_pad, read_pad_module, read_slice
from .reasons import reason_for
from .scales import read_scale, read_shift
from .selections import may_select, selected, selection
from .size_conditions import conditions_of
from .sizes import Sizes

aten = torch.ops.aten
CONTIGUOUS = ("contiguous", aten.contiguous.default)


def read(net: Net, node: fx.Node) -> Layer | Refusal:
    """The meaning of a node that takes one tensor and gives one tensor."""
    frozen = why_frozen(node)
    if frozen:
        return Refusal(frozen, (node.name,))
    if node.op == "call_module":
        found = _read_module(net, node)
    elif _keeps_values(net, node):
        found = Deferred(AffineConv.identity)
    elif node.op == "call_function":
        found = _read_function(net, node)
    else:
        found = Refusal(reason_for(net, node))
    # What a layer with weights gives under autocast is a matter of the layer.
    if not isinstance(found, Refusal) and node.op == "call_function" and _changes_type(node):
        found = Refusal(f"{describe(node)} changes the type of values")
    if isinstance(found, Refusal) and may_select(net, node) and net.guard(node) is None:
        found = read_selection(net, node, found)
    return found.at(node.name) if isinstance(found, Refusal) else found


def sizes_of(net: Net) -> Sizes:
    """The size laws of a net, which it keeps."""
    return net.analysis(Sizes, lambda: Sizes(net, read))


def demands_of(net: Net, nodes: Iterable[fx.Node]) -> list[Condition]:
    """The input sizes for which nodes are the layers they are read as, and operands alike.

    They are to be demanded of the network's inputs where the nodes become parts of other layers.
    """
    found = (conditions_of(sizes_of(net), node) for node in nodes)
    return [one for some in found if not isinstance(some, Refusal) for one in some]


def _keeps_values(net: Net, node: fx.Node) -> bool:
    """`contiguous`, `to(memory_format=…)`, and a cast to the type that a value has at any call."""
    if not node.args or node.args[0] is not input_of(node):  # a weight, cast to the type of x
        return False
    if node.target in CONTIGUOUS or (node.target is aten.clone.default and node.kwargs):
        return True
    if node.target == "to" and len(node.args) == 1 and set(node.kwargs) == {"memory_format"}:
        return True
    if node.target not in (*CASTS, *CAST_OPERATORS) or _changes_type(node):
        return False
    read = data_read(node)
    return all(type_of(n) is not None for n in (node, *read)) and all(map(net.has_own_type, read))


def _changes_type(node: fx.Node) -> bool:
    """Whether a node is known to give other values than those of its input's type."""
    source = input_of(node)
    kinds = [type_of(n) for n in (node, source) if n is not None]
    return len(kinds) == 2 and None not in kinds and kinds[0] != kinds[1]


def read_selection(net: Net, node: fx.Node, otherwise: Refusal) -> Deferred | Refusal:
    """A node that may select channels, as the linear layer that does."""

    def build(channels: int, dims: int) -> AffineConv | Refusal:
        return selection(net, node, channels, dims) or otherwise

    source = input_of(node)
    rank = net.rank(source) if source is not None else None
    if source is None or rank is None:
        return Deferred(build)
    # Channels stand in dimension 1, features in the last one.
    known = {dims: net.channels(source, dims) for dims in (max(rank - 2, 0), 0)}
    refused = all(
        channels is not None and selected(net, node, channels, dims) is None
        for dims, channels in known.items()
    )
    return otherwise if refused else Deferred(build)


def read_affine(net: Net, node: fx.Node) -> AffineConv | Refusal:
    """A node as a linear layer with everything known, on its own."""
    element = read(net, node)
    if isinstance(element, (AffineConv, Refusal)):
        return element
    source = input_of(node)
    if not isinstance(element, Deferred) or source is None:
        return Refusal("it is not linear", (node.name,))
    rank = net.rank(node)
    if rank is None or rank < 2:
        return Refusal("the number of dimensions is unknown; pass example_inputs", (node.name,))
    channels = net.channels(source, rank - 2)
    if channels is None:
        return net.without_channels(source)
    built = element.resolved(channels, rank - 2)
    return built.at(node.name) if isinstance(built, Refusal) else built


def _read_module(net: Net, node: fx.Node) -> Layer | Refusal:
    module = net.callee(node)
    if isinstance(module, Virtual):
        return module.layer
    refusal = net.guard(node)
    if module is None:
        return Refusal(f"there is no module {node.target}")
    own = Blockwise.of(module)
    if own is not None:
        return refusal or own
    if is_activation(module) and (refusal is None or not _blames_sharing(net, node)):
        return Activation(module)
    if refusal:
        return refusal
    if len(node.args) + len(node.kwargs) != 1:
        way_out = getattr(module, "way_out", "")
        return Refusal(f"{type(module).__name__} is called with more than one input{way_out}")
    if type(module) in CONVS:
        return from_conv(module)
    if type(module) in TRANSPOSED and max(module.stride) == 1:  # type: ignore[arg-type]
        return from_transposed_conv(module)
    if type(module) in BATCH_NORMS:
        return Deferred(lambda channels, dims: _batch_norm(net, node, module, dims))
    if type(module) in AVERAGE_POOLS:
        unfit = conditions_of(sizes_of(net), node)
        if isinstance(unfit, Refusal):
            return unfit
        return Deferred(lambda channels, dims: _average_pool(module, channels, dims))
    if is_a(module, nn.Upsample):
        return _read_interpolation(net, node)
    if type(module) in MAX_POOLS and not module.return_indices:
        return _read_max_pool(net, node, module)
    if type(module) in PADS:
        return read_pad_module(node, module)
    if type(module) in BORDERS:
        kind = type(module).__name__.partition("Pad")[0]
        mode = {"Reflection": "reflect", "Replication": "replicate"}.get(kind, kind.lower())
        return border(node, tuple(module.padding), (mode, 0.0))  # type: ignore[arg-type]
    return Refusal(reason_for(net, node))


def _blames_sharing(net: Net, node: fx.Node) -> bool:
    """Whether a guard refuses an activation for more than being shared.

    A shared activation is the same function at every call, so sharing alone does no harm.
    """
    module = net.module(node)
    return module is not None and is_touched(module)


def _read_function(net: Net, node: fx.Node) -> Layer | Refusal:
    target = node.target
    if target in SCALES:
        return read_scale(net, node)
    if target in (*ADDS, *SUBS):
        return read_shift(net, node)
    if target is operator.getitem:
        return read_slice(node)
    if target is F.pad:
        return read_pad(net, node)
    return _read_interpolation(net, node)


# ---- linear elements ----------------------------------------------------------------------------
_CHANNELS_OF_NORM = ("the features of 2-D inputs", "the channels of 3-D inputs")


def _batch_norm(net: Net, node: fx.Node, module: nn.Module, dims: int) -> AffineConv | Refusal:
    rank = net.rank(node)
    if isinstance(module, nn.BatchNorm1d) and dims < 2 and rank != dims + 2:
        cause = f"BatchNorm1d normalises dimension 1, which holds {_CHANNELS_OF_NORM[dims]} only"
        unknown = "pass example_inputs so that the shape is known"
        known = unknown if rank is None else f"this is {rank}-D"
        return Refusal(f"{cause}; {known}", (node.name,))
    if rank is not None and rank != dims + 2:
        return Refusal(f"batch norm of a {rank}-D tensor among {dims}-D layers", (node.name,))
    found = from_batch_norm(module, dims)
    return found.at(node.name) if isinstance(found, Refusal) else found


def _average_pool(module: nn.Module, channels: int, dims: int) -> AffineConv | Refusal:
    if AVERAGE_POOLS.index(type(module)) + 1 != dims:
        return Refusal(f"{type(module).__name__} among layers of {dims} spatial dimensions")

    return AffineConv.average_pool(
        channels,
        each(module.kernel_size, dims),
        each(module.stride, dims),
        each(module.padding, dims),
        count_include_pad=bool(module.count_include_pad),
        divisor=getattr(module, "divisor_override", None),
    )


def _read_max_pool(net: Net, node: fx.Node, module: Any) -> Deferred | MaxPool:
    dims = MAX_POOLS.index(type(module)) + 1
    names = ("kernel_size", "stride", "padding", "dilation")
    sizes = tuple(each(getattr(module, name), dims) for name in names)
    if max(sizes[0]) == 1:  # takes one value of each place: rounding up makes no further one
        return Deferred(lambda channels, _: AffineConv.identity(channels, dims, stride=sizes[1]))
    return MaxPool(node, dims, (*sizes, module.ceil_mode), reason_for(net, node))


def _read_interpolation(net: Net, node: fx.Node) -> Interpolation | Refusal:
    found, rank = interpolation(node, net.module(node)), net.rank(node)
    if found is None or rank is None or input_of(node) is None:
        return Refusal(reason_for(net, node))
    return Interpolation(node, rank - 2, found, reason_for(net, node))


def is_spatial_pool(net: Net, node: fx.Node, dims: int) -> bool:
    """Whether a node averages over space, channel by channel; channels stay dimension 1."""
    if why_frozen(node) or not dims:
        return False
    module = net.module(node)
    if is_a(module, ADAPTIVE_AVERAGES):
        return module is not None and POOL_DIMS[type(module)] == dims and not net.guard(node)
    return keeps_dims(node, dims) is not None
