"""`rmfx.optimize` never makes a network slower, and networks with parallel branches faster.

Each network (float32, 224 px, batch 1, random weights) goes through `rmfx.optimize`, which measures
for itself. What it returns is then measured once more, in turn with the original with its batch
norm folded, in one process: median of the ratios and quartiles. Where it returned the folded
original itself there is nothing to measure: 1.

Limits: no median above 1.03; under inductor every network of branches.py below 1 (in eager mode
merging a few small layers may save nothing that can be measured). Exit code 1 if one is exceeded.
What is done stands in results/optimize.json, with the version of the compiler, and the same version
does not do it again without --fresh; --table shows what is there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _branch_blocks import OWN
from _common import Limit, add_jobs, choose_models, jobs_of, parser, show
from _records import code_version, write
from branches import TIMM, Ratio, build, markdown
from tqdm import tqdm

import rmfx
from rmfx.timing.machine import machine_of
from rmfx.timing.speed import Settings, compare_speed, ratio_of

OTHERS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "mobilenetv2_100", "mobilenetv3_small_100"),
    *("mobilenetv3_large_100", "efficientnet_b0", "efficientnet_lite0", "tf_efficientnetv2_b0"),
    *("regnetx_004", "resnext50_32x4d", "vgg11_bn", "densenet121"),
)
TIME_LIMIT = 1.03
RESULTS = Path(__file__).resolve().parent / "results" / "optimize.json"


@dataclass(frozen=True)
class Outcome:
    """What became of one network.

    Attributes:
        network: its name.
        runtime: where it was to be fast.
        code: which version of the compiler it was.
        form: what was returned: "folded", "merged" or "converted".
        claimed: what `optimize` measured for it.
        measured: what came of measuring once more.
        removed, kept, refused: additions.
    """

    network: str
    runtime: str
    code: str
    form: str
    claimed: float
    measured: Ratio
    removed: int
    kept: int
    refused: int


@torch.no_grad()
def evaluate(name: str, runtime: str, settings: Settings) -> Outcome:
    """Optimises one network and measures the result."""
    model, x = build(name), torch.randn(1, 3, 224, 224)
    fast = rmfx.optimize(
        model, x, runtime=runtime, threads=settings.threads, rounds=settings.rounds
    )
    report = rmfx.report(fast)
    chosen = next((t for t in report.timings if t.chosen), None)
    measured: Ratio = (1.0, 1.0, 1.0)
    if chosen is not None and chosen.form != "folded":
        folded = rmfx.fold_batch_norm(rmfx.remove_noops(model, x), x)
        before, after = compare_speed([folded, fast], (x,), runtime, settings)
        measured = ratio_of(before, after)
    return Outcome(
        network=name,
        runtime=runtime,
        code=code_version(),
        form=chosen.form if chosen else "folded",
        claimed=chosen.ratio if chosen else 1.0,
        measured=measured,
        removed=report.removed,
        kept=report.kept,
        refused=report.refused,
    )


def row_of(outcome: Outcome) -> dict[str, Any]:
    """One row of the table."""
    median, low, high = outcome.measured
    return {
        "network": outcome.network,
        "runtime": outcome.runtime,
        "returned": outcome.form,
        "claimed": f"{outcome.claimed:.2f}",
        "time over folded": f"{median:.2f} ({low:.2f} to {high:.2f})",
        "adds removed": outcome.removed,
        "kept": outcome.kept,
        "refused": outcome.refused,
        "compiler": outcome.code[:6],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 1 if a limit is exceeded."""
    made = parser(str(__doc__))
    # What runs beside it changes a time: more than one at a time belong on machines of their own.
    add_jobs(made, default=1)
    made.add_argument("--fresh", action="store_true", help="do again what is done")
    made.add_argument("--table", action="store_true", help="measure nothing")
    made.add_argument("--runtimes", default="eager,inductor", help="default: %(default)s")
    made.add_argument("--rounds", type=int, default=15, help="of timing; default: %(default)s")
    options, names = choose_models(made, (*TIMM, *OWN, *OTHERS), arguments)
    settings = Settings(threads=options.threads, rounds=options.rounds)
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    done = {(row["network"], row["runtime"]): row for row in found.get("networks", [])}
    runtimes = options.runtimes.split(",")
    machine = machine_of(settings, runtimes)
    wanted = [(name, runtime) for runtime in runtimes for name in names]
    known = {key for key, row in done.items() if row.get("code") == code_version()}
    left = [] if options.table else [key for key in wanted if options.fresh or key not in known]
    found_now = jobs_of(options).results(evaluate, [(*key, settings) for key in left])
    for outcome in tqdm(found_now, total=len(left), unit="network"):
        done[outcome.network, outcome.runtime] = asdict(outcome)
        kept = {"machine": machine, "networks": list(done.values())}
        write(RESULTS, json.dumps(kept, indent=1) + "\n")
    outcomes = [Outcome(**done[key]) for key in wanted if key in done]
    rows = [row_of(outcome) for outcome in outcomes]
    title = "What rmfx.optimize returns"
    write(RESULTS.with_suffix(".md"), markdown(title, "optimize.py", rows, machine))
    return show(rows, limits_of(outcomes), as_json=options.json)


def limits_of(outcomes: Sequence[Outcome]) -> list[Limit]:
    """What must hold."""
    compiled = [o for o in outcomes if o.runtime == "inductor" and o.network not in OTHERS]
    slowest = max(o.measured[0] for o in outcomes)
    branches = max((o.measured[0] for o in compiled), default=0.0)
    return [
        Limit("time over the folded original, at most", slowest, TIME_LIMIT),
        Limit("the same of networks with branches, under inductor", branches, 0.999),
    ]


if __name__ == "__main__":
    sys.exit(main())
