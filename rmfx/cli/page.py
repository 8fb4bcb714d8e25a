"""A conversion as one self-contained page: what it did at every site, what it costs, both graphs.

igraph places the nodes (Sugiyama's layout of layers), matplotlib draws the bars, jinja2 fills the
page; `pip install igraph jinja2 matplotlib` brings all three.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from torch import Tensor, fx

from rmfx.conversion import Conversion
from rmfx.cost.counting import NodeCost, nodes
from rmfx.errors import RmfxError, install_command
from rmfx.files.figures import write_figure
from rmfx.frontend.tracing import trace
from rmfx.ir.conditions import nodes_of_conditions
from rmfx.ir.notes import shape_of
from rmfx.latency import LatencyReport
from rmfx.report import CARRY, GAIN, HEAD, SIZE, SiteReport, legend
from rmfx.table import Column, short

PACKAGES = ("igraph", "jinja2", "matplotlib")
WIDTH, HEIGHT = 128, 20  # of a box
ACROSS, DOWN = 144, 36  # from box to box
MARGIN = 12
COLUMNS = (
    *(*HEAD, Column("layout", "layout"), SIZE),
    *(replace(column, right=True) for column in (GAIN, CARRY)),
    Column("multiply-adds before", "macs_before", short, right=True),
    Column("after", "macs_after", short, right=True),
    Column("parameters before", "params_before", short, right=True),
    Column("after", "params_after", short, right=True),
    Column("reason", "reason"),
)


class PageError(RmfxError):
    """A page cannot be made."""


@dataclass(frozen=True)
class Box:
    """A node of a drawing."""

    x: float
    y: float
    label: str
    detail: str
    kind: str
    width: int = WIDTH
    height: int = HEIGHT


@dataclass(frozen=True)
class Line:
    """An edge of a drawing, as "x,y x,y"; whether it is a skip."""

    points: str
    skip: bool


@dataclass(frozen=True)
class Drawing:
    """A graph with places."""

    width: int
    height: int
    boxes: list[Box]
    lines: list[Line]


def check_packages() -> None:
    """Find out, before a long conversion, whether a page can be made.

    Raises:
        PageError: packages are missing.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise PageError(f"a page needs {', '.join(missing)}: {install_command(missing)}")


def page(
    conversion: Conversion,
    inputs: tuple[Tensor, ...],
    title: str,
    latency: LatencyReport | None = None,
) -> str:
    """The page, as HTML.

    Args:
        conversion: both forms of a network.
        inputs: example inputs, which give the shapes.
        title: how the page calls the network.
        latency: measurements to be shown, too.

    Raises:
        PageError: packages are missing.
    """
    check_packages()
    import jinja2

    graphs = [trace(gm, inputs) for gm in (conversion.before, conversion.after)]  # with shapes
    costs = [{row.node: row for row in nodes(gm, inputs)} for gm in graphs]
    own = {node.name: _channels(node) for node in graphs[0].graph.nodes}
    drawings = [
        ("before", draw(graphs[0], costs[0], {})),
        ("after", draw(graphs[1], costs[1], own)),
    ]
    figures = [
        (title, short(before), short(after), f"{after / before:.2f}x" if before else "")
        for title, before, after in conversion.costs
    ]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = resources.files("rmfx.cli").joinpath("templates/report.html")
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        title=title,
        summary=_summary(conversion),
        figures=figures,
        bars=_bars(figures, latency),
        notes=_notes(latency),
        drawings=drawings,
        columns=[column.title for column in COLUMNS],
        legend=legend(conversion.report.rows),
        rows=[{"cells": _cells(row)} for row in conversion.report.rows],
        version=importlib.metadata.version("rmfx"),
    )


# ---- numbers ------------------------------------------------------------------------------------
def _summary(conversion: Conversion) -> str:
    report = conversion.report
    if not report.rows:
        return "This network adds no two tensors: there is no residual connection to remove."
    count = len(report.rows) - report.other
    parts = [f"{report.removed} of {count} residual connections are removed"]
    if report.refused:
        parts.append(f"{report.refused} cannot be removed exactly")
    if report.kept:
        parts.append(f"{report.kept} are kept by choice")
    if report.other:
        parts.append(f"{report.other} additions are no residual connections")
    return f"{', '.join(parts)}. Both forms compute the same; batch norm is folded in both."


def _notes(latency: LatencyReport | None) -> list[str]:
    if latency is None:
        return []
    machine = "; ".join(f"{name} {value}" for name, value in latency.machine.items())
    return [*latency.notes, f"Latency: medians of ratios, with quartiles. {machine}."]


def _bars(figures: Sequence[tuple[str, str, str, str]], latency: LatencyReport | None) -> str:
    """Ratios after/before as bars, with a line at 1; SVG."""
    from matplotlib.figure import Figure

    bars = [(name, float(r[:-1]), 0.0, 0.0) for name, _, _, r in figures if r and name != "adds"]
    for row in latency.rows if latency else ():
        if not row.failure:
            median, low, high = row.ratio
            name = f"latency, {row.runtime}, batch {row.batch}"
            bars.append((name, median, median - low, high - median))
    if not bars:
        return ""
    figure = Figure(figsize=(8.0, 0.6 + 0.36 * len(bars)), layout="constrained")
    axes = figure.subplots()
    names, values, below, above = zip(*reversed(bars), strict=True)
    made = axes.barh(names, values, color="#6b8fc9")
    if any(above):
        axes.errorbar(values, names, xerr=[below, above], fmt="none", ecolor="black", capsize=3)
    axes.bar_label(made, fmt="%.2f", padding=8)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    text = io.StringIO()
    write_figure(figure, text, "svg")
    drawn = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    return drawn[drawn.index("<svg") :]


def _cells(row: SiteReport) -> list[dict[str, Any]]:
    """What the page shows of a site, and by what it sorts."""
    kinds = {"done": row.status}
    cells = []
    for column in COLUMNS:
        kind = kinds.get(column.title, "number" if column.right else "")
        value = column.value(row)
        text = "" if value is None else str(value)
        cells.append({"text": column.cell(row), "kind": kind, "value": text})
    return cells


# ---- drawings -----------------------------------------------------------------------------------
def _channels(node: fx.Node) -> int | None:
    shape = shape_of(node)
    if shape is None or len(shape) < 2:
        return None
    found = shape[1] if len(shape) > 3 else shape[-1]
    return found if isinstance(found, int) else None


def draw(gm: fx.GraphModule, costs: dict[str, NodeCost], own: dict[str, int | None]) -> Drawing:
    """A graph with places.

    Args:
        gm: what to draw; its nodes know their shapes.
        costs: of its nodes, by name.
        own: how many channels nodes of these names have without a carry.
    """
    aside = set(nodes_of_conditions(gm.graph))
    shown = [n for n in gm.graph.nodes if n.op != "get_attr" and n not in aside]
    layers = _layers(shown)
    edges = [(a, b) for b in shown for a in b.all_input_nodes if a in layers]
    count = len(shown)
    number = {node: i for i, node in enumerate(shown)}
    levels = [layers[node] for node in shown]
    paths: list[list[int]] = []
    for a, b in edges:
        between = range(layers[a] + 1, layers[b])
        paths.append([number[a], *range(count, count + len(between)), number[b]])
        levels += between
        count += len(between)
    places = _places(levels, paths)
    boxes = [_box(gm, node, places[i], costs, own) for i, node in enumerate(shown)]
    lines = [
        Line(_polyline([places[i] for i in path]), skip=_is_skip(b, layers, a))
        for (a, b), path in zip(edges, paths, strict=True)
    ]
    width = max(x for x, _ in places) + WIDTH + 2 * MARGIN
    height = max(y for _, y in places) + HEIGHT + 2 * MARGIN
    return Drawing(math.ceil(width), math.ceil(height), boxes, lines)


def _layers(shown: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """How far below the inputs each node stands: one further than the lowest it reads."""
    found: dict[fx.Node, int] = {}
    for node in shown:
        found[node] = max((found[n] + 1 for n in node.all_input_nodes if n in found), default=0)
    return found


def _places(levels: list[int], paths: list[list[int]]) -> list[tuple[float, float]]:
    """Where each vertex stands, those on long edges included."""
    import igraph

    pairs = [pair for path in paths for pair in itertools.pairwise(path)]
    graph = igraph.Graph(n=len(levels), edges=pairs, directed=True)
    layout = graph.layout_sugiyama(layers=levels, hgap=ACROSS, vgap=DOWN)
    places = [tuple(place) for place in layout.coords[: len(levels)]]
    left = min(x for x, _ in places)
    # The layout may leave less than the gap it was asked for.
    ends: dict[int, float] = {}
    found = list(places)
    for i in sorted(range(len(places)), key=lambda i: places[i]):
        x = max(places[i][0] - left, ends.get(levels[i], -ACROSS) + ACROSS)
        ends[levels[i]] = x
        found[i] = (x + MARGIN, places[i][1] + MARGIN)
    return found


def _polyline(places: Sequence[tuple[float, float]]) -> str:
    ends = [(x + WIDTH / 2, y + HEIGHT / 2) for x, y in places]
    return " ".join(f"{x:.0f},{y:.0f}" for x, y in ends)


def _is_skip(node: fx.Node, layers: dict[fx.Node, int], source: fx.Node) -> bool:
    """Whether an edge jumps over layers to an addition."""
    return _kind_of_call(node) == "add" and layers[node] - layers[source] > 1


def _kind_of_call(node: fx.Node) -> str:
    name = str(getattr(node.target, "__name__", node.target))
    added = node.op != "call_module" and name.strip("_") in ("add", "iadd", "sub", "isub")
    return "add" if added and len(node.all_input_nodes) == 2 else ""


def _box(
    gm: fx.GraphModule,
    node: fx.Node,
    place: tuple[float, float],
    costs: dict[str, NodeCost],
    own: dict[str, int | None],
) -> Box:
    cost = costs.get(node.name)
    what = cost.kind if cost else node.op
    kind = _kind_of_call(node)
    if node.op in ("placeholder", "output"):
        kind, what = "io", "input" if node.op == "placeholder" else "output"
    elif node.op == "call_module" and not kind:
        kind = "conv" if cost and cost.macs else "act"
    channels, before = _channels(node), own.get(node.name)
    width = "" if channels is None else str(channels)
    if before is not None and channels is not None and channels > before and kind != "io":
        kind, width = "carry", f"{before} + {channels - before}"
    lines = [f"{node.name} ({what})", f"shape {shape_of(node, '?')}"]
    if cost:
        lines += [f"{short(cost.macs)} multiply-adds", f"{short(cost.parameters)} parameters"]
    return Box(*place, label=f"{what} {width}".strip()[:22], detail="\n".join(lines), kind=kind)
