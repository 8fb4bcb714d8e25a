"""Many random networks through `remove_residuals`, and what they were made of.

`rmfx fuzz` draws the networks, in all ways to hold them and with all ways to pass an activation.
One seed stands for a batch of networks, so a run that is cut off goes on where it was: what a
version of the compiler has done stands in results/fuzz.json under the hash of its sources, and
results/fuzz.md sums it up. Limit: no batch fails. Exit code 1 if one does; its seed, with the
network made small as a program, is printed and kept.

`--jobs` says how many processes there are, `--backend dask --address URL` that they are those of a
cluster, whose workers have rmfx and this folder on their path.
"""

from __future__ import annotations

import gc
import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from _common import Limit, add_jobs, jobs_of, parser, show
from _records import code_version, write
from tabulate import tabulate
from tqdm import tqdm

from rmfx.fuzz import COUNTED, fuzz
from rmfx.testing.jobs import Jobs

RESULTS = Path(__file__).resolve().parent / "results" / "fuzz.json"
BATCH = 250
# Of ten batches: tracing by torch.fx alone takes the least time, exporting ten times as much.
FRONTENDS = ("traced",) * 5 + ("module",) * 3 + ("exported", "compiled")
COUNTERS = ("features", "strategies", "reasons", "untraced")

Totals = dict[str, Any]


def run_batch(seed: int) -> dict[str, Any]:
    """What became of one batch of networks, with one thread wherever it is tried."""
    torch.set_num_threads(1)
    gc.freeze()  # what stands there for good need not be gone through for garbage ever again
    gc.set_threshold(100_000, 50, 100)
    frontend = FRONTENDS[seed % len(FRONTENDS)]
    report = fuzz(examples=BATCH, seed=seed, frontend=frontend, activation="random").to_dict()
    strategies = {f"{s['strategy']}, {s['exactness']}": s["sites"] for s in report["strategies"]}
    return report | {"strategies": strategies}


def empty() -> Totals:
    """The totals of nothing."""
    counts = dict.fromkeys(("examples", "without_inputs", "skipped", "removed", "refused"), 0)
    frontends = dict.fromkeys(dict.fromkeys(FRONTENDS), 0)
    rest: Totals = {"joins": 0, "error": 0.0, "seeds": [], "failures": [], "frontends": frontends}
    return {**counts, **rest, **{name: {} for name in COUNTERS}}


def add(totals: Totals, batch: dict[str, Any]) -> None:
    """Count a batch in."""
    for name in ("examples", "without_inputs", "skipped", "removed", "refused", "joins"):
        totals[name] += batch[name]
    for name in COUNTERS:
        totals[name] = dict((Counter(totals[name]) + Counter(batch[name])).most_common())
    totals["frontends"][batch["frontend"]] += batch["examples"]
    totals["error"] = max(totals["error"], batch["error"])
    totals["seeds"] = sorted([*totals["seeds"], batch["seed"]])
    if batch["failure"]:
        totals["failures"].append({"seed": batch["seed"], **batch["failure"]})


def _row(totals: Totals) -> dict[str, Any]:
    shown = ("examples", "removed", "refused", "joins", "error")
    return {name: totals[name] for name in shown} | {"failures": len(totals["failures"])}


def markdown(versions: dict[str, Totals], code: str) -> str:
    """What one version of the compiler has done, as a page; the others as a table."""
    totals = versions[code]
    seen = [name for name in COUNTED if totals["features"].get(name)]
    frontends = ", ".join(f"{n} {name}" for name, n in totals["frontends"].items())
    summary = (
        f"{totals['examples']} networks ({frontends}) through `remove_residuals`, "
        f"{totals['without_inputs']} of them without example inputs too; {totals['skipped']} that "
        f"torch cannot trace in that way were skipped. {totals['removed']} sites removed, "
        f"{totals['refused']} refused, {totals['joins']} joins compared. Largest error "
        f"{totals['error']:.1e} in float64 (a shift may cost digits: limit 1e-8, otherwise 1e-10). "
        f"{len(totals['failures'])} failures. {len(seen)} of {len(COUNTED)} features seen."
    )
    tables = (
        (("strategy, exactness", "sites removed"), totals["strategies"]),
        (("reason", "sites refused"), totals["reasons"]),
        (("why it cannot be traced", "networks"), totals["untraced"]),
        (("feature", "networks"), totals["features"]),
    )
    history = [{"compiler": name} | _row(one) for name, one in versions.items()]
    parts = ["# Random networks", f"Made by `python benchmarks/fuzz.py`, compiler {code}.", summary]
    for headers, counts in tables:
        rows = [(str(name).replace("|", "\\|"), n) for name, n in counts.items()]
        parts.append(tabulate(rows, headers, tablefmt="github"))
    parts += ["## All versions", tabulate(history, "keys", tablefmt="github", floatfmt=".1e")]
    return "\n\n".join(parts) + "\n"


def run(seeds: Iterable[int], how: Jobs, code: str) -> Totals:
    """Do the batches, and keep what is known after each."""
    versions = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    totals: Totals = versions.setdefault(code, empty())
    left = [seed for seed in seeds if seed not in totals["seeds"]]
    batches = how.results(run_batch, [(seed,) for seed in left], in_order=False)
    for batch in tqdm(batches, total=len(left), unit="batch"):
        add(totals, batch)
        write(RESULTS, json.dumps(versions, indent=1) + "\n")
        write(RESULTS.with_suffix(".md"), markdown(versions, code))
    return totals


def main() -> int:
    """The command."""
    options = parser(str(__doc__))
    options.add_argument("--examples", type=int, default=100_000, help="default: %(default)s")
    options.add_argument("--first", type=int, default=0, metavar="SEED", help="of the first batch")
    add_jobs(options)
    given = options.parse_args()
    batches = -(-given.examples // BATCH)
    totals = run(range(given.first, given.first + batches), jobs_of(given), code_version())
    for failure in totals["failures"]:
        print(f"seed {failure['seed']}, {failure['kind']}: {failure['message']}")
        print(failure["script"])
    limits = [Limit("batches that failed", len(totals["failures"]), 0)]
    return show([_row(totals)], limits, as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
