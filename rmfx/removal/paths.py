"""From a join back to its fork: the paths on which a carry could travel.

Both operands are followed back, the later one first, until they meet. A node with one input has one
way back. A product, a sum that stays or a concatenation has as many as operands: the carry goes
along one of them, and meets ones, zeros or nothing from the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx

from rmfx.algebra.layer import Layer
from rmfx.errors import Refusal
from rmfx.ir.laterals import laterals
from rmfx.ir.net import Net
from rmfx.ir.nodes import input_of
from rmfx.ir.reading import read
from rmfx.ir.reasons import cause_behind

MOST_WALKS = 8  # ways that are tried for one join


@dataclass(frozen=True, eq=False)
class Passed:
    """One node on a path.

    Attributes:
        node: the node.
        element: what it computes of the value before it on the path.
        tapped: whether its value is also read off the path.
    """

    node: fx.Node
    element: Layer
    tapped: bool


Path = tuple[Passed, ...]


@dataclass(eq=False)
class _Walk:
    """Two heads on their way back, and the paths behind them, last node first."""

    heads: list[fx.Node]
    readers: list[fx.Node]
    paths: tuple[list[Passed], list[Passed]] = field(default_factory=lambda: ([], []))

    def copy(self) -> _Walk:
        return _Walk([*self.heads], [*self.readers], ([*self.paths[0]], [*self.paths[1]]))

    def step(self, side: int, element: Layer, before: fx.Node) -> None:
        node = self.heads[side]
        reads = sum(n is node for n in _arguments(self.readers[side]))
        self.paths[side].append(Passed(node, element, len(node.users) > 1 or reads > 1))
        self.heads[side], self.readers[side] = before, node


def walks(
    net: Net, join: fx.Node, a: fx.Node, b: fx.Node
) -> Iterator[tuple[fx.Node, tuple[Path, Path]] | Refusal]:
    """Ways from both operands of a join back to a common fork: the fork and a path to each."""
    waiting = [_Walk([a, b], [join, join])]
    for _ in range(MOST_WALKS):
        if not waiting:
            return
        walk = waiting.pop()
        refusal = _finish(net, walk, waiting)
        yield refusal or (walk.heads[0], (tuple(walk.paths[0][::-1]), tuple(walk.paths[1][::-1])))


def _finish(net: Net, walk: _Walk, waiting: list[_Walk]) -> Refusal | None:
    """Walk until the heads meet; ways not taken are added to those that wait."""
    while walk.heads[0] is not walk.heads[1]:
        side = 0 if walk.heads[1] < walk.heads[0] else 1
        node = walk.heads[side]
        if node.op == "placeholder":
            names = (walk.heads[0].name, walk.heads[1].name)
            return Refusal("the operands have no common source", names)
        options = laterals(net, node)
        for other in options[:0:-1]:
            turn = walk.copy()
            turn.step(side, other, other.value)
            waiting.append(turn)
        if options:
            walk.step(side, options[0], options[0].value)
            continue
        element = read(net, node)
        if isinstance(element, Refusal):
            behind = cause_behind(net, node, walk.heads[1 - side])
            return Refusal(behind[1], (behind[0].name,)) if behind else element
        before = input_of(node)
        if before is None:
            return Refusal("it reads several tensors", (node.name,))
        walk.step(side, element, before)
    return None


def _arguments(node: fx.Node) -> list[fx.Node]:
    """The nodes a node reads, with repetitions."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found
