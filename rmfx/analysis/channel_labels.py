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

import operator
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rmfx.algebra.activation import is_activation
from rmfx.algebra.affine import MULTIPLYING
from rmfx.ir.callees import is_touched
from rmfx.ir.functions import torch_name
from rmfx.ir.kinds import BATCH_NORMS, ELEMENTWISE, NO_OPS, SPATIAL, is_a
from rmfx.ir.net import Net
from rmfx.ir.nodes import MEANS
from rmfx.ir.notes import gives_number, shape_of, why_frozen
from rmfx.ir.reasons import reason_for
from rmfx.modules.activations import OWN_ACTIVATIONS
from rmfx.modules.factors import Elementwise

from .labels import (
    FIXED,
    Edges,
    Labelled,
    Labels,
    Table,
    Union,
    carries_of,
    flattened,
    leaves_alone,
    padded,
    permuted,
    reduced,
    sliced,
)

PER_CHANNEL = (*BATCH_NORMS, nn.PReLU, *OWN_ACTIVATIONS)
UNARY = ("contiguous", "clone", "detach", "float", "double")


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
        self._union = Union()
        self._constants: dict[str, Table] = {}
        self._uses = Counter(n.target for n in net.graph.nodes if n.op == "get_attr")
        self.layers: list[Labelled] = []
        self.tables: list[Table] = []
        self.cuts: list[Edges] = []
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
        if gives_number(node):
            self._read_size(node)
            return None
        found = None
        if not why_frozen(node) and node.op != "output":
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
            if value is not None and not leaves_alone(node, value.axis, len(_shape(source))):
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
            return flattened(value, module, shape)
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
        carries = carries_of(module) if groups > 1 else torch.zeros(1, dtype=torch.bool)
        by_place = n_in // groups >= groups - int(carries.sum())
        outs = self._outputs(ins.view(groups, -1), n_out // groups, carries, by_place=by_place)
        self.layers.append(Labelled(node, module, ins, outs, carries, by_place))
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
            return reduced(node, value, len(_shape(source)))
        if target is operator.getitem:
            return self._cut(sliced(node, value, len(_shape(source))))
        if target is F.pad:
            return self._cut(padded(node, value, len(_shape(source)), self._union))
        if name in ("permute", "transpose"):
            return permuted(node, name, value, len(_shape(source)))
        return None

    def _cut(self, found: Edges | Labels | None) -> Labels | None:
        """Behind a slice or a padding."""
        if not isinstance(found, Edges):
            return found
        self.cuts.append(found)
        return found.behind

    # ---- values that meet -------------------------------------------------------------------

    def _elementwise(self, node: fx.Node) -> Labels | None:
        rank = len(_shape(node))
        tensors = [n for n in node.all_input_nodes if not gives_number(n)]
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
        found: tuple[Any, ...] | None = shape_of(node)
        return found

    def _constant(self, node: fx.Node, axis: int) -> Labels | None:
        """Labels of a constant with one number per channel, the same wherever it is read."""
        if self._uses[node.target] > 1 or len(node.users) > 1 or why_frozen(node):
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


# ---- questions about nodes ----------------------------------------------------------------------
def _shape(node: fx.Node) -> tuple[Any, ...]:
    shape: tuple[Any, ...] = shape_of(node)
    return shape


def _only_tensor(node: fx.Node) -> fx.Node | None:
    """The one value that a node reads, if both are tensors and it is the first argument."""
    sources = [n for n in node.all_input_nodes if not gives_number(n)]
    if len(sources) != 1 or not node.args or node.args[0] is not sources[0]:
        return None
    return sources[0] if shape_of(sources[0]) is not None and shape_of(node) is not None else None


def _axis_of(module: nn.Module, rank: int) -> int:
    """The dimension to which a module's numbers per channel belong."""
    own = next(iter((*module.parameters(), *module.buffers())), None)
    if isinstance(module, OWN_ACTIVATIONS) and own is not None:
        return rank - own.dim()
    return 1
