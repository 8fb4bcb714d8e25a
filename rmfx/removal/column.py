"""A column of a plain chain: what every kind of it has and answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from rmfx.data.moments import Moments
from rmfx.ir.elements import Virtual
from rmfx.ir.names import module_path
from rmfx.ir.net import Net
from rmfx.ir.notes import Shape, set_shape, shape_of

from .side_tensors import Widths
from .site import Site, Step

Label = tuple[str, fx.Node]  # a module path, and the node whose name and place a new one takes


@dataclass(frozen=True, eq=False)
class Spot:
    """Where a column comes to stand in the graph.

    Attributes:
        net, site: of the column.
        source: the node before it, which holds both blocks.
        widths: their channels.
        label: of the column.
        elsewhere: nodes that hold now what nodes of the site held.
        moments: of the fork's values, None if they are not known.
    """

    net: Net
    site: Site
    source: fx.Node
    widths: Widths
    label: Label
    elsewhere: Mapping[fx.Node, fx.Node]
    moments: Moments | None


@dataclass(frozen=True, eq=False, kw_only=True)
class Column(ABC):
    """What all columns have.

    Attributes:
        steps: the layers of the site that it stands for.
        taps: nodes whose value it holds and others read, each with its block (0 or 1).
        runs: in which the two blocks take turns behind it.
    """

    steps: tuple[Step, ...] = ()
    taps: tuple[tuple[fx.Node, int], ...] = ()
    runs: int = 1

    @classmethod
    @abstractmethod
    def of(cls, layers: Sequence[Any], widths: Widths, carried: fx.Node | None) -> Column:
        """Two layers side by side.

        Args:
            layers: of main block and carry; None leaves a block as it is.
            widths: channels of both blocks, behind a layer or where there is none.
            carried: the node whose value the carry holds, None if it is not a node's value.
        """

    @staticmethod
    def price(layers: Sequence[Any]) -> float | None:
        """Of a layer beside none, or beside another one; None where that would not be exact."""
        return None

    @property
    def may_take_turns(self) -> bool:
        """Whether the blocks may take turns in what it reads and gives."""
        return True

    @property
    def taps_are_pooled(self) -> bool:
        """Whether others read its value behind pools alone, where picking channels costs little."""
        read = {value for value, _ in self.taps}
        return all(step.pooled for step in self.steps if step.value in read)

    def padded(self, before: int, behind: int) -> Column:
        """The same with more channels of the carry before and behind it."""
        return self

    def widths_behind(self, widths: Widths, dims: int) -> Widths:
        """Channels of both blocks behind it."""
        return widths

    @property
    def combination(self) -> fx.Node | None:
        """The combination with other tensors whose place it takes, if it is one."""
        return None

    def label(self, site: Site, index: int) -> Label:
        """What its node is called, as column `index` of its chain."""
        nodes = [n for step in self.steps for n in step.nodes if n.op == "call_module"]
        if nodes:
            return str(nodes[0].target), nodes[0]
        for step in self.steps:
            if step.path:
                return step.path, site.join
        place = module_path(site.join)
        role = "duplicate" if index == 0 else "merge"
        return (f"{place}.{role}" if place else f"{site.join.name}_{role}"), site.join

    def put(self, spot: Spot) -> fx.Node:
        """Its node, at the graph's insert point."""
        made = spot.net.put(self._callee(spot), spot.source, *spot.label)
        shape: Shape | None = shape_of(spot.source)
        if shape is not None:
            set_shape(made, self._shape_behind(shape))
        return made

    def _callee(self, spot: Spot) -> Virtual | nn.Module:
        raise TypeError(f"a {type(self).__name__} column is no module")

    def _shape_behind(self, shape: Shape) -> Shape:
        return shape
