"""What the benchmark scripts share: statistics, counting, tables, limits and the exit code."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch.fx import GraphModule, Node


@dataclass(frozen=True)
class Spread:
    """Median and extremes of repeated measurements, in the unit of the measurements."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Summarises at least one value."""
        return Spread(statistics.median(values), min(values), max(values))

    def text(self, digits: int = 2) -> str:
        """For a table: "median (low to high)"."""
        low, high = f"{self.low:.{digits}f}", f"{self.high:.{digits}f}"
        return f"{self.median:.{digits}f} ({low} to {high})"


@dataclass(frozen=True)
class Limit:
    """A measured value that must not exceed a bound."""

    name: str
    value: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the value is within the bound; NaN is not."""
        return self.value <= self.bound


def count_additions(gm: GraphModule) -> int:
    """Additions and subtractions of two tensors in a graph, counted without rmfx's own report."""
    names = {"add", "iadd", "add_", "sub", "isub", "sub_", "rsub"}
    additions = 0
    for node in gm.graph.nodes:
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        operands = [x for x in (*node.args, *node.kwargs.values()) if isinstance(x, Node)]
        additions += str(name).split(".")[0] in names and len(operands) == 2
    return additions


def parser(description: str) -> argparse.ArgumentParser:
    """An argument parser with the option all scripts have, `--json`.

    Args:
        description: a module docstring; its first paragraph becomes the help text.
    """
    made = argparse.ArgumentParser(description=description.split("\n\n")[0])
    made.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return made


def choose_models(
    made: argparse.ArgumentParser, known: Iterable[str], arguments: Sequence[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """Parses the arguments, with the options `--models` and `--threads`, and sets torch's threads.

    Args:
        made: the parser.
        known: names of the models there are; all of them are the default.
        arguments: of the command; by default those of the process.

    Returns:
        All options, and the names chosen.
    """
    names = list(known)
    made.add_argument("--models", default=",".join(names), help="names, comma-separated")
    made.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    options = made.parse_args(arguments)
    chosen = options.models.split(",")
    unknown = [name for name in chosen if name not in names]
    if unknown:
        made.error(f"unknown: {', '.join(unknown)}; known: {', '.join(names)}")
    torch.set_num_threads(options.threads)
    return options, chosen


def show(
    rows: Sequence[dict[str, Any]], limits: Sequence[Limit], *, as_json: bool, notes: str = ""
) -> int:
    """Prints the rows (all with the same keys) and the limits.

    Returns:
        The exit code: 1 where a limit is exceeded, else 0.
    """
    if as_json:
        checks = [asdict(limit) | {"holds": limit.holds} for limit in limits]
        print(json.dumps({"rows": list(rows), "limits": checks}, indent=2))
    else:
        print(tabulate(rows, headers="keys", floatfmt=".4g"))
        if notes:
            print(f"\n{notes}")
        if limits:
            table = [(x.name, x.value, x.bound, "yes" if x.holds else "NO") for x in limits]
            headers = ("limit", "measured", "at most", "holds")
            print("\n" + tabulate(table, headers=headers, floatfmt=".4g"))
    return 0 if all(limit.holds for limit in limits) else 1
