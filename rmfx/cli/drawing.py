"""Drawings of graphs, stage by stage: boxes and lines with places.

igraph places the nodes (Sugiyama's layout of layers).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from rmfx.cost.counting import NodeCost
from rmfx.ir.notes import shape_of
from rmfx.table import short

HEIGHT, DOWN = 24, 34  # of a box, and from box to box; a finger hits 24 px
LETTER = 7  # how wide letters of 12 px are on average, in a wide font
PADDING, GAP, MARGIN = 16, 8, 8  # in a box, between two, and around all
Passage = tuple[str, int]  # "from" or "to", and the number of a stage, counted from 0


@dataclass(frozen=True)
class Box:
    """A node of a drawing, or another stage that it exchanges values with.

    Attributes:
        stage: number of that stage, counted from 1.
    """

    label: str
    detail: str
    kind: str
    stage: int | None = None
    x: float = 0
    y: float = 0


@dataclass(frozen=True)
class Line:
    """An edge of a drawing, as "x,y x,y"; whether it is a skip."""

    points: str
    skip: bool


@dataclass(frozen=True)
class Drawing:
    """A stage with places; all its boxes have the same size."""

    width: int
    height: int
    size: tuple[int, int]  # of a box
    boxes: list[Box]
    lines: list[Line]


def channels_of(node: fx.Node) -> int | None:
    """How many channels a node's value has, None where that is not known."""
    shape = shape_of(node)
    if shape is None or len(shape) < 2:
        return None
    found = shape[1] if len(shape) > 3 else shape[-1]
    return found if isinstance(found, int) else None


def is_addition(node: fx.Node) -> bool:
    """Whether a node adds or subtracts two values."""
    name = str(getattr(node.target, "__name__", node.target))
    added = node.op != "call_module" and name.strip("_") in ("add", "iadd", "sub", "isub")
    return added and len(node.all_input_nodes) == 2


def draw(
    parts: Sequence[Sequence[fx.Node]],
    costs: Mapping[str, NodeCost],
    own: Mapping[str, int | None],
) -> list[Drawing | None]:
    """A drawing of each stage, None of one without nodes.

    Args:
        parts: the nodes of each stage, in the order in which they run; they know their shapes.
        costs: of the nodes, by name.
        own: how many channels nodes of these names have without a carry.
    """
    stage_of = {node: i for i, part in enumerate(parts) for node in part}
    boxes = {node: _box(node, costs.get(node.name), own.get(node.name)) for node in stage_of}
    return [_draw(i, part, stage_of, boxes) if part else None for i, part in enumerate(parts)]


def _draw(
    number: int,
    nodes: Sequence[fx.Node],
    stage_of: Mapping[fx.Node, int],
    own_boxes: Mapping[fx.Node, Box],
) -> Drawing:
    """One stage, with a box at the top and at the bottom for each stage beyond."""
    passing: dict[Passage, dict[fx.Node, None]] = {}
    edges: dict[tuple[fx.Node | Passage, fx.Node | Passage], None] = {}  # each once, in order
    for node in nodes:
        for source in node.all_input_nodes:
            stage = stage_of.get(source)
            if stage == number:
                edges[source, node] = None
            elif stage is not None:
                passing.setdefault(("from", stage), {})[source] = None
                edges[("from", stage), node] = None
        for user in node.users:
            stage = stage_of.get(user, number)
            if stage != number:
                passing.setdefault(("to", stage), {})[node] = None
                edges[node, ("to", stage)] = None
    ends = {key: _passage(key, list(passing[key])) for key in sorted(passing)}
    top, bottom = ([key for key in ends if key[0] == way] for way in ("from", "to"))
    keys: list[fx.Node | Passage] = [*top, *nodes, *bottom]
    number_of = {key: i for i, key in enumerate(keys)}
    pairs = [(number_of[a], number_of[b]) for a, b in edges]
    boxes = [ends[key] if isinstance(key, tuple) else own_boxes[key] for key in keys]
    return _placed(boxes, pairs, bottom=range(len(keys) - len(bottom), len(keys)))


def _placed(boxes: Sequence[Box], edges: Sequence[tuple[int, int]], bottom: range) -> Drawing:
    """Boxes and lines with places.

    Args:
        boxes: in an order in which no edge leads back.
        edges: from box to box.
        bottom: the boxes that stand below all others.
    """
    levels = _levels(len(boxes), edges, bottom)
    box = max(len(one.label) for one in boxes) * LETTER + PADDING
    number_of = {(i, level): i for i, level in enumerate(levels)}
    paths = []
    for a, b in edges:
        between = range(levels[a] + 1, levels[b])  # long edges from one box have bends in common
        bends = [number_of.setdefault((a, level), len(number_of)) for level in between]
        paths.append([a, *bends, b])
    places = _places([level for _, level in number_of], paths, box + GAP)
    lines = [
        Line(
            _polyline([places[i] for i in path], box),
            skip=boxes[b].kind == "add" and levels[b] - levels[a] > 1,  # jumps over others
        )
        for (a, b), path in zip(edges, paths, strict=True)
    ]
    width = max(x for x, _ in places) + box + MARGIN
    height = max(y for _, y in places) + HEIGHT + MARGIN
    placed = [replace(one, x=places[i][0], y=places[i][1]) for i, one in enumerate(boxes)]
    return Drawing(math.ceil(width), math.ceil(height), (box, HEIGHT), placed, lines)


def _levels(count: int, edges: Sequence[tuple[int, int]], bottom: range) -> list[int]:
    """How far down each box stands: one further than the lowest it reads."""
    levels = [0] * count
    for a, b in sorted(edges, key=lambda edge: edge[1]):
        levels[b] = max(levels[b], levels[a] + 1)
    lowest = max((levels[i] for i in range(count) if i not in bottom), default=0)
    return [lowest + 1 if i in bottom else level for i, level in enumerate(levels)]


def _places(levels: list[int], paths: list[list[int]], across: int) -> list[tuple[float, float]]:
    """Where each vertex stands, those on long edges included."""
    import igraph

    pairs = dict.fromkeys(pair for path in paths for pair in itertools.pairwise(path))
    graph = igraph.Graph(n=len(levels), edges=list(pairs), directed=True)
    layout = graph.layout_sugiyama(layers=levels, hgap=across, vgap=DOWN)
    places = [tuple(place) for place in layout.coords[: len(levels)]]
    left = min(x for x, _ in places)
    # The layout may leave less than the gap it was asked for.
    ends: dict[int, float] = {}
    found = list(places)
    for i in sorted(range(len(places)), key=lambda i: places[i]):
        x = max(places[i][0] - left, ends.get(levels[i], -across) + across)
        ends[levels[i]] = x
        found[i] = (x + MARGIN, places[i][1] + MARGIN)
    return found


def _polyline(places: Sequence[tuple[float, float]], box: int) -> str:
    ends = [(x + box / 2, y + HEIGHT / 2) for x, y in places]
    return " ".join(f"{x:.0f},{y:.0f}" for x, y in ends)


# ---- what boxes say -----------------------------------------------------------------------------
def _passage(passage: Passage, values: Sequence[fx.Node]) -> Box:
    way, stage = passage
    lines = [f"{way} stage {stage + 1}", *map(_value, values)]
    return Box(lines[0], "\n".join(lines), "passage", stage + 1)


def _value(node: fx.Node) -> str:
    return f"{node.name}, shape {shape_of(node, '?')}"


def _box(node: fx.Node, cost: NodeCost | None, own: int | None) -> Box:
    """The box for a node: `own` is how many channels it has without a carry."""
    what = cost.kind if cost else node.op
    kind = "add" if is_addition(node) else ""
    if node.op in ("placeholder", "output"):
        kind, what = "io", "input" if node.op == "placeholder" else "output"
    elif node.op == "call_module":
        kind = "conv" if cost and cost.macs else "act"
    channels = channels_of(node)
    width = "" if channels is None else str(channels)
    if own is not None and channels is not None and channels > own and kind != "io":
        kind, width = "carry", f"{own} + {channels - own}"
    lines = [f"{node.name} ({what})", f"shape {shape_of(node, '?')}"]
    if cost:
        lines += [f"{short(cost.macs)} multiply-adds", f"{short(cost.parameters)} parameters"]
    return Box(f"{what} {width}".strip(), "\n".join(lines), kind)
