"""A conversion as one self-contained page: what it did at every site, what it costs, both graphs.

igraph places the nodes, matplotlib draws the bars, jinja2 fills the page;
`pip install igraph jinja2 matplotlib` brings all three.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from rmfx.conversion import Conversion
from rmfx.cost.counting import NodeCost, nodes
from rmfx.errors import RmfxError, install_command
from rmfx.files.figures import write_figure
from rmfx.frontend.tracing import trace
from rmfx.latency import LatencyReport
from rmfx.report import CARRY, GAIN, HEAD, SIZE, SiteReport, legend
from rmfx.table import Column, short

from .drawing import Drawing, channels_of, draw, is_addition
from .stages import divide, follow, shown_nodes

PACKAGES = ("igraph", "jinja2", "matplotlib")
COLUMNS = (
    *(*HEAD, Column("layout", "layout"), SIZE),
    *(replace(column, right=True) for column in (GAIN, CARRY)),
    Column("multiply-adds before", "macs_before", short, right=True),
    Column("multiply-adds after", "macs_after", short, right=True),
    Column("parameters before", "params_before", short, right=True),
    Column("parameters after", "params_after", short, right=True),
    Column("reason", "reason"),
)


FORMS = ("before", "after")
OPEN = 2  # so many stages of a graph are unfolded at once
BAR, FONT = "#6b8fc9", 12  # colour of a bar; the figure is shown at its size or larger


class PageError(RmfxError):
    """A page cannot be made."""


@dataclass(frozen=True)
class Part:
    """A stage in both forms.

    Attributes:
        title: of the stage.
        counts: of what it consists and what it costs: a name, before and after.
        drawings: by form, None where a form has nothing there.
    """

    title: str
    counts: list[tuple[str, ...]]
    drawings: dict[str, Drawing | None]


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
    head: str = "",
) -> str:
    """The page, as HTML.

    Args:
        conversion: both forms of a network.
        inputs: example inputs, which give the shapes.
        title: how the page calls the network.
        latency: measurements to be shown, too.
        head: a line on what was converted: its weights and inputs.

    Raises:
        PageError: packages are missing.
    """
    check_packages()
    import jinja2

    figures = [
        (title, short(before), short(after), f"{after / before:.2f}x" if before else "")
        for title, before, after in conversion.costs
    ]
    parts = list(_parts(conversion, inputs))
    sites = conversion.report.rows
    columns = [column for column in COLUMNS if any(map(column.cell, sites))]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rmfx.cli"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        title=title,
        summary=_summary(conversion),
        facts=[*filter(None, [head]), *_facts(conversion)],
        figures=figures,
        bars=_bars(figures, latency),
        notes=_notes(latency),
        parts=parts,
        folded=len(parts) > OPEN,
        legend=legend(sites),
        columns=[column.title for column in columns],
        rows=[(row.done, _cells(row, columns)) for row in sites],
        statuses=Counter(row.done for row in sites),
        version=importlib.metadata.version("rmfx"),
    )


# ---- graphs -------------------------------------------------------------------------------------
def _parts(conversion: Conversion, inputs: tuple[Tensor, ...]) -> Iterator[Part]:
    """Both graphs side by side: stage by stage, where they are long."""
    graphs = [trace(gm, inputs) for gm in (conversion.before, conversion.after)]  # with shapes
    costs = [{row.node: row for row in nodes(gm, inputs)} for gm in graphs]
    shown = [shown_nodes(gm.graph) for gm in graphs]
    stages = divide(shown[0])
    parts = [[stage.nodes for stage in stages], follow(shown[1], stages)]
    own = {node.name: channels_of(node) for node in shown[0]}
    drawings = [draw(parts[0], costs[0], {}), draw(parts[1], costs[1], own)]
    for i, stage in enumerate(stages):
        counts = [_counts(part[i], form) for part, form in zip(parts, costs, strict=True)]
        told = [(name, *(count[name] for count in counts)) for name in counts[0]]
        made = {form: drawn[i] for form, drawn in zip(FORMS, drawings, strict=True)}
        yield Part(stage.title, told, made)


def _counts(part: Sequence[fx.Node], costs: Mapping[str, NodeCost]) -> dict[str, str]:
    """What a stage consists of and costs."""
    macs = sum(costs[node.name].macs for node in part if node.name in costs)
    additions = sum(map(is_addition, part))
    return {"nodes": str(len(part)), "additions": str(additions), "multiply-adds": short(macs)}


# ---- numbers ------------------------------------------------------------------------------------
def _summary(conversion: Conversion) -> str:
    report = conversion.report
    if not report.rows:
        return "This network adds no two tensors: there is no residual connection to remove."
    return f"{report.total}{report.dearness()}."


def _facts(conversion: Conversion) -> Iterator[str]:
    """What is said of the result besides, as where it is shown on a terminal."""
    report = conversion.report
    yield from map(str, report.held)
    told = (str(report.verification or ""), conversion.told_chain, conversion.told_folding)
    yield from (f"{text[0].upper()}{text[1:]}." for text in told if text)


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
            name += f", {row.paired.doubt}" if row.paired.doubt else ""
            bars.append((name, median, median - low, high - median))
    if not bars:
        return ""
    figure = Figure(figsize=(4.7, 0.5 + 0.36 * len(bars)), layout="constrained", facecolor="none")
    axes = figure.subplots()
    axes.set_facecolor("none")
    names, values, below, above = zip(*reversed(bars), strict=True)
    axes.barh(names, values, color=BAR)
    if any(above):
        axes.errorbar(values, names, xerr=[below, above], fmt="none", ecolor="black", capsize=3)
    for i, value in enumerate(values):  # beside the axes, where no bar or line crosses it
        label = f"{value:.2f}"
        axes.text(1.03, i, label, fontsize=FONT, va="center", transform=axes.get_yaxis_transform())
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xticks([0, 1])
    axes.tick_params(labelsize=FONT)
    axes.spines[["top", "right"]].set_visible(False)
    text = io.StringIO()
    write_figure(figure, text, "svg")
    drawn = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    drawn = drawn.replace("#000000", "currentColor").replace(BAR, "var(--bar)")  # dark pages, too
    return drawn[drawn.index("<svg") :]


def _cells(row: SiteReport, columns: Sequence[Column]) -> list[dict[str, Any]]:
    """What the page shows of a site, and by what it sorts."""
    cells = []
    for column in columns:
        kind = "number" if column.right else ""
        kind = {"done": row.status, "layout": "words", "reason": "words"}.get(column.title, kind)
        value = column.value(row)
        text = "" if value is None else str(value)
        cells.append({"title": column.title, "text": column.cell(row), "kind": kind, "value": text})
    return cells
