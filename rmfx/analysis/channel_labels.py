"""Channels that go together.

Every value of a graph has one label for each of its channels. A linear layer gives its outputs new
labels; whatever works channel by channel hands labels on; where two values meet channel by channel,
in a sum, a product or a gate, their labels are joined. Labels that reach something which needs its
channels as they are (the output, layer norm, attention) are fixed. All other labels are free: if
all channels of one label go, every layer still fits its neighbours.

In relu(conv2(relu(conv1(x))) + shortcut(x)) each output of conv1 is a label of its own, and output
i of conv2 and output i of the shortcut are one.

The groups of a grouped convolution stay alike. Either a group goes as a whole, with all that it
reads and gives, so that a depthwise convolution's channels are those of its input; or, where the
groups are wider than they are many, all lose the same place at once. But the channels of a group
that works channel by channel (a carry) go one by one, and the layer is laid out anew when some go.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rmfx.algebra.activation import is_activation
from rmfx.algebra.affine import MULTIPLYING, TRANSPOSED
from rmfx.ir.callees import is_touched
from rmfx.ir.functions import torch_name
from rmfx.ir.kinds import BATCH_NORMS, ELEMENTWISE, NO_OPS, SPATIAL, is_a
from rmfx.ir.net import Net
from rmfx.ir.nodes import MEANS, slice_by_slice
from rmfx.ir.reasons import reason_for
from rmfx.modules.activations import OWN_ACTIVATIONS
from rmfx.modules.factors import Elementwise

FIXED = 0
PAD_ARGUMENTS = ("pad", "mode", "value")
PER_CHANNEL = (*BATCH_NORMS, nn.PReLU, *OWN_ACTIVATIONS)
UNARY = ("contiguous", "clone", "detach", "float", "double")


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels of a value's channels.

    Attributes:
        ids: (channels,) integers.
        axis: the dimension that holds the channels, counted from the front.
    """

    ids: Tensor
    axis: int


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer; `ins` and `outs` are the labels of what it reads and gives.

    Attributes:
        node: that calls it.
        module: what it calls.
        ins: (in_channels,) labels.
        outs: (out_channels,) labels.
        carries: (groups,) which groups work channel by channel, with `ins` as `outs`.
        by_place: whether the other groups, if there are several, lose places instead of going.
    """

    node: fx.Node
    module: nn.Module
    ins: Tensor
    outs: Tensor
    carries: Tensor
    by_place: bool

    @property
    def mixes(self) -> Tensor:
        """Which inputs it mixes with others, so that they can go and it stays: (in,) booleans."""
        mixed = ~self.carries
        if int(mixed.sum()) > 1 and not self.by_place:
            mixed = torch.zeros_like(mixed)
        return mixed.repeat_interleave(self.ins.numel() // mixed.numel())


@dataclass(frozen=True, eq=False)
class Table:
    """Numbers per channel: the parameters of a channelwise module, or a constant (axis, name)."""

    node: fx.Node
    ids: Tensor
    axis: int = 0


@dataclass(frozen=True, eq=False)
class Cut:
    """A node that says where channels begin and end: a slice or a padding of channels.

    Attributes:
        node: the node.
        ids: labels of the value that it reads.
        axis: that holds the channels.
        parts: labels of what a slice leaves out before, takes and leaves out behind, or of what a
            padding adds before and behind.
    """

    node: fx.Node
    ids: Tensor
    axis: int
    parts: tuple[Tensor, ...]

    @property
    def adds(self) -> bool:
        """Whether it pads."""
        return self.node.target is F.pad


class _Union:
    """Labels that have been joined."""

    def __init__(self) -> None:
        self._parents = [FIXED]

    def new(self, count: int) -> Tensor:
        start = len(self._parents)
        self._parents.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def find(self, label: int) -> int:
        parents = self._parents
        while parents[label] != label:
            parents[label] = parents[parents[label]]
            label = parents[label]
        return label

    def join(self, first: Tensor, second: Tensor) -> None:
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            low, high = sorted((self.find(a), self.find(b)))
            self._parents[high] = low  # FIXED stays its own root

    def fix(self, labels: Tensor) -> None:
        self.join(labels, torch.full_like(labels, FIXED))

    def roots(self) -> Tensor:
        """What each label was joined to."""
        return torch.tensor([self.find(i) for i in range(len(self._parents))])


class Channels:
    """The labels of every value of a net without dead code, whose shapes are known.

    Attributes:
        layers: linear layers whose inputs or outputs may go, in order.
        tables: what holds numbers per channel.
        cuts: what names places of channels.
        values: node -> its labels, where its channels may go.
        holders: operations whose inputs keep their channels, in order, and why.
    """

    def __init__(self, net: Net) -> None:
        self._net = net
        self._union = _Union()
        self._constants: dict[str, Table] = {}
        self._uses = Counter(n.target for n in net.graph.nodes if n.op == "get_attr")
        self.layers: list[Layer] = []
        self.tables: list[Table] = []
        self.cuts: list[Cut] = []
        self.values: dict[fx.Node, Labels] = {}
        self.holders: dict[fx.Node, str] = {}
        for node in net.graph.nodes:
            found = self._labels(node)
            if found is not None:
                self.values[node] = found
        self.tables += self._constants.values()
        self._roots = self._union.roots()

    def roots(self, ids: Tensor) -> Tensor:
        """What labels were joined to, `FIXED` for those that cannot go."""
        return self._roots[ids]

    @property
    def count(self) -> int:
        """Labels that there are, joined or not."""
        return self._roots.numel()

    # ---- node by node -----------------------------------------------------------------------

    def _labels(self, node: fx.Node) -> Labels | None:
        if node.op in ("placeholder", "get_attr"):
            return None
        if node.meta.get("number"):
            self._read_size(node)
            return None
        found = None
        if not node.meta.get("frozen") and node.op != "output":
            found = self._module(node) if node.op == "call_module" else self._function(node)
        if found is None:
            self._fix(node)
        return found

    def _fix(self, node: fx.Node) -> None:
        """Nothing that a node reads may change."""
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                table = self._constants.pop(str(source.target), None)
                if table is not None:
                    self._union.fix(table.ids)
            value = self.values.get(source)
            if value is not None:
                self._union.fix(value.ids)
                if node.op != "output":
                    refusal = self._net.guard(node)
                    self.holders[node] = refusal.reason if refusal else reason_for(self._net, node)

    def _read_size(self, node: fx.Node) -> None:
        """A size in a dimension other than that of the channels may be read."""
        for source in node.all_input_nodes:
            value = self.values.get(source)
            if value is not None and not _leaves_alone(node, value.axis, len(_shape(source))):
                self._union.fix(value.ids)

    def _module(self, node: fx.Node) -> Labels | None:
        net, source = self._net, _only_tensor(node)
        module: Any = net.module(node)
        if module is None or net.guard(node) or is_touched(module):
            return None
        if is_a(module, Elementwise):
            return self._elementwise(node)
        if source is None:
            return None
        if type(module) in MULTIPLYING:
            return self._linear(node, module, source)
        value = self.values.get(source)
        if value is None:
            return None
        if type(module) is nn.Flatten:
            shape = tuple(
                None if net.is_open(source, dim) else size
                for dim, size in enumerate(_shape(source))
            )
            return _flattened(value, module, shape)
        if type(module) in PER_CHANNEL:
            return self._per_channel(node, module, value, len(_shape(source)))
        if type(module) in SPATIAL:
            dims = int(type(module).__name__[-2])
            return value if (value.axis, len(_shape(source))) == (1, dims + 2) else None
        if is_a(module, nn.Upsample):
            return value if value.axis == 1 else None
        same = is_a(module, NO_OPS)
        return value if same or is_activation(module) else None

    def _per_channel(
        self, node: fx.Node, module: nn.Module, value: Labels, rank: int
    ) -> Labels | None:
        """Behind a module with numbers for each channel, or one for all."""
        sizes = {t.numel() for t in (*module.parameters(), *module.buffers()) if t.dim()}
        several = sizes - {1}
        if not several and type(module) not in BATCH_NORMS:
            return value
        if value.axis != _axis_of(module, rank) or several - {value.ids.numel()}:
            return None
        if several:
            self.tables.append(Table(node, value.ids))
        return value

    def _linear(self, node: fx.Node, module: Any, source: fx.Node) -> Labels | None:
        rank = len(_shape(source))
        axis = rank - 1 if isinstance(module, nn.Linear) else 1
        dims = module.weight.dim() - 2
        if dims and rank != dims + 2:
            return None
        value = self.values.get(source)
        if value is not None and value.axis != axis:
            self._union.fix(value.ids)
            value = None
        n_in = module.in_features if isinstance(module, nn.Linear) else module.in_channels
        n_out = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        ins = torch.full((n_in,), FIXED) if value is None else value.ids
        groups = getattr(module, "groups", 1)
        carries = _carries(module) if groups > 1 else torch.zeros(1, dtype=torch.bool)
        by_place = n_in // groups >= groups - int(carries.sum())
        outs = self._outputs(ins.view(groups, -1), n_out // groups, carries, by_place=by_place)
        self.layers.append(Layer(node, module, ins, outs, carries, by_place))
        return Labels(outs, axis)

    def _outputs(self, ins: Tensor, n_out: int, carries: Tensor, *, by_place: bool) -> Tensor:
        """Labels of what a layer gives; ins: (groups, inputs of a group)."""
        own = ins[~carries]
        outs = ins.clone() if bool(carries.any()) else ins.new_empty(len(ins), n_out)
        if by_place:
            self._union.join(own.flatten(), own[:1].expand_as(own).flatten())
            outs[~carries] = self._union.new(n_out)
        else:
            self._union.join(own.flatten(), own[:, :1].expand_as(own).flatten())
            outs[~carries] = own[:, :1].expand(-1, n_out)
        return outs.flatten()

    def _function(self, node: fx.Node) -> Labels | None:
        target = node.target
        if target in ELEMENTWISE.values():
            return self._elementwise(node)
        if target is torch.cat:
            return self._concatenation(node)
        source = _only_tensor(node)
        if source is None:
            return None
        value = self.values.get(source)
        if value is None:
            return None
        name = torch_name(node).removeprefix("unsafe_").partition(".")[0]
        if target in UNARY:
            return value
        if target is F.interpolate:
            return value if value.axis == 1 else None
        if target in MEANS or name in ("amax", "sum"):
            return _reduced(node, value, len(_shape(source)))
        if target is operator.getitem:
            return self._slice(node, value, len(_shape(source)))
        if target is F.pad:
            return self._padding(node, value, len(_shape(source)))
        if name in ("permute", "transpose"):
            return _moved(node, name, value, len(_shape(source)))
        return None

    # ---- values that meet -------------------------------------------------------------------

    def _elementwise(self, node: fx.Node) -> Labels | None:
        rank = len(_shape(node))
        tensors = [n for n in node.all_input_nodes if not n.meta.get("number")]
        places = {v.axis - len(_shape(n)) for n in tensors if (v := self.values.get(n)) is not None}
        if len(places) != 1:
            return None
        place = places.pop()
        total = _shape(node)[place]
        ids: list[Tensor] = []
        for source in tensors:
            value = self.values.get(source)
            shape = self._shape_of(source)
            if shape is None or (value is None and len(shape) >= -place and shape[place] == total):
                if source.op != "get_attr" or shape is None:
                    return None
                value = self._constant(source, len(shape) + place) if total != 1 else None
                if value is None and total != 1:
                    return None
            if value is None:
                continue
            if value.ids.numel() != total:
                self._union.fix(value.ids)  # one channel beside many
                continue
            ids.append(value.ids)
        if not ids:
            return None
        for other in ids[1:]:
            self._union.join(ids[0], other)
        return Labels(ids[0], rank + place)

    def _shape_of(self, node: fx.Node) -> tuple[Any, ...] | None:
        if node.op == "get_attr":
            value = self._net.attribute(node)
            return tuple(value.shape) if isinstance(value, Tensor) else None
        return node.meta.get("shape")

    def _constant(self, node: fx.Node, axis: int) -> Labels | None:
        """Labels of a constant with one number per channel, the same wherever it is read."""
        if self._uses[node.target] > 1 or len(node.users) > 1:
            return None
        value: Any = self._net.attribute(node)
        table = Table(node, self._union.new(value.shape[axis]), axis)
        self._constants[str(node.target)] = table
        return Labels(table.ids, axis)

    def _concatenation(self, node: fx.Node) -> Labels | None:
        tensors: Any
        dim: Any
        tensors, dim = node.args
        if not isinstance(tensors, (list, tuple)) or not isinstance(dim, int):
            return None
        dim %= len(_shape(node))
        values = [self.values.get(n) if isinstance(n, fx.Node) else None for n in tensors]
        known = [v for v in values if v is not None]
        axes = {v.axis for v in known}
        if len(axes) != 1:
            return None
        axis = axes.pop()
        if axis != dim:
            if len(known) < len(values):
                return None
            for value in known[1:]:
                self._union.join(known[0].ids, value.ids)
            return known[0]
        shapes = [self._shape_of(n) for n in tensors]
        if any(shape is None or shape[dim] is None for shape in shapes):
            return None
        parts = [
            torch.full((shape[dim],), FIXED) if value is None else value.ids
            for shape, value in zip(shapes, values, strict=True)
            if shape is not None
        ]
        return Labels(torch.cat(parts), dim)

    # ---- parts of values --------------------------------------------------------------------

    def _slice(self, node: fx.Node, value: Labels, rank: int) -> Labels | None:
        index = node.args[1]
        parts = index if isinstance(index, tuple) else (index,)
        if sum(i is ... for i in parts) > 1 or not all(
            isinstance(i, (slice, type(...))) for i in parts
        ):
            return None
        whole = slice_by_slice(parts, rank)
        own = whole[value.axis]
        if own == slice(None):
            return value
        bounds = (own.start, own.stop, own.step)
        if not all(isinstance(i, int | None) for i in bounds) or own.step not in (None, 1):
            return None
        start, stop, _ = own.indices(value.ids.numel())
        if stop <= start:
            return None
        parts = value.ids.tensor_split((start, stop))
        self.cuts.append(Cut(node, value.ids, value.axis, parts))
        return Labels(parts[1], value.axis)

    def _padding(self, node: fx.Node, value: Labels, rank: int) -> Labels | None:
        given = dict(zip(PAD_ARGUMENTS, node.args[1:], strict=False)) | node.kwargs
        amounts = given.get("pad")
        if not isinstance(amounts, (list, tuple)):
            return None
        place = 2 * (rank - 1 - value.axis)
        before, after = (*amounts, *[0] * 2 * rank)[place : place + 2]
        if not isinstance(before, int) or not isinstance(after, int) or min(before, after) < 0:
            return None
        if before == after == 0:
            return value
        if given.get("mode", "constant") != "constant":
            return None
        parts = (self._union.new(before), self._union.new(after))
        self.cuts.append(Cut(node, value.ids, value.axis, parts))
        return Labels(torch.cat((parts[0], value.ids, parts[1])), value.axis)


# ---- questions about nodes ----------------------------------------------------------------------
def _shape(node: fx.Node) -> tuple[Any, ...]:
    shape: tuple[Any, ...] = node.meta["shape"]
    return shape


def _only_tensor(node: fx.Node) -> fx.Node | None:
    """The one value that a node reads, if both are tensors and it is the first argument."""
    sources = [n for n in node.all_input_nodes if not n.meta.get("number")]
    if len(sources) != 1 or not node.args or node.args[0] is not sources[0]:
        return None
    return sources[0] if "shape" in sources[0].meta and "shape" in node.meta else None


def _leaves_alone(node: fx.Node, axis: int, rank: int) -> bool:
    """Whether a node that reads sizes leaves one dimension's size alone."""
    if node.op == "call_method" and node.target in ("dim", "ndimension"):
        return True
    if node.target is getattr and node.args[1] in ("ndim", "dtype", "device"):
        return True
    by_name = torch_name(node)
    if by_name.startswith(("size", "sym_size")) and len(node.args) == 2:
        return _is_other(node.args[1], axis, rank)
    whole = by_name == "size" or bool(node.target is getattr and node.args[1] == "shape")
    return whole and all(
        user.target is operator.getitem and _is_other(user.args[1], axis, rank)
        for user in node.users
    )


def _is_other(place: Any, axis: int, rank: int) -> bool:
    """Whether an index is known to be that of another dimension."""
    return isinstance(place, int) and place % rank != axis


def _axis_of(module: nn.Module, rank: int) -> int:
    """The dimension to which a module's numbers per channel belong."""
    own = next(iter((*module.parameters(), *module.buffers())), None)
    if isinstance(module, OWN_ACTIVATIONS) and own is not None:
        return rank - own.dim()
    return 1


def _carries(module: Any) -> Tensor:
    """Which groups of a convolution work channel by channel: (groups,) booleans."""
    weight = module.weight.detach()
    groups, n_out = module.groups, weight.shape[0] // module.groups
    n_in = weight.shape[1]
    if isinstance(module, TRANSPOSED) or n_in != n_out or n_in == 1:
        return torch.zeros(groups, dtype=torch.bool)
    reads = (weight != 0).reshape(groups, n_out, n_in, -1).any(3)
    others = reads & ~torch.eye(n_in, dtype=torch.bool, device=weight.device)
    mixed: Tensor = others.flatten(1).any(1).cpu()
    return ~mixed


def _flattened(value: Labels, module: nn.Flatten, shape: Sequence[int | None]) -> Labels | None:
    start, end = module.start_dim % len(shape), module.end_dim % len(shape)
    if value.axis < start:
        return value
    if value.axis > end:
        return Labels(value.ids, value.axis - (end - start))
    inner = [size for size in shape[start + 1 : end + 1] if size is not None]
    if value.axis != start or len(inner) < end - start:
        return None
    return Labels(value.ids.repeat_interleave(math.prod(inner)), start)


def _reduced(node: fx.Node, value: Labels, rank: int) -> Labels | None:
    """Behind a mean, a sum or a maximum over other dimensions."""
    if set(node.kwargs) - {"dim", "keepdim"} or len(node.args) > 3:
        return None
    axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    axes = (axes,) if isinstance(axes, int) else axes
    kept = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    if not isinstance(axes, (list, tuple)) or not axes or kept not in (True, False):
        return None
    gone = {int(i) % rank for i in axes if isinstance(i, int)}
    if len(gone) != len(axes) or value.axis in gone:
        return None
    return value if kept else Labels(value.ids, value.axis - sum(i < value.axis for i in gone))


def _moved(node: fx.Node, name: str, value: Labels, rank: int) -> Labels | None:
    """Behind a permutation of dimensions."""
    dims: Any = node.args[1:]
    dims = dims[0] if len(dims) == 1 else dims
    if node.kwargs or not isinstance(dims, (list, tuple)):
        return None
    if not all(isinstance(i, int) for i in dims):
        return None
    order = [i % rank for i in dims]
    if name == "transpose":
        a, b = order
        order = list(range(rank))
        order[a], order[b] = b, a
    return Labels(value.ids, order.index(value.axis))
