"""Networks with parallel linear branches: merged by rmfx, and by timm's hand-written methods.

For each network, in float64 with random statistics: the additions it has, those left after
`timm.utils.reparameterize_model` and after `rmfx.merge_branches`, and how many of these
`remove_residuals` would remove by a carry; batch norms left; the largest relative error. Then the
time, in float32 at 224 px and batch 1, of the network as trained, as timm merges it and as rmfx
does, in turn in one process: medians of ratios with quartiles.

Limits: no addition of linear branches left; no more additions than timm leaves; error at most
1e-10; at most 1.02 times the time of timm's form, by the lower quartile: where both forms have the
same layers the median itself strays by that much. Exit code 1 if one is exceeded.
What is done stands in results/branches.json and is not done again without --fresh.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from _branch_blocks import OWN, network
from _common import Limit, choose_models, count_additions, each, parser, show
from _randomise import randomise_constants
from _records import code_version, write
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import rmfx
from rmfx.testing import assert_equivalent, random_statistics
from rmfx.timing.machine import machine_of
from rmfx.timing.speed import Settings, compare_speed, ratio_of

TIMM = (
    *("repvgg_a0", "repvgg_b0", "mobileone_s0", "mobileone_s1", "mobileone_s4", "repvit_m0_9"),
    *("fastvit_t8", "shvit_s1", "ghostnetv3_100", "repghostnet_100", "efficientvit_m0"),
    *("lcnetv2_small", "levit_128s"),
)
ERROR_LIMIT = 1e-10
TIME_LIMIT = 1.02
RESULTS = Path(__file__).resolve().parent / "results" / "branches.json"
FORMS = ("trained", "timm", "rmfx")

Ratio = tuple[float, float, float]


@dataclass(frozen=True)
class Outcome:
    """What became of one network.

    Attributes:
        network: its name.
        code: which version of the compiler it was.
        adds: additions of two tensors as trained, after timm's method (None where it has none),
            and after `merge_branches`.
        linear_left: sums of linear branches that `merge_branches` left.
        by_carry: of the additions left, those that `remove_residuals` removes.
        norms: batch norms left, by timm and by rmfx.
        error: largest relative error, at the output and at every join.
        to_timm: by runtime, time of rmfx's form over timm's: median and quartiles.
        to_trained: the same over the network as trained.
    """

    network: str
    code: str
    adds: tuple[int, int | None, int]
    linear_left: int
    by_carry: int
    norms: tuple[int | None, int]
    error: float
    to_timm: dict[str, Ratio] = field(default_factory=dict)
    to_trained: dict[str, Ratio] = field(default_factory=dict)


def build(name: str) -> nn.Module:
    """The network as it is trained, with random weights."""
    torch.manual_seed(0)
    if name in OWN:
        return network(OWN[name]).eval()
    import timm

    model: nn.Module = timm.create_model(name).eval()
    return model


def by_timm(name: str, model: nn.Module) -> nn.Module | None:
    """What timm's own methods make of it, None where it has none."""
    if name in OWN:
        return None
    from timm.utils.model import reparameterize_model

    dtype = next(model.parameters()).dtype
    made: nn.Module = reparameterize_model(copy.deepcopy(model)).eval().to(dtype)
    return made


@torch.no_grad()
def evaluate(name: str, runtimes: Sequence[str], settings: Settings) -> Outcome:
    """Merges one network, compares and times it."""
    x = torch.randn(1, 3, 224, 224)
    to_timm, to_trained = measure(name, build(name), x, runtimes, settings)
    model, x = build(name).double(), x.double()
    randomise_constants(model)  # layer scales, among others
    random_statistics(model, seed=0)
    # Both before the model is run for the first time: LeViT then has other constants.
    merged = rmfx.merge_branches(model, x)
    rows = rmfx.report(merged).rows
    converted = rmfx.report(rmfx.remove_residuals(model, x)).rows
    theirs = by_timm(name, model)
    check = assert_equivalent(model, merged, x, tolerance=float("inf"))
    carried = {row.join for row in converted if row.status == "removed"}
    return Outcome(
        network=name,
        code=code_version(),
        adds=(
            additions(model, x),
            additions(theirs, x) if theirs else None,
            count_additions(merged),
        ),
        linear_left=sum(
            row.status != "removed" and other.strategy == "linear"
            for row, other in zip(rows, converted, strict=True)
        ),
        by_carry=sum(row.status != "removed" and row.join in carried for row in rows),
        norms=(norms(theirs) if theirs else None, norms(merged)),
        error=max([check.error, *(join.error for join in check.joins)]),
        to_timm=to_timm,
        to_trained=to_trained,
    )


def additions(model: nn.Module, x: Tensor) -> int:
    """Additions of two tensors in a network's graph."""
    return count_additions(rmfx.trace(model, x))


def norms(model: nn.Module) -> int:
    """Batch norms in a network."""
    return sum(isinstance(m, _BatchNorm) for m in model.modules())


def measure(
    name: str, model: nn.Module, x: Tensor, runtimes: Sequence[str], settings: Settings
) -> tuple[dict[str, Ratio], dict[str, Ratio]]:
    """Time of rmfx's form over timm's and over the trained form, by runtime."""
    theirs = by_timm(name, model)
    forms = [model, rmfx.merge_branches(model, x), *([theirs] if theirs is not None else [])]
    to_timm, to_trained = {}, {}
    for runtime in runtimes:
        trained, own, *rest = compare_speed(forms, (x,), runtime, settings)
        to_trained[runtime] = ratio_of(trained, own)
        if rest:
            to_timm[runtime] = ratio_of(rest[0], own)
    return to_timm, to_trained


def row_of(outcome: Outcome) -> dict[str, Any]:
    """One row of the table."""
    trained, theirs, ours = outcome.adds
    row: dict[str, Any] = {
        "network": outcome.network,
        "adds": trained,
        "timm": "" if theirs is None else theirs,
        "rmfx": ours,
        "of these by carry": outcome.by_carry,
        "BN left timm, rmfx": ", ".join("-" if n is None else str(n) for n in outcome.norms),
        "error": f"{outcome.error:.0e}",
    }
    for title, ratios in (("timm", outcome.to_timm), ("trained", outcome.to_trained)):
        for runtime, (median, low, high) in ratios.items():
            row[f"{runtime}, rmfx/{title}"] = f"{median:.2f} ({low:.2f} to {high:.2f})"
    return row | {"compiler": outcome.code[:6]}


def limits_of(outcomes: Sequence[Outcome]) -> list[Limit]:
    """What must hold for all."""
    more = [o.adds[2] - o.adds[1] for o in outcomes if o.adds[1] is not None]
    slowest = [low for o in outcomes for _, low, _ in o.to_timm.values()]
    return [
        Limit("sums of linear branches left", sum(o.linear_left for o in outcomes), 0),
        Limit("additions more than timm leaves", max(more, default=0), 0),
        Limit("largest relative error", max(o.error for o in outcomes), ERROR_LIMIT),
        Limit(
            "time over timm's form, lower quartile, at most", max(slowest, default=0.0), TIME_LIMIT
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 1 if a limit is exceeded."""
    made = parser(str(__doc__))
    made.add_argument("--fresh", action="store_true", help="do again what is done")
    made.add_argument("--table", action="store_true", help="measure nothing")
    made.add_argument("--runtimes", default="eager,inductor", help="default: %(default)s")
    made.add_argument("--rounds", type=int, default=25, help="of timing; default: %(default)s")
    options, names = choose_models(made, (*TIMM, *OWN), arguments)
    settings = Settings(threads=options.threads, rounds=options.rounds)
    runtimes = options.runtimes.split(",")
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    done = {row["network"]: row for row in found.get("networks", [])}
    for name in each(names):
        is_done = done.get(name, {}).get("code") == code_version() and not options.fresh
        if not is_done and not options.table:
            done[name] = asdict(evaluate(name, runtimes, settings))
            kept = {"machine": machine_of(settings, runtimes), "networks": list(done.values())}
            write(RESULTS, json.dumps(kept, indent=1) + "\n")
    outcomes = [Outcome(**done[name]) for name in names if name in done]
    rows = [row_of(outcome) for outcome in outcomes]
    machine = machine_of(settings, runtimes)
    title = "Parallel linear branches"
    write(RESULTS.with_suffix(".md"), markdown(title, "branches.py", rows, machine))
    return show(rows, limits_of(outcomes), as_json=options.json)


def markdown(
    title: str, script: str, rows: Sequence[dict[str, Any]], machine: dict[str, str]
) -> str:
    """A table as a page."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = tabulate(
        [[row.get(key, "") for key in columns] for row in rows], columns, tablefmt="github"
    )
    known = "; ".join(f"{name} {value}" for name, value in machine.items())
    head = f"# {title}\n\nMade by `python benchmarks/{script}`. {known}."
    return f"{head}\n\n{table}\n"


if __name__ == "__main__":
    sys.exit(main())
