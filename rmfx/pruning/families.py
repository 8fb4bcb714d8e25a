"""Families of filters that may go, and what a network costs without some of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmfx.algebra.affine import TRANSPOSED
from rmfx.algebra.laws import common_block
from rmfx.analysis.channel_labels import Channels
from rmfx.analysis.labels import FIXED, Labelled, Table
from rmfx.ir.net import Net
from rmfx.ir.notes import positions, shape_of
from rmfx.options import is_named, patterns_of

from .slicing import filters, inputs_read


@dataclass(frozen=True, eq=False)
class Family:
    """Filters that may go one by one; the same layers make each of them.

    Attributes:
        layers: paths of those layers, in order.
        members: places among `Widths.roots`.
    """

    layers: tuple[str, ...]
    members: Tensor


@dataclass(frozen=True)
class Size:
    """Channels that a layer reads and gives, and its groups."""

    ins: int
    outs: int
    groups: int

    @property
    def weights(self) -> int:
        """Weights for each tap of the kernel."""
        return self.ins * self.outs // max(self.groups, 1)


@dataclass(frozen=True, eq=False)
class Part:
    """Something that costs less when channels go: a layer, or numbers per channel.

    Attributes:
        node: that calls or holds it.
        module: of a layer; None for numbers per channel.
        ins: places of its inputs' labels among `Widths.roots`; those that stay are at the end.
        outs: the same of its outputs.
        carries: as in `Labelled`.
        taps: of the kernel; 0 for numbers per channel.
        positions: at which the layer is computed.
        rows: parameters for each output, beside the weights.
    """

    node: fx.Node
    module: nn.Module | None
    ins: Tensor
    outs: Tensor
    carries: Tensor
    taps: int
    positions: int
    rows: int

    def size(self, kept: Tensor) -> Size:
        """What is left; kept: (labels + 1,) booleans, the last one true."""
        ins, outs = kept[self.ins], kept[self.outs]
        groups = 1 if self.carries.numel() == 1 else _groups_left(self.carries, ins, outs)
        return Size(int(ins.sum()), int(outs.sum()), groups)


Meter = Callable[[Part, Size], float]


class Widths:
    """The labels of a net that may go, in families, and what is cut with them.

    Args:
        net: whose shapes are known.
        channels: of the net.
        protect: patterns of the paths of layers whose outputs stay.

    Attributes:
        channels: as given.
        roots: the labels that may go, in order.
        families: each label is in one of them.
        parts: layers and tables.
        together: places of labels of which one at least must stay, so that no layer is empty.
    """

    def __init__(self, net: Net, channels: Channels, protect: str | Sequence[str] = ()) -> None:
        self.channels = channels
        layers = (str(n.target) for n in net.graph.nodes if n.op == "call_module")
        protect = patterns_of("protect", protect, layers)
        makers: dict[int, list[str]] = defaultdict(list)
        stay = {FIXED}
        for name, ids in _makers(channels):
            labels = channels.roots(ids).unique().tolist()
            for label in labels:
                makers[label].append(name)
            if is_named(name, protect):
                stay.update(labels)
        free = sorted(label for label in makers if label not in stay)
        self.roots = torch.tensor(free, dtype=torch.int64)
        self._places = torch.full((channels.count,), len(free))
        self._places[self.roots] = torch.arange(len(free))
        families: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for place, label in enumerate(free):
            families[tuple(makers[label])].append(place)
        self.families = tuple(Family(n, torch.tensor(m)) for n, m in families.items())
        self.parts = [self._layer(layer) for layer in channels.layers]
        self.parts += [self._table(net, table) for table in channels.tables]
        sides = [side for part in self.parts for side in (part.ins, part.outs)]
        sides += [self.places(place.parts[1]) for place in channels.cuts if not place.adds]
        self.together = [s.unique() for s in sides if bool((s < len(free)).all())]

    def places(self, ids: Tensor) -> Tensor:
        """Where labels stand among `roots`; those that stay come after the last."""
        return self._places[self.channels.roots(ids)]

    def cost(self, keep: Tensor, meter: Meter, parts: Iterable[Part] | None = None) -> float:
        """What the net, or some parts of it, costs where only some labels stay.

        Args:
            keep: (labels,) booleans.
        """
        kept = torch.cat((keep, keep.new_ones(1)))
        chosen = self.parts if parts is None else parts
        return sum(meter(part, part.size(kept)) for part in chosen)

    @cached_property
    def parts_of(self) -> dict[Family, list[Part]]:
        """The parts that each family's filters belong to."""
        found: dict[Family, list[Part]] = {family: [] for family in self.families}
        owners: list[Family | None] = [None] * (len(self.roots) + 1)
        for family in self.families:
            for member in family.members.tolist():
                owners[member] = family
        for part in self.parts:
            places = torch.cat((part.ins, part.outs)).unique().tolist()
            for owner in dict.fromkeys(owners[place] for place in places):
                if owner is not None:
                    found[owner].append(part)
        return found

    @cached_property
    def beside(self) -> dict[Family, list[Family]]:
        """For each family those that share a part with it, itself among them."""
        owners: dict[Part, list[Family]] = defaultdict(list)
        for family, parts in self.parts_of.items():
            for part in parts:
                owners[part].append(family)
        return {
            family: list(dict.fromkeys(f for part in parts for f in owners[part])) or [family]
            for family, parts in self.parts_of.items()
        }

    def everything(self) -> Tensor:
        """All labels stay: (labels,) booleans."""
        return torch.ones(len(self.roots), dtype=torch.bool)

    def used(self) -> Tensor:
        """Labels of which some layer reads a channel with weights that are not 0: (labels,)."""
        end = len(self.roots)
        found = torch.zeros(end + 1, dtype=torch.bool)
        found[end] = True
        before = -1
        while before != int(found.sum()):
            before = int(found.sum())
            for layer, part in reversed(list(zip(self.channels.layers, self.parts, strict=False))):
                weight, groups = filters(layer.module), layer.carries.numel()
                read = inputs_read(weight, groups, found[part.outs]) & layer.mixes
                found[part.ins[read]] = True
        return found[:end]

    def _layer(self, layer: Labelled) -> Part:
        weight: Any = layer.module.weight
        where = layer.node.all_input_nodes[0] if type(layer.module) in TRANSPOSED else layer.node
        return Part(
            layer.node,
            layer.module,
            self.places(layer.ins),
            self.places(layer.outs),
            layer.carries,
            taps=math.prod(weight.shape[2:]),
            positions=positions(shape_of(where), weight.dim() - 2) or 0,
            rows=0 if layer.module.bias is None else 1,
        )

    def _table(self, net: Net, table: Table) -> Part:
        places, alone = self.places(table.ids), torch.zeros(1, dtype=torch.bool)
        module = net.module(table.node)
        rows = 0 if module is None else sum(p.dim() > 0 for p in module.parameters())
        return Part(table.node, None, places, places, alone, taps=0, positions=0, rows=rows)


def _makers(channels: Channels) -> list[tuple[str, Tensor]]:
    """What makes labels, in order: linear layers, and paddings of channels."""
    layers = [(str(layer.node.target), layer.outs) for layer in channels.layers]
    return layers + [(c.node.name, part) for c in channels.cuts if c.adds for part in c.parts]


def _groups_left(carries: Tensor, ins: Tensor, outs: Tensor) -> int:
    """Groups of a grouped layer when some channels have gone; it may have to become dense."""
    ins, outs = ins.reshape(carries.numel(), -1), outs.reshape(carries.numel(), -1)
    if not bool(carries.any()):
        return int(ins.any(1).sum())
    runs: list[tuple[tuple[int, int], int]] = []
    for carry, run in groupby(range(carries.numel()), lambda i: bool(carries[i])):
        own = list(run)
        total, made = int(ins[own].sum()), int(outs[own].sum())
        if bool(total) != bool(made):
            return 1  # what it reads is there for others, or what it gives is a number
        groups = total if carry else int(ins[own].any(1).sum())
        if groups:
            runs.append(((total // groups, made // groups), groups))
    block = common_block([own for own, _ in runs])
    if block and all(groups % (block[0] // own[0]) == 0 for own, groups in runs):
        return sum(groups * own[0] for own, groups in runs) // block[0]
    return 1


# ---- meters -------------------------------------------------------------------------------------
def multiply_adds(part: Part, size: Size) -> float:
    """Multiply-adds of a part that has so many channels."""
    return float(part.taps * part.positions * size.weights)


def parameters(part: Part, size: Size) -> float:
    """Parameters of a part that has so many channels."""
    return float(part.taps * size.weights + part.rows * size.outs)
