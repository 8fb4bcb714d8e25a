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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ._activation import Activation, Blockwise, is_activation
from ._affine import CONVS, TRANSPOSED, AffineConv, Ints, Pads
from ._calls import (
    ADDS,
    ARITHMETIC,
    AVERAGE_POOLS,
    BATCH_NORMS,
    BORDERS,
    CAST_OPERATORS,
    CASTS,
    PADS,
    SCALES,
    SUBS,
    each,
)
from ._errors import Refusal
from ._graph import Net, Virtual
from ._kinds import is_a
from ._reasons import reason_for
from ._selections import may_select, selection
from ._sizes import MAX_POOLS, conditions_of

aten = torch.ops.aten
CONTIGUOUS = ("contiguous", aten.contiguous.default)
LARGEST_NUMBER = 1e18  # of what is padded with: beyond it stands for infinity, as beside a maximum
MEANS: tuple[object, ...] = ("mean", torch.mean, aten.mean.dim)


@dataclass(frozen=True, eq=False)
class Deferred:
    """A linear layer that is fixed by (channels, dims) of its place."""

    build: Callable[[int, int], AffineConv | Refusal]


@dataclass(frozen=True, eq=False)
class Border:
    """Padding with other values than zeros: reflected, repeated, wrapped round or constant.

    Attributes:
        node: what pads; it does so channel by channel.
        pairs: (before, after) per spatial dimension, not negative.
        filling: the mode and the value.
    """

    node: fx.Node
    pairs: Pads
    filling: tuple[str, float]

    @property
    def dims(self) -> int:
        return len(self.pairs)

    @property
    def signature(self) -> tuple[object, ...]:
        """Equal for paddings that do the same."""
        return (self.filling, self.pairs)

    def affine(self, channels: int) -> AffineConv:
        """A layer of the same geometry, which is the same map away from the border."""
        return AffineConv.identity(channels, len(self.pairs), padding=self.pairs)


@dataclass(frozen=True, eq=False)
class MaxPool:
    """The largest of some neighbours, channel by channel.

    Attributes:
        node: what pools.
        dims: spatial dimensions.
        signature: equal for pools that do the same.
        reason: why a carry cannot pass it.
    """

    node: fx.Node
    dims: int
    signature: tuple[object, ...]
    reason: str


CHANNEL_BY_CHANNEL = (Border, MaxPool)
Element = AffineConv | Deferred | Activation | Blockwise | Border | MaxPool


def read(net: Net, node: fx.Node) -> Element | Refusal:
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
        found = Refusal(f"{_describe(node)} changes the type of values")
    if isinstance(found, Refusal) and may_select(net, node) and net.guard(node) is None:
        found = _read_selection(net, node, found)
    return found.at(node.name) if isinstance(found, Refusal) else found


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


def _read_selection(net: Net, node: fx.Node, otherwise: Refusal) -> Deferred | Refusal:
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


def _read_module(net: Net, node: fx.Node) -> Element | Refusal:
    made = net.replacement(node)
    if isinstance(made, Virtual):
        return made.layer
    refusal = net.guard(node)
    module = made or net.module(node)
    if module is None:
        return Refusal(f"there is no module {node.target}")
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
        unfit = conditions_of(net, node)
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
    return module is not None and net.is_touched(module)


def _read_function(net: Net, node: fx.Node) -> Element | Refusal:
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


def slice_by_slice(index: tuple[Any, ...], rank: int) -> list[slice]:
    """A slice for every dimension, of an index of slices and at most one ellipsis."""
    at = index.index(...) if ... in index else len(index)
    given = [*index[:at], *index[at + 1 :]]
    return [*given[:at], *[slice(None)] * (rank - len(given)), *given[at:]]


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
        return Refusal(_describe(node) + " with options")
    a, b = _two_operands(node)
    constant, x = (b, a) if is_tensor_node(net, a) else (a, b)
    if not is_tensor_node(net, x):
        return Refusal("there is no tensor to scale")
    if is_tensor_node(net, constant):
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
    if is_tensor_node(net, a) == is_tensor_node(net, b):
        return Refusal("it adds two tensors and was itself refused")
    first_is_tensor = is_tensor_node(net, a)
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


# ---- operations with other tensors --------------------------------------------------------------

INF = math.inf
# operation -> place of an operand -> what the others must hold for that one to come out unchanged
NEUTRAL: dict[Any, dict[int, tuple[float | None, ...]]] = {
    torch.add: {0: (None, 0.0), 1: (0.0, None)},
    torch.sub: {0: (None, 0.0)},
    torch.mul: {0: (None, 1.0), 1: (1.0, None)},
    torch.div: {0: (None, 1.0)},
    torch.maximum: {0: (None, -INF), 1: (-INF, None)},
    torch.minimum: {0: (None, INF), 1: (INF, None)},
    torch.where: {1: (True, None, 0.0), 2: (False, 0.0, None)},
}


@dataclass(frozen=True, eq=False)
class Lateral:
    """A value combined with other tensors, channel by channel.

    Attributes:
        node: the product, sum, choice or concatenation.
        operands: what it combines; nodes, and numbers in a choice.
        place: which of them is on the path that is followed.
    """

    node: fx.Node
    operands: tuple[Any, ...]
    place: int

    @property
    def value(self) -> fx.Node:
        """The operand on the path."""
        return self.operands[self.place]  # type: ignore[no-any-return]

    @property
    def others(self) -> tuple[fx.Node, ...]:
        """The other tensors."""
        rest = (*self.operands[: self.place], *self.operands[self.place + 1 :])
        return tuple(x for x in rest if isinstance(x, fx.Node))

    @property
    def neutral(self) -> tuple[float | None, ...]:
        """What each of the others must hold for the value to come out unchanged."""
        return NEUTRAL[self.node.target][self.place]

    def reading(self, places: Mapping[fx.Node, fx.Node]) -> Lateral:
        """The same with some of the other tensors read elsewhere."""
        operands = (
            places.get(x, x) if i != self.place and isinstance(x, fx.Node) else x
            for i, x in enumerate(self.operands)
        )
        return replace(self, operands=tuple(operands))

    @property
    def is_concatenation(self) -> bool:
        return self.node.target is torch.cat

    @property
    def spread_dims(self) -> set[int]:
        """The dimensions of the result in which the value is spread out, for the example."""
        value, whole = (n.meta.get("shape") for n in (self.value, self.node))
        if value is None or whole is None or self.is_concatenation:
            return set()
        missing = len(whole) - len(value)
        own = (None,) * missing + value
        return {dim for dim, size in enumerate(whole) if size != own[dim]}

    def added_channels(self, net: Net, dims: int) -> int:
        """By how many channels the value grows."""
        if not self.is_concatenation:
            return 0
        return sum(net.channels(other, dims) or 0 for other in self.others)


def laterals(net: Net, node: fx.Node) -> list[Lateral]:
    """A node as a combination of each of its operands with the others, the likeliest path first.

    A gate is seldom the path: it has another size than the product, or comes out of a sigmoid.
    """
    if node.meta.get("frozen") or node.op != "call_function":
        return []
    operands = _concatenated(net, node) if node.target is torch.cat else node.args
    if node.target is torch.cat and len(set(operands)) == 1 and _selects(net, node):
        return []  # the same channels several times
    found = [Lateral(node, tuple(operands), place) for place in _open_places(net, node, operands)]

    def is_gate(one: Lateral) -> bool:
        return bool(one.spread_dims) or is_a(net.module(one.value), (nn.Sigmoid, nn.Hardsigmoid))

    return sorted(found, key=is_gate)


def _selects(net: Net, node: fx.Node) -> bool:
    return isinstance(_read_selection(net, node, Refusal("")), Deferred)


def _open_places(net: Net, node: fx.Node, operands: Sequence[Any]) -> list[int]:
    """The operands that come out unchanged if the others hold the right numbers."""
    if node.target is torch.cat:
        return [*range(len(operands))]
    is_sum = node.target in (torch.add, torch.sub)
    tensors = [is_tensor_node(net, x) for x in operands]
    count = 3 if node.target is torch.where else 2
    # Only a choice does not care what number it does not choose.
    numbers = [isinstance(x, (int, float)) and node.target is torch.where for x in operands]
    if len(operands) != count or not all(map(operator.or_, tensors, numbers)) or not tensors[0]:
        return []
    if set(node.kwargs) - ({"alpha"} if is_sum else set()):
        return []
    places = [i for i in NEUTRAL.get(node.target, ()) if tensors[i]]
    return places[:1] if node.kwargs else places  # a factor belongs to the second operand


def _concatenated(net: Net, node: fx.Node) -> list[fx.Node]:
    tensors = node.args[0] if len(node.args) == 2 and not node.kwargs else ()
    if not isinstance(tensors, (list, tuple)) or not isinstance(node.args[1], int):
        return []
    parts = [x for x in tensors if isinstance(x, fx.Node) and is_tensor_node(net, x)]
    return parts if len(parts) == len(tensors) else []


def keeps_dims(node: fx.Node, dims: int) -> bool | None:
    """Whether a mean over space keeps the dimensions; None if a node is no such mean."""
    if node.target not in MEANS or dims < 1 or set(node.kwargs) - {"dim", "keepdim"}:
        return None
    axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    axes = (axes,) if isinstance(axes, int) else axes
    if not isinstance(axes, (list, tuple)) or not all(isinstance(i, int) for i in axes):
        return None
    kept = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    places = {int(i) % (dims + 2) for i in axes if isinstance(i, int)}
    whole = places == set(range(2, dims + 2))
    if kept not in (True, False) or len(node.args) > 3 or not places or min(places) < 2:
        return None
    return bool(kept) if kept or whole else None


# ---- joins --------------------------------------------------------------------------------------

Term = tuple[object, float]


def operands(node: fx.Node) -> tuple[Term, Term] | Refusal:
    """The two operands of an addition or subtraction with their factors."""
    known = {"input", "other", "alpha"}
    if set(node.kwargs) - known or len(node.args) + len(node.kwargs) < 2 or len(node.args) > 2:
        return Refusal(_describe(node) + " with options")
    alpha = node.kwargs.get("alpha", 1)
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        return Refusal("an alpha that is not a constant number")
    a, b = _two_operands(node)
    return (a, 1.0), (b, float(-alpha if node.target in SUBS else alpha))


def _two_operands(node: fx.Node) -> tuple[object, object]:
    given = [*node.args]
    given += [node.kwargs[k] for k in ("input", "other") if k in node.kwargs]
    first, second, *_ = [*given, None, None]
    return first, second


def is_tensor_node(net: Net, value: object) -> bool:
    """Whether an argument is a tensor that depends on the graph's input."""
    if not isinstance(value, fx.Node) or value.op == "get_attr":
        return False
    return not value.meta.get("number") and not value.meta.get("container")


def read_join(net: Net, node: fx.Node) -> tuple[tuple[fx.Node, float], ...] | Refusal | None:
    """The two tensors that a node adds, with their factors; None if it adds no two tensors."""
    if node.op not in ("call_function", "call_method"):
        return None
    if ARITHMETIC.get(node.target) not in (torch.add, torch.sub):
        return None
    if not all(is_tensor_node(net, x) for x in _two_operands(node)):
        return None
    terms = operands(node)
    if isinstance(terms, Refusal):
        return terms.at(node.name)
    return tuple((x, c) for x, c in terms if isinstance(x, fx.Node))


def input_of(node: fx.Node) -> fx.Node | None:
    """The one tensor a node reads (constants of the model aside), None if there are several."""
    inputs = [n for n in node.all_input_nodes if n.op != "get_attr" and not n.meta.get("number")]
    return inputs[0] if len(inputs) == 1 else None


def _describe(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))
