"""A gallery of architectures and what becomes of each, from benchmarks/results/zoo.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .files import RESULTS, write_page

Row = dict[str, Any]
INTRO = """\
# Gallery: what becomes of each architecture

{count} networks of torchvision, timm and rmfx itself, each converted and compared with its original
in float64 at every join, at two sizes: {adds} additions, of which {removed} are removed. Made from
the records of `python benchmarks/zoo.py`; [the whole table](results/zoo.md) has errors, noise and
times, [benchmarks](benchmarks.md#zoopy) says what its columns mean.

- **removed**: additions that are gone, of all additions of two tensors.
- **work**: multiply-adds, converted over original, by default and with `minimise="macs"`.
- **stays**: additions that stay, by why they do; the reasons stand at the end.
"""


def write(made: Path) -> None:
    """Write the page."""
    write_page(made / "gallery.md", page(records()))


def records() -> list[Row]:
    """What the benchmark has recorded of each network."""
    found: list[Row] = json.loads((RESULTS / "zoo.json").read_text())["networks"]
    return found


def page(rows: list[Row]) -> str:
    """The page in Markdown."""
    count = {key: sum(row[key] for row in rows) for key in ("adds", "removed")}
    parts = [INTRO.format(count=len(rows), **count)]
    for title, text, belongs in GROUPS:
        chosen = [row for row in rows if belongs(row)]
        if chosen:
            parts += [f"## {title}\n", f"{text}\n", _table(chosen)]
    parts += ["## Why additions stay\n", *_reasons(rows)]
    return "\n".join(parts).rstrip() + "\n"


def _left(row: Row) -> int:
    return int(row["adds"] - row["removed"])


GROUPS: tuple[tuple[str, str, Callable[[Row], bool]], ...] = (
    (
        "Chains",
        "Every addition goes, and layer follows layer: the result is an `nn.Sequential`.",
        lambda row: row["plain"] and row["adds"] > 0 and not _left(row),
    ),
    (
        "Without additions, but no chains",
        "Every addition goes; gates, concatenations and values that are read elsewhere stay.",
        lambda row: not row["plain"] and row["adds"] > 0 and not _left(row),
    ),
    (
        "In part",
        "Some additions stay as they are, each with its reason.",
        lambda row: 0 < row["removed"] < row["adds"],
    ),
    (
        "Left alone",
        "Every addition stays, since none can be removed exactly.",
        lambda row: row["adds"] > 0 and row["removed"] == 0,
    ),
    (
        "Nothing to remove",
        "Networks without additions come out as they were.",
        lambda row: row["adds"] == 0,
    ),
)


def _table(rows: list[Row]) -> str:
    columns = ["network", "removed", "work", "least work"]
    columns += ["stays"] if any(map(_left, rows)) else []
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        stays = [f"{n} {kind}" for kind, n in row["blocked"].items()]
        still_open = _left(row) - sum(row["blocked"].values())
        stays += [f"{still_open} other"] if still_open else []
        least = row["macs_ratio_least"]
        cells = {
            "network": f"`{row['network']}`",
            "removed": f"{row['removed']} of {row['adds']}" if row["adds"] else "–",
            "work": f"{row['macs_ratio']:.2f}",
            "least work": f"{least:.2f}" if least is not None else "–",
            "stays": ", ".join(stays) or "–",
        }
        lines.append(f"| {' | '.join(cells[column] for column in columns)} |")
    return "\n".join(lines) + "\n"


def _reasons(rows: Iterable[Row]) -> list[str]:
    """What the reports say, network by network."""
    found = ["| network | additions | reason in the report |\n|---|---|---|"]
    for row in rows:
        for reason, adds in row["reasons"].items():
            safe = reason.replace("|", "\\|").replace("_", "\\_").replace("*", "\\*")
            found.append(f"| `{row['network']}` | {adds} | {safe} |")
    return [*found, ""]
