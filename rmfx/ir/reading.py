"""Reading graph nodes as layers: which node is linear, which is an activation, which is a join.

`read` gives a node's meaning as a value of the algebra:
    AffineConv   a linear layer with everything known
    Deferred     linear, but its channel count or number of spatial dimensions comes from its
                 neighbours (scales, crops, paddings, average pools, batch norm)
    Activation   a pointwise activation
    Blockwise    an activation that differs from channel to channel, left by an inner site
    Border       padding with other values than zeros
    MaxPool      the largest of some neighbours
    Refusal      anything else, with the reason
`laterals` reads a node that combines a value with other tensors: a product, a sum, a maximum, a
choice, a concatenation.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rmfx.algebra.activation import Activation, Blockwise, is_activation
from rmfx.algebra.affine import CONVS, TRANSPOSED, AffineConv, Ints, Pads
from rmfx.algebra.layer import Layer
from rmfx.errors import Refusal

from .callees import is_touched
from .conditions import Condition
from .elements import Border, Deferred, MaxPool, Virtual
from .joins import operands
from .kinds import (
    ADDS,
    AVERAGE_POOLS,
    BATCH_NORMS,
    BORDERS,
    CAST_OPERATORS,
    CASTS,
    MAX_POOLS,
    PADS,
    SCALES,
    SUBS,
)
from .net import Net
from .nodes import describe, each, input_of, is_tensor_node, slice_by_slice, two_operands
from .reasons import reason_for
from .selections import may_select, selection
from .sizes import Sizes, conditions_of

aten = torch.ops.aten
CONTIGUOUS = ("contiguous", aten.contiguous.default)
LARGEST_NUMBER = 1e18  # of what is padded with: beyond it stands for infinity, as beside a maximum


def read(net: Net, node: fx.Node) -> Layer | Refusal:
    """The meaning of a node that takes one tensor and gives one tensor."""
    frozen = node.meta.get("frozen")
    if frozen:
        return Refusal(frozen, (node.name,))
    if node.op == "call_module":
        found = _read_module(net, node)
    elif _keeps_values(node):
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


def _keeps_values(node: fx.Node) -> bool:
    """`contiguous`, `to(memory_format=…)`, and a cast to the type that a value has."""
    if not node.args or node.args[0] is not input_of(node):  # a weight, cast to the type of x
        return False
    if node.target in CONTIGUOUS or (node.target is aten.clone.default and node.kwargs):
        return True
    if node.target == "to" and len(node.args) == 1 and set(node.kwargs) == {"memory_format"}:
        return True
    known = all("dtype" in n.meta for n in (node, *node.all_input_nodes))
    return node.target in (*CASTS, *CAST_OPERATORS) and known and not _changes_type(node)


def _changes_type(node: fx.Node) -> bool:
    """Whether a node is known to give other values than those of its input's type."""
    source = input_of(node)
    kinds = [n.meta.get("dtype") for n in (node, source) if n is not None]
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
        channels is not None and isinstance(build(channels, dims), Refusal)
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
    built = element.build(channels, rank - 2)
    return built.at(node.name) if isinstance(built, Refusal) else built


def resolve(net: Net, node: fx.Node, channels: int | None, dims: int) -> Layer | Refusal:
    """The meaning of a node, with everything known, that reads a value of some channels."""
    element = read(net, node)
    if isinstance(element, Refusal):
        return element
    found = element.resolved(channels, dims)
    return found.at(node.name) if isinstance(found, Refusal) else found


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
        return AffineConv.from_conv(module)
    if type(module) in TRANSPOSED and max(module.stride) == 1:  # type: ignore[arg-type]
        return AffineConv.from_transposed_conv(module)
    if type(module) in BATCH_NORMS:
        return Deferred(lambda channels, dims: _batch_norm(net, node, module, dims))
    if type(module) in AVERAGE_POOLS:
        unfit = conditions_of(sizes_of(net), node)
        if isinstance(unfit, Refusal):
            return unfit
        return Deferred(lambda channels, dims: _average_pool(module, channels, dims))
    if type(module) in MAX_POOLS and not module.return_indices:
        return _read_max_pool(net, node, module)
    if type(module) in PADS:
        return _read_pad_module(node, module)
    if type(module) in BORDERS:
        kind = type(module).__name__.partition("Pad")[0]
        mode = {"Reflection": "reflect", "Replication": "replicate"}.get(kind, kind.lower())
        return _border(node, tuple(module.padding), (mode, 0.0))  # type: ignore[arg-type]
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
        return _read_scale(net, node)
    if target in (*ADDS, *SUBS):
        return _read_shift(net, node)
    if target is operator.getitem:
        return _read_slice(node)
    if target is F.pad:
        return _read_pad(net, node)
    return Refusal(reason_for(net, node))


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
    found = AffineConv.from_batch_norm(module, dims)
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


def _read_pad_module(node: fx.Node, module: Any) -> Deferred | Border | Refusal:
    flat, value = tuple(module.padding), float(module.value)
    return _spatial_pad(flat) if value == 0 else _border(node, flat, ("constant", value))


def _read_pad(net: Net, node: fx.Node) -> Deferred | Border | Refusal:
    """`F.pad(x, pad, mode="constant", value=0)`: around space, or a number around channels."""
    names = ("input", "pad", "mode", "value")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    flat = given.get("pad")
    if not isinstance(flat, (list, tuple)) or not all(isinstance(p, int) for p in flat):
        return Refusal("the padding is not constant")
    mode, value = given.get("mode", "constant"), given.get("value")
    if mode == "constant" and value in (None, 0, 0.0):
        return _spatial_pad(tuple(flat))
    if not isinstance(value, (int, float, type(None))):
        return Refusal("the padding is not constant")
    *space, (before, after) = zip(flat[::2], flat[1::2], strict=True) if flat else [(0, 0)]
    number = float(value or 0)
    is_number = mode == "constant" and abs(number) < LARGEST_NUMBER
    if is_number and net.rank(node) == len(space) + 2 and not any(map(any, space)):
        return _channel_pad(len(space), before, after, number)
    return _border(node, tuple(flat), (mode, number))


def _channel_pad(space: int, before: int, after: int, value: float) -> Deferred:
    def build(channels: int, dims: int) -> AffineConv | Refusal:
        if dims != space:  # features, which are the last dimension
            return Refusal("padding reaches beyond the channels")
        return _pad_channels(channels, dims, before, after, value)

    return Deferred(build)


def _border(node: fx.Node, flat: Ints, filling: tuple[str, float]) -> Border | Refusal:
    pairs = tuple(zip(flat[::2], flat[1::2], strict=True))[::-1]
    if any(min(pair) < 0 for pair in pairs):
        return Refusal("padding that crops and pads with other values than zeros")
    return Border(node, pairs, filling)


def _spatial_pad(flat: Ints) -> Deferred:
    pairs = tuple(zip(flat[::2], flat[1::2], strict=True))  # last dimension first

    def build(channels: int, dims: int) -> AffineConv | Refusal:
        # Without spatial dimensions the last one holds the features.
        space, features = pairs[:dims], pairs[dims:]
        if any(any(pair) for pair in features[1:]):
            return Refusal("padding reaches beyond the channels")
        space = (*space, *[(0, 0)] * (dims - len(space)))[::-1]
        before, after = features[0] if features else (0, 0)
        if not before and not after:
            return AffineConv.identity(channels, dims, padding=space)
        return _pad_channels(channels, dims, before, after, padding=space)

    return Deferred(build)


def _pad_channels(
    channels: int,
    dims: int,
    before: int,
    after: int,
    value: float = 0.0,
    padding: Pads | None = None,
) -> AffineConv | Refusal:
    if channels + before + after < 1 or before < -channels or after < -channels:
        return Refusal("the padding removes every channel")
    number = torch.tensor(value, dtype=torch.float64)
    narrow = number.to(torch.bfloat16)  # a type that no other one has to follow
    weight = torch.eye(channels).to(narrow if narrow == number else number)
    weight = F.pad(weight, (0, 0, before, after))
    bias = F.pad(weight.new_zeros(channels), (before, after), value=value)
    return AffineConv.pointwise(weight, bias, dims=dims, padding=padding)


def _read_slice(node: fx.Node) -> Deferred | Refusal:
    """x[:, :, a:b:s, …] with whole batch and channels: a strided crop."""
    index = node.args[1]
    if not isinstance(index, tuple) or not all(isinstance(i, slice) or i is ... for i in index):
        is_known = "shape" in node.all_input_nodes[0].meta
        way_out = "" if is_known else ", as far as is known; pass example_inputs"
        return Refusal(f"an index that is not made of slices{way_out}")
    parts = [i for i in index if isinstance(i, slice)]
    bounds = [b for s in parts for b in (s.start, s.stop, s.step)]
    if not all(b is None or isinstance(b, int) for b in bounds):
        return Refusal("a slice with bounds computed at run time")
    if index.count(...) > 1:
        return Refusal("an index with two ellipses")

    def build(channels: int, dims: int) -> AffineConv | Refusal:
        if len(parts) > dims + 2 or dims == 0:
            return Refusal("a slice of the batch or of the features")
        full = slice_by_slice(index, dims + 2)
        if full[0].indices(2**62) != (0, 2**62, 1):
            return Refusal("a slice of the batch")
        return _strided_crop(channels, full[1], full[2:])

    return Deferred(build)


def _strided_crop(channels: int, chosen: slice, slices: list[slice]) -> AffineConv | Refusal:
    stride, padding = [], []
    for s in slices:
        start, stop, step = s.start or 0, s.stop, s.step or 1
        if start < 0 or step < 1 or (stop is not None and stop >= 0 and stop < 2**62):
            return Refusal("a slice whose place depends on the input size")
        end = 0 if stop is None or stop > 0 else stop
        stride.append(step)
        padding.append((-start, end))
    crop = AffineConv.identity(channels, len(slices), stride=tuple(stride), padding=tuple(padding))
    rows = range(channels)[chosen]
    if rows == range(channels):
        return crop
    if not rows:
        return Refusal("a slice without channels")
    weight = torch.eye(channels, dtype=torch.bfloat16)[list(rows)]
    return AffineConv.pointwise(weight, dims=len(slices), stride=crop.stride, padding=crop.padding)


def _read_scale(net: Net, node: fx.Node) -> Deferred | Refusal:
    """x·c, c·x, x/c, −x with a constant number or a tensor of the model, per channel."""
    divide = node.target in (operator.truediv, operator.itruediv, torch.div)
    if node.target in (operator.neg, torch.neg):
        return _constant(lambda c, dims: -torch.ones(c, dtype=torch.float64), None)
    if set(node.kwargs) - {"other", "input"} or len(node.args) + len(node.kwargs) != 2:
        return Refusal(describe(node) + " with options")
    a, b = two_operands(node)
    constant, x = (b, a) if is_tensor_node(a) else (a, b)
    if not is_tensor_node(x):
        return Refusal("there is no tensor to scale")
    if is_tensor_node(constant):
        return Refusal("a product of two tensors that both depend on the input")
    if divide and constant is a:
        return Refusal("division by a tensor that depends on the input")
    value = _value(net, constant)
    if isinstance(value, Refusal):
        return value
    rank = net.rank(x) if isinstance(x, fx.Node) else None

    def factor(channels: int, dims: int) -> Tensor | Refusal:
        c = _per_channel(value, channels, dims, rank)
        return 1 / c if divide and isinstance(c, Tensor) else c

    return _constant(factor, None)


def _read_shift(net: Net, node: fx.Node) -> Deferred | Refusal:
    """x + c, x − c, c − x with a constant number or a tensor of the model, per channel."""
    terms = operands(node)
    if isinstance(terms, Refusal):
        return terms
    (a, factor_a), (b, factor_b) = terms
    if is_tensor_node(a) == is_tensor_node(b):
        return Refusal("it adds two tensors and was itself refused")
    first_is_tensor = is_tensor_node(a)
    constant, scale, sign = (b, factor_b, factor_a) if first_is_tensor else (a, factor_a, factor_b)
    x = a if first_is_tensor else b
    value = _value(net, constant)
    if isinstance(value, Refusal):
        return value
    rank = net.rank(x) if isinstance(x, fx.Node) else None

    def shift(channels: int, dims: int) -> Tensor | Refusal:
        c = _per_channel(value, channels, dims, rank)
        return c * scale if isinstance(c, Tensor) else c

    return _constant(lambda c, dims: torch.full((c,), sign, dtype=torch.float64), shift)


Factor = Callable[[int, int], Tensor | Refusal]


def _constant(factor: Factor, shift: Factor | None) -> Deferred:
    def build(channels: int, dims: int) -> AffineConv | Refusal:
        a = factor(channels, dims)
        b = shift(channels, dims) if shift else torch.zeros(channels, dtype=torch.float64)
        if isinstance(a, Refusal):
            return a
        if isinstance(b, Refusal):
            return b
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            return Refusal("a constant that is not finite")
        return AffineConv.scale(a, b, dims=dims)

    return Deferred(build)


def _value(net: Net, constant: object) -> Tensor | Refusal:
    if isinstance(constant, (int, float)) and not isinstance(constant, bool):
        return torch.tensor(float(constant), dtype=torch.float64)
    if isinstance(constant, fx.Node) and constant.meta.get("frozen"):
        return Refusal(constant.meta["frozen"], (constant.name,))
    if isinstance(constant, fx.Node) and constant.op == "get_attr":
        value = net.attribute(constant)
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().to("cpu", torch.float64)
    return Refusal("a constant that is neither a number nor a real tensor of the model")


def _per_channel(value: Tensor, channels: int, dims: int, rank: int | None) -> Tensor | Refusal:
    """(channels,) from a tensor that broadcasts over batch and space.

    Args:
        rank: dimensions of the value it meets; None counts as the fewest possible.
    """
    shape = tuple(value.shape)
    before, own = shape[: -dims - 1], shape[-dims - 1 :]
    if len(shape) > (dims + 2 if rank is None else rank) or math.prod(before) != 1:
        return Refusal(f"a constant of shape {shape} that differs from sample to sample")
    full = (1,) * (dims + 1 - len(own)) + own
    if full[0] not in (1, channels) or math.prod(full[1:]) != 1:
        return Refusal(f"a constant of shape {shape} that is not one number per channel")
    return value.reshape(-1).expand(channels).clone()
