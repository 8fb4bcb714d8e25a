"""What looking whether the weights have changed adds to a call of a compiled network.

For ResNet-50 and MobileNetV2 (batch 1, 224 px, float32) behind `torch.compile(model,
backend="rmfx")`: the time of a call with each mode of the option `weights`, over that with
"frozen", which does not look. The modes are of one compiled graph, whose snapshot is changed
between calls; they take turns in one process, in the opposite order each time.

The look itself is timed inside those calls, too, where the caches are as the network leaves them:
on a machine with other work to do the difference of two calls says little.

The limit for each network and inner backend: the median look of "sampled" at most 3 % of the median
call with "frozen". Exit code 1 if it is exceeded. `--out` writes the table into a file, too.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from _common import Limit, choose_models, parser, quartiles, show
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from rmfx import backend
from rmfx.frontend.freshness import MODES, Snapshot

NETWORKS = ("resnet50", "mobilenet_v2")
INNER = ("eager", "inductor")
SHARE_LIMIT = 0.03
WARM_UP = 5

Row = dict[str, Any]


class Timed:
    """A snapshot that times its looks."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self.seconds = 0.0

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        start = time.perf_counter()
        holds = self._snapshot.holds(tensors)
        self.seconds = time.perf_counter() - start
        return holds


class Compiled:
    """A network behind the backend, one of whose modes is chosen before a call."""

    def __init__(self, network: str, inner: str) -> None:
        torch.manual_seed(0)
        torch.compiler.reset()
        self._x = torch.randn(1, 3, 224, 224)
        self._converted: list[Any] = []
        model = torchvision.models.get_model(network, weights=None).eval()
        keywords: dict[str, Any] = {"backend": self._backend, "options": {"backend": inner}}
        compile_with: Any = torch.compile  # whose overloads mypy does not follow here
        self._run: Any = compile_with(model, **keywords)
        self._run(self._x)
        self._state = self._converted[0]._state
        self._snapshots: dict[str, Timed] = {mode: self._snapshot(mode) for mode in MODES}

    def _backend(self, gm: Any, inputs: Any, **keywords: Any) -> Any:
        self._converted.append(backend.rmfx(gm, inputs, **keywords))
        return self._converted[0]

    def _snapshot(self, mode: Any) -> Timed:
        """What the weights are like, as the graph is handed them."""
        found: list[Sequence[Tensor]] = []

        class Listener:
            def holds(self, tensors: Sequence[Tensor]) -> bool:
                found.append(tensors)
                return True

        self._converted[0]._state = replace(self._state, weights=Listener())
        self._run(self._x)
        return Timed(Snapshot(found[0], mode=mode))

    def seconds(self, mode: str) -> tuple[float, float]:
        """Of a call, and of the look at the weights within it."""
        snapshot = self._snapshots[mode]
        self._converted[0]._state = replace(self._state, weights=snapshot)
        start = time.perf_counter()
        self._run(self._x)
        return time.perf_counter() - start, snapshot.seconds


Times = list[tuple[float, float]]


def in_turns(
    measure: Callable[[str], tuple[float, float]], rounds: int, name: str
) -> dict[str, Times]:
    """What is measured of each mode."""
    times: dict[str, Times] = {mode: [] for mode in MODES}
    for turn in tqdm(range(rounds + WARM_UP), desc=name):
        for mode in MODES if turn % 2 else MODES[::-1]:
            times[mode].append(measure(mode))
    return {mode: values[WARM_UP:] for mode, values in times.items()}


@torch.no_grad()
def measure(network: str, inner: str, rounds: int) -> tuple[list[Row], Limit]:
    """A row for each mode, and the limit of the usual one."""
    times = in_turns(Compiled(network, inner).seconds, rounds, f"{network}, {inner}")
    frozen = statistics.median(call for call, _ in times["frozen"])
    rows: list[Row] = []
    shares: dict[str, float] = {}
    for mode, pairs in times.items():
        calls, looks = zip(*pairs, strict=True)
        shares[mode] = statistics.median(looks) / frozen
        rows.append(
            {
                "network": network,
                "inner backend": inner,
                "weights": mode,
                "a call, ms: median (quartiles)": quartiles([1000 * t for t in calls], ".2f"),
                "over frozen": f"{statistics.median(calls) / frozen:.3f}",
                "the look, ms": quartiles([1000 * t for t in looks], ".2f"),
                "of a frozen call": f"{shares[mode]:.2%}",
            }
        )
    return rows, Limit(f"{network}, {inner}: the look / a call", shares["sampled"], SHARE_LIMIT)


def write(rows: Sequence[Row], options: argparse.Namespace) -> None:
    """The table with what it was measured on."""
    text = (
        f"# What looking at the weights costs\n\n`python benchmarks/freshness.py --out FILE`, "
        f"{options.rounds} rounds, {options.threads} threads, torch {torch.__version__}, "
        f"{platform.machine()}. {options.note}".rstrip()
    )
    table = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    options.out.write_text(f"{text}\n\n{table}\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns 1 if a limit is exceeded."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=40, help="calls of each mode (default 40)")
    made.add_argument("--inner", default=",".join(INNER), help="inner backends, comma-separated")
    made.add_argument("--out", type=Path, help="a Markdown file for the table")
    made.add_argument("--note", default="", help="a sentence for that file, about the machine")
    options, names = choose_models(made, NETWORKS, arguments)
    inner = options.inner.split(",")
    measured = [measure(name, one, options.rounds) for name in names for one in inner]
    rows = [row for rows, _ in measured for row in rows]
    if options.out is not None:
        write(rows, options)
    return show(rows, [limit for _, limit in measured], as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
