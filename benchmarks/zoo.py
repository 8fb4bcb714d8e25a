"""The coverage report: what becomes of every addition of more than a hundred networks.

In float64 and with random batch norm statistics each network is converted with an even-sized
example and compared with the original at that size and, where it takes one, at an odd size: at the
output and at EVERY residual join. "Sensitivity" is the smallest error that a dropped operand would
have caused at its join, so it says how much the comparison is worth. It is converted with
`minimise="macs"`, too, for its multiply-adds, and compared at the even size.

Limits: no network raises; relative error at most 1e-10 or, where the network itself magnifies
rounding, ten times what one rounding of its input does to it there ("noise"); of the additions that
are not blocked (a table in _blocked.py says which are, and why) at least 95 % removed. Networks
that must convert whole: no addition left, one report row and one comparison for each; chains must
also be plain and survive `to_sequential`. Networks that must be left alone: for the right reason,
and those without additions unchanged bit for bit. Exit code 1 if a limit is exceeded.

Each network is written to results/zoo.json when it is done; what this version of the compiler is
done with is not done again without --fresh. The list takes about half an hour on two cores, of
which the two networks of 1,202 layers take a quarter; --small takes smaller inputs (and files of
its own), --models chooses, --all takes every CNN of torchvision and timm below a size, for hours.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _blocked import blocker, general
from _common import (
    FAILURES,
    Limit,
    add_jobs,
    choose_models,
    count_additions,
    demands_limit,
    jobs_of,
    message,
    parser,
    show,
)
from _records import Outcome, Store, code_version, share, summary, table_row
from _worker import Worker, WorkerError
from _zoo import ZooNet, everything, prepared, random_input, zoo
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree
from tqdm import tqdm

import rmfx
import rmfx.cost
from rmfx.testing import Equivalence, assert_equivalent, noise_floor

ERROR_LIMIT = 1e-10
NOISE_LIMIT = 10.0  # every layer rounds anew, and each rounding is magnified
SENSITIVITY_FLOOR = 1e-4  # a dropped skip must show up far above the error limit
OPEN_LIMIT = 5.0  # percent of the additions not blocked
LARGEST = 1e8  # an output beyond this says that the network's numbers explode
FEWEST_CONVS = 3  # a network with fewer convolutions that see neighbours is no CNN
RESULTS = Path(__file__).resolve().parent / "results"


class UnsuitableError(Exception):
    """The original cannot be built or run here, which says nothing about the compiler."""


# ---- one network --------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(net: ZooNet, *, small: bool = False) -> Outcome:
    """Converts one network with its even input and compares it at both sizes.

    Args:
        net: which network.
        small: use the small input shapes.

    Raises:
        UnsuitableError: the original does not work.
        AssertionError: the outputs differ in structure, shape or type.
    """
    start = time.perf_counter()
    even = random_input(net.shapes.small_even if small else net.shapes.even)
    odd = random_input(net.shapes.small_odd if small else net.shapes.odd)
    model = _original(net, even)
    begin = time.perf_counter()
    converted = rmfx.remove_residuals(model, even)
    pass_seconds = time.perf_counter() - begin
    checks = [assert_equivalent(model, converted, even, tolerance=math.inf)]
    at_odd, note = _compare_odd(model, converted, odd)
    checks += [at_odd] if at_odd else []
    least = rmfx.remove_residuals(model, even, minimise="macs", verify=False)
    plain = rmfx.is_plain(converted)
    sizes = (even, odd) if at_odd else (even,)
    return Outcome(
        network=net.name,
        note=note,
        code=code_version(),
        joins=min(len(check.joins) for check in checks),
        error_even=_largest_error(checks[0]),
        error_odd=_largest_error(at_odd) if at_odd else None,
        error_least=_largest_error(assert_equivalent(model, least, even, tolerance=math.inf)),
        noise=max(noise_floor(model, converted, x) for x in sizes),
        sensitivity=_finite(min(check.sensitivity for check in checks)),
        plain=plain,
        sequential=_sequential_error(converted, sizes) if plain else None,
        identical=_is_identical(model, even) if not rmfx.report(converted).removed else None,
        macs_ratio=_macs_ratio(model, converted, even),
        macs_ratio_least=_macs_ratio(model, least, even),
        pass_seconds=pass_seconds,
        seconds=time.perf_counter() - start,
        **_additions(model, converted, even),
    )


def _original(net: ZooNet, x: Tensor) -> nn.Module:
    """The network as it was, which must run and give numbers that mean something.

    Raises:
        UnsuitableError: it does not.
    """
    try:
        model = prepared(net, tuple(x.shape))
        tensors = [y for y in pytree.tree_leaves(model(x)) if isinstance(y, Tensor)]
    except FAILURES as error:
        raise UnsuitableError(message(error)) from error
    largest = max((float(y.abs().max()) for y in tensors), default=0.0)
    if not 0 < largest < LARGEST:
        raise UnsuitableError(f"the original's outputs reach {largest:.1e}")
    return model


def _compare_odd(
    model: nn.Module, converted: GraphModule, x: Tensor
) -> tuple[Equivalence | None, str]:
    """The comparison at the odd size, if both take it, and what there is to say if not."""
    try:
        model(x)
    except FAILURES:
        return None, "the original refuses the odd size"
    try:
        return assert_equivalent(model, converted, x, tolerance=math.inf), ""
    except rmfx.ShapeError:
        return None, "a ShapeError at the odd size"


def _additions(model: nn.Module, converted: GraphModule, x: Tensor) -> dict[str, Any]:
    """What became of the additions, as the outcome has it."""
    report = rmfx.report(converted)
    refused = [row for row in report.rows if row.status != "removed"]
    blocked: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    open_reasons: Counter[str] = Counter()
    graph = rmfx.trace(model, x).graph if refused else None
    for row in refused:
        reason = general(row.reason) or "no reason given"
        reasons[reason] += 1
        found = blocker(row, report, graph) if graph else None
        if found:
            blocked[found] += 1
        else:
            open_reasons[reason] += 1
    return {
        "adds": len(report.rows),
        "removed": report.removed,
        "left": max(report.adds_left, count_additions(converted)),
        "blocked": dict(blocked),
        "reasons": dict(reasons),
        "open_reasons": dict(open_reasons),
    }


def _macs_ratio(model: nn.Module, converted: GraphModule, x: Tensor) -> float | None:
    before = rmfx.cost.count(rmfx.fold_batch_norm(model, x), x).macs
    return rmfx.cost.count(converted, x).macs / before if before else None


def _is_identical(model: nn.Module, x: Tensor) -> bool:
    """Whether a conversion that has nothing to do changes no bit."""
    untouched = rmfx.remove_residuals(model, x, fold_batch_norm=False)
    before, after = pytree.tree_leaves(model(x)), pytree.tree_leaves(untouched(x))
    pairs = zip(before, after, strict=True)
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))


def _largest_error(check: Equivalence) -> float:
    return max([check.error, *(join.error for join in check.joins)])


def _sequential_error(converted: GraphModule, inputs: Sequence[Tensor]) -> float:
    chain = rmfx.to_sequential(converted)
    errors = []
    for x in inputs:
        expected = converted(x)
        errors.append(float((expected - chain(x)).abs().max() / expected.abs().max()))
    return max(errors)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ---- one network, whatever it does --------------------------------------------------------------


def attempt(name: str, small: bool, most_parameters: float) -> Outcome:
    """What became of a network of the list or of the libraries; nothing is raised.

    Args:
        name: which one.
        small: use the small input shapes.
        most_parameters: a larger one is skipped.
    """
    listed = zoo()
    net = listed[name] if name in listed else everything()[name]
    code = code_version()
    try:
        if name not in listed:
            check_size(net, most_parameters)
        return evaluate(net, small=small)
    except UnsuitableError as error:
        state = "failed" if name in listed else "skipped"
        return Outcome(name, state, f"the original: {error}", code)  # type: ignore[arg-type]
    except FAILURES as error:
        return Outcome(name, "failed", message(error), code)


def check_size(net: ZooNet, most_parameters: float) -> None:
    """Looks at a network without memory for its weights.

    Raises:
        UnsuitableError: it is too large, or no CNN.
    """
    try:
        with torch.device("meta"):
            model = net.build()
    except FAILURES:
        return  # some initialise with numbers they read; the memory limit guards against these
    size = sum(p.numel() for p in model.parameters())
    if size > most_parameters:
        raise UnsuitableError(f"{size / 1e6:.0f} million parameters")
    convs = [m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    if sum(m.kernel_size > m.stride for m in convs) < FEWEST_CONVS:
        raise UnsuitableError("no CNN")


# ---- the demands --------------------------------------------------------------------------------


def failures(net: ZooNet, outcome: Outcome) -> list[str]:
    """What the outcome of one network lacks, in words; empty if nothing."""
    if outcome.state != "done":
        return [outcome.note] if outcome.state == "failed" else []
    demands = {
        "relative error": outcome.error is not None and _unexplained(outcome) <= ERROR_LIMIT,
        "a refusal without a reason": "no reason given" not in outcome.reasons,
    }
    if net.kind == "whole":
        demands |= _whole_demands(net, outcome)
    if net.kind in ("refused", "untouched"):
        what = f"left alone for {', '.join(outcome.blocked) or 'no known reason'}"
        right = not outcome.refused_open and net.causes >= set(outcome.blocked)
        demands[f"{outcome.removed} additions removed"] = outcome.removed == 0
        demands[what] = right and bool(outcome.adds) == (net.kind == "refused")
        demands["not identical"] = outcome.identical is True
    return [what for what, holds in demands.items() if not holds]


def _whole_demands(net: ZooNet, outcome: Outcome) -> dict[str, bool]:
    all_compared = outcome.joins == net.adds or (net.hidden and outcome.joins > 0)
    demands = {
        f"{outcome.left} additions left": outcome.left == 0,
        f"{outcome.adds} report rows for {net.adds} additions": outcome.adds == net.adds,
        f"{outcome.joins} of {net.adds} joins compared": all_compared,
        "not compared at the odd size": outcome.error_odd is not None,
        "comparison not sensitive": (outcome.sensitivity or 0) >= SENSITIVITY_FLOOR,
    }
    if net.chain:
        demands["not plain"] = outcome.plain
        error = outcome.sequential
        demands["to_sequential differs"] = error is not None and error <= ERROR_LIMIT
    return demands


def _unexplained(outcome: Outcome) -> float:
    """The error; 0 where it is above the limit only because the network magnifies rounding."""
    error = outcome.error or 0.0
    explained = error <= NOISE_LIMIT * (outcome.noise or 0.0)
    return 0.0 if explained and error > ERROR_LIMIT else error


def limits(outcomes: Sequence[Outcome], problems: Sequence[str]) -> list[Limit]:
    """The limits for all networks together."""
    failed = sum(o.state == "failed" for o in outcomes)
    worst = max((_unexplained(o) for o in outcomes), default=0.0)
    return [
        Limit("networks that raise", failed, 0),
        Limit("largest relative error", worst, ERROR_LIMIT),
        Limit("percent left of what is not blocked", 100 * (1 - share(outcomes)), OPEN_LIMIT),
        demands_limit(problems),
    ]


# ---- the command --------------------------------------------------------------------------------


def run(names: Sequence[str], store: Store, options: argparse.Namespace) -> None:
    """Adds to the store what it lacks."""
    code = code_version()
    missing = [name for name in names if options.fresh or not store.has(name, code)]
    bounds = (options.seconds, options.memory, options.small, options.most_parameters * 1e6)
    found = jobs_of(options).results(bounded, [(name, code, *bounds) for name in missing])
    for outcome in tqdm(found, total=len(missing), unit="network"):
        store.add(outcome)


def bounded(
    name: str, code: str, seconds: float, memory: float, small: bool, most: float
) -> Outcome:
    """What became of one network, in a process of its own that may take so long and so much."""
    worker = Worker(attempt, seconds, memory)
    try:
        outcome: Outcome = worker(name, small, most)
    except WorkerError as error:
        return Outcome(name, "failed", str(error), code)
    finally:
        worker.close()
    return outcome


def _add_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--small", action="store_true", help="small inputs, faster")
    made.add_argument("--all", action="store_true", help="every CNN of torchvision and timm")
    made.add_argument("--fresh", action="store_true", help="repeat what is done already")
    made.add_argument("--results", type=Path, default=RESULTS, help="folder of the files written")
    for name, default, text in (
        ("--most-parameters", 60.0, "skip larger networks of --all, in millions (default 60)"),
        ("--seconds", 900.0, "give up a network after this time (default 900)"),
        ("--memory", 12.0, "for one network, in GB (default 12)"),
    ):
        made.add_argument(name, type=float, default=default, help=text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table and writes the files; returns 1 if a limit is exceeded."""
    listed, others = zoo(), everything()
    nets = listed | others
    made = parser(__doc__)
    _add_options(made)
    add_jobs(made, default=1)
    options, names = choose_models(made, nets, arguments, default=listed)
    if options.all:
        names = list(others)
    stem = "zoo" + "_all" * options.all + "_small" * options.small
    store = Store(options.results / f"{stem}.json")
    run(names, store, options)
    outcomes = [store.outcomes[name] for name in names]
    problems = [f"{o.network}: {what}" for o in outcomes for what in failures(nets[o.network], o)]
    found = limits(outcomes, problems)
    store.write_markdown(names, found)
    notes = "\n".join([summary(outcomes), *problems])
    return show(list(map(table_row, outcomes)), found, as_json=options.json, notes=notes)


if __name__ == "__main__":
    sys.exit(main())
