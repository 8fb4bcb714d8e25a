"""Layers between a rearrangement and its return act on the value as it was.

    permute(0, 2, 3, 1), Linear, GELU, Linear, permute(0, 3, 1, 2)    1x1 convolutions and a GELU
    flatten(2), Conv1d of one position, view(n, c, h, w)              a 1x1 Conv2d
    transpose(2, 3), Conv2d, transpose(2, 3)                          a Conv2d of turned kernel

A layout says where the axes of a value stand (`layouts.py`). What acts on one axis, or on each
number alone, is the same map in every layout, so all of a span may stand in the one in which it
begins, without its rearrangements: where whatever reads one of its values belongs to the span, too,
reads it where it is as it was, or asks for its sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from rmfx.ir.net import Net
from rmfx.ir.nodes import is_tensor_node
from rmfx.ir.notes import gives_number, why_frozen
from rmfx.ir.numbers import size_read

from .axis_sizes import AxisSizes
from .layouts import Rows, Size, size_of, straight, whole
from .rearrangements import rearranged


@dataclass(frozen=True, eq=False)
class View:
    """A value in some layout of another one's axes.

    Attributes:
        rows: which axes its dimensions are made of.
        axes: the sizes of all axes.
        origin: the value in which the span begins.
    """

    rows: Rows
    axes: tuple[Size, ...]
    origin: fx.Node

    @property
    def is_straight(self) -> bool:
        """Whether it is the value with its axes in order."""
        return self.rows == straight(self.axes)

    def axis_of(self, dim: int, *wanted: int) -> int | None:
        """The axis of some in which a dimension holds nothing else, None if it is none of them."""
        row = self.rows[dim]
        return next((a for a in wanted if row == straight(self.axes)[a]), None)

    def resized(self, dim: int, axis: int, size: Size) -> View:
        """The same with another size of an axis, which is a dimension."""
        axes = (*self.axes[:axis], size, *self.axes[axis + 1 :])
        rows = (*self.rows[:dim], whole(axis, size), *self.rows[dim + 1 :])
        return View(rows, axes, self.origin)


@dataclass(eq=False)
class Spans:
    """What stands in which layout, found node by node.

    Attributes:
        net: whose nodes they are.
        sizes: of its values.
        views: of the values of spans.
        moved: the nodes among them that rearrange and do no more.
    """

    net: Net
    sizes: AxisSizes
    views: dict[fx.Node, View] = field(default_factory=dict)
    moved: set[fx.Node] = field(default_factory=set)

    def view(self, node: fx.Node) -> View | None:
        """The layout of a value, None if its number of dimensions is not known."""
        if node in self.views:
            return self.views[node]
        axes = self.sizes.all_of(node)
        return None if axes is None or len(axes) < 2 else View(straight(axes), axes, node)

    def note(self, node: fx.Node, view: View, *, moved: bool = False) -> None:
        """Take note of the layout of a value."""
        self.views[node] = view
        self.sizes.note(node, tuple(size_of(row) for row in view.rows))
        if moved:
            self.moved.add(node)

    def follow(self, node: fx.Node) -> bool:
        """Take note of a node that only rearranges; tells whether it does."""
        sources = [n for n in node.all_input_nodes if is_tensor_node(n)]
        x = node.args[0] if node.args else None
        if why_frozen(node) is not None or not sources or sources[0] is not x:
            return False
        if why_frozen(sources[0]) is not None:
            return False  # of what is written to later a copy is no view
        before = self.view(sources[0])
        if before is None:
            return False
        rows = rearranged(self.net, self.sizes, node, before.rows)
        if rows is None:
            return False
        self.note(node, View(rows, before.axes, before.origin), moved=True)
        return True

    # ---- which spans are whole ----------------------------------------------------------------

    def closed(self) -> set[fx.Node]:
        """The nodes of spans that can stand in the layout in which they begin."""
        found = {*self.views}
        waiting = [*found]
        while waiting:
            node = waiting.pop()
            if node in found and not self._is_within(node, found):
                found.discard(node)
                waiting += [n for n in self._values_read(node) if n in found]
                waiting += [n for n in node.users if n in found]
        return found

    def _is_within(self, node: fx.Node, found: set[fx.Node]) -> bool:
        """Whether a node can stand in another layout if the others that were found do."""
        left_out = [n for n in node.all_input_nodes if n in self.views and n not in found]
        if not all(self.views[n].is_straight for n in left_out):
            return False
        if self.views[node].is_straight:
            return True
        return all(user in found or _asks(node, user, found) for user in node.users)

    def _values_read(self, node: fx.Node) -> set[fx.Node]:
        """The values that a node reads, or of which it reads sizes."""
        found: set[fx.Node] = set()
        waiting = [*node.all_input_nodes]
        while waiting:
            read = waiting.pop()
            if read not in found:
                found.add(read)
                waiting += read.all_input_nodes if gives_number(read) else []
        return found


def _asks(value: fx.Node, user: fx.Node, found: set[fx.Node]) -> bool:
    """Whether a node asks for sizes that can be asked of the value as it was."""
    if not gives_number(user):
        return False
    of, dim = size_read(user)
    if of is value:
        return type(dim) is int
    return all(u in found or _asks(value, u, found) for u in user.users)


def sizes_asked(value: fx.Node) -> list[tuple[fx.Node, int]]:
    """The nodes that ask for a size of a value, and of which dimension."""
    found: list[tuple[fx.Node, int]] = []
    waiting = [user for user in value.users if gives_number(user)]
    while waiting:
        user = waiting.pop()
        of, dim = size_read(user)
        if of is value and isinstance(dim, int):
            found.append((user, dim))
        else:
            waiting += [u for u in user.users if gives_number(u)]
    return found
