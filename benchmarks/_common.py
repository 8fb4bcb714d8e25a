"""What the benchmark scripts share: statistics, counting, tables, limits and the exit code."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from textwrap import shorten
from typing import Any

import torch
from tabulate import tabulate
from torch.fx import GraphModule, Node
from tqdm import tqdm

import rmfx
from rmfx.choices import BACKENDS
from rmfx.testing.jobs import Jobs

# What tracers and exporters raise for a model they cannot follow (Dynamo raises RuntimeErrors), and
# a network that is given an input it does not take.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    rmfx.RmfxError,
)
MESSAGE_LENGTH = 500


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


def quartiles(values: Sequence[float], form: str) -> str:
    """For a table: median (lower to upper quartile)."""
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:{form}} ({low:{form}} to {high:{form}})"


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


def message(error: BaseException) -> str:
    """What an error says, short enough for a table."""
    return f"{type(error).__name__}: {error}".strip()[:MESSAGE_LENGTH]


def each(names: Sequence[str]) -> Iterator[str]:
    """The names in turn, with a progress bar that says which one it is."""
    progress = tqdm(names)
    for name in progress:
        progress.set_description(name)
        yield name


def demands_limit(problems: Sequence[str]) -> Limit:
    """No demand may fail."""
    return Limit("failed demands", len(problems), 0)


def parser(description: str) -> argparse.ArgumentParser:
    """An argument parser with the option all scripts have, `--json`.

    Args:
        description: a module docstring; its first paragraph becomes the help text.
    """
    made = argparse.ArgumentParser(description=description.split("\n\n")[0])
    made.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return made


def add_jobs(made: argparse.ArgumentParser, default: int = 2) -> None:
    """Options that say where independent cases run; `jobs_of` reads them."""
    made.add_argument("--jobs", type=int, default=default, help="processes (%(default)s)")
    text = "where they are: of this machine or of a cluster (%(default)s)"
    made.add_argument("--backend", choices=BACKENDS, default=BACKENDS[0], help=text)
    made.add_argument("--address", metavar="URL", help="of the cluster")


def jobs_of(options: argparse.Namespace) -> Jobs:
    """Where independent cases run."""
    return Jobs(options.jobs, options.backend, options.address)


def choose_models(
    made: argparse.ArgumentParser,
    known: Iterable[str],
    arguments: Sequence[str] | None,
    default: Iterable[str] | None = None,
) -> tuple[argparse.Namespace, list[str]]:
    """Parses the arguments, with the options `--models` and `--threads`, and sets torch's threads.

    Args:
        made: the parser.
        known: names of the models there are.
        arguments: of the command; by default those of the process.
        default: names of the models taken where none are given; by default all that are known.

    Returns:
        All options, and the names chosen.
    """
    names = list(known)
    usual = ",".join(names if default is None else default)
    made.add_argument("--models", default=usual, help="names, comma-separated")
    made.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    options = made.parse_args(arguments)
    chosen = options.models.split(",") if options.models else []
    unknown = [name for name in chosen if name not in names]
    if unknown:
        made.error(f"unknown: {', '.join(unknown)}; known: {shorten(', '.join(names), 2000)}")
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
