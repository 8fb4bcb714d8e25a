"""What the checks cost that keep wrong numbers in: verification, and looking at the weights.

- `verify`: the time of `rmfx.remove_residuals` with example inputs (batch 1, 224 px, float32) and
  its verification, over the time without. The limit: on resnet50 at most 0.3 of the pass is added.
- the look at the weights that a network compiled with `backend="rmfx"` takes at every call, over a
  call that does not look (`benchmarks/freshness.py` measures the other modes, and inductor). The
  limit: at most 3 % of a call.

Times are medians of repetitions in one process, in which both ways take turns, in the opposite
order each time; quartiles in brackets. Exit code 1 if a limit is exceeded. `--out` writes the table
into a file, too.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from _common import Limit, each, parser, quartiles, show
from freshness import Compiled, in_turns
from tabulate import tabulate

import rmfx

VERIFIED = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "regnet_y_400mf")
LOOKED_AT = ("resnet50", "mobilenet_v2")
VERIFY_LIMIT, LOOK_LIMIT = 0.3, 0.03

Row = dict[str, Any]


def cost_of_verify(network: str, rounds: int) -> tuple[Row, float]:
    """A row, and the median share of the pass that its verification adds."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(network, weights=None).eval()
    x = torch.randn(1, 3, 224, 224)
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(rounds + 1):
        for verify in (False, True) if turn % 2 else (True, False):
            gc.collect()
            start = time.perf_counter()
            rmfx.remove_residuals(model, x, verify=verify)
            if turn:
                times[verify].append(time.perf_counter() - start)
    passes = times[False]
    added = statistics.median(times[True]) - statistics.median(passes)
    shares = [(a - b) / b for a, b in zip(times[True], passes, strict=True)]
    row = {
        "check": "verify",
        "network": network,
        "without, ms": quartiles([1000 * t for t in passes], ".0f"),
        "the check, ms": f"{1000 * added:.0f}",
        "share added": quartiles(shares, ".2f"),
    }
    return row, statistics.median(shares)


@torch.no_grad()
def cost_of_look(network: str, rounds: int) -> tuple[Row, float]:
    """A row, and the median share of a call that the look at the weights takes."""
    times = in_turns(Compiled(network, "eager").seconds, rounds, network)
    calls = [1000 * call for call, _ in times["frozen"]]
    looks = [1000 * look for _, look in times["sampled"]]
    whole = statistics.median(calls)
    row = {
        "check": 'weights="sampled"',
        "network": f"{network}, compiled",
        "without, ms": quartiles(calls, ".1f"),
        "the check, ms": quartiles(looks, ".2f"),
        "share added": quartiles([look / whole for look in looks], ".4f"),
    }
    return row, statistics.median(looks) / whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns 1 if a limit is exceeded."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--rounds", type=int, default=9, help="timed runs (default 9)")
    options_parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    options_parser.add_argument("--out", type=Path, help="Markdown file for the table")
    options = options_parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows, limits = [], []
    for network in each(VERIFIED):
        row, share = cost_of_verify(network, options.rounds)
        rows.append(row)
        if network == "resnet50":
            limits.append(Limit("resnet50: verification / pass", share, VERIFY_LIMIT))
    for network in LOOKED_AT:
        row, share = cost_of_look(network, options.rounds)
        rows.append(row)
        limits.append(Limit(f"{network}: the look / a call", share, LOOK_LIMIT))
    if options.out:
        told = ", ".join(f"{limit.name} {limit.value:.3f}" for limit in limits)
        table = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
        text = f"# What the checks cost\n\n{options.threads} threads. Medians: {told}.\n\n{table}\n"
        options.out.write_text(text, encoding="utf-8")
    return show(rows, limits, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
