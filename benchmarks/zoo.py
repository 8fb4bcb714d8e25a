"""The must-show table: every network of the zoo, converted once, compared at two input sizes.

In float64 and with random batch norm statistics each network is converted with an even-sized
example and compared with the original at that size and at an odd size. The comparison is made at
the output and at EVERY residual join; "sensitivity" is the smallest error that a dropped operand
would have caused at its join, so it says how much the comparison is worth. Limits for every
network: no addition left, one report row per addition, relative error at most 1e-10; classifiers
must also be plain and survive `to_sequential`. Exit code 1 if one is exceeded.

All networks at full size take about ten minutes on two cores; --small takes one, --models chooses.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from _common import Limit, choose_models, count_additions, parser, show
from _zoo import ZooNet, prepared, random_input, zoo
from torch import Tensor
from torch.fx import GraphModule
from tqdm import tqdm

import rmfx
from rmfx.testing import Equivalence, assert_equivalent

ERROR_LIMIT = 1e-10
SENSITIVITY_FLOOR = 1e-4  # a dropped skip must show up far above the error limit


@dataclass(frozen=True)
class Outcome:
    """What the conversion of one network gave.

    Attributes:
        network: its name.
        adds: residual additions of the original, known beforehand.
        rows: sites in the report.
        left: additions left.
        joins: joins whose value was compared, at each size.
        error_even, error_odd: largest relative error at the output and at every join.
        sensitivity: smallest error at a join that dropping one operand would have caused.
        plain: whether the result is a chain.
        sequential: largest relative error of `to_sequential` at both sizes; None if not plain.
        convert_seconds, total_seconds: time of the conversion, and of everything.
    """

    network: str
    adds: int
    rows: int
    left: int
    joins: int
    error_even: float
    error_odd: float
    sensitivity: float
    plain: bool
    sequential: float | None
    convert_seconds: float
    total_seconds: float


@torch.no_grad()
def evaluate(net: ZooNet, *, small: bool = False) -> Outcome:
    """Converts one network with its even input and compares it at both sizes.

    Args:
        net: which network.
        small: use the small input shapes.

    Raises:
        AssertionError: a value at a join or at the output differs by more than the limit.
    """
    start = time.perf_counter()
    model = prepared(net)
    even = random_input(net.small_even if small else net.even)
    odd = random_input(net.small_odd if small else net.odd)
    begin = time.perf_counter()
    converted = rmfx.remove_residuals(model, even)
    convert_seconds = time.perf_counter() - begin
    report = rmfx.report(converted)
    checks = [assert_equivalent(model, converted, x, tolerance=ERROR_LIMIT) for x in (even, odd)]
    plain = rmfx.is_plain(converted)
    return Outcome(
        network=net.name,
        adds=net.adds,
        rows=len(report.rows),
        left=max(report.adds_left, count_additions(converted)),
        joins=min(len(check.joins) for check in checks),
        error_even=_largest_error(checks[0]),
        error_odd=_largest_error(checks[1]),
        sensitivity=min(check.sensitivity for check in checks),
        plain=plain,
        sequential=_sequential_error(converted, (even, odd)) if plain else None,
        convert_seconds=convert_seconds,
        total_seconds=time.perf_counter() - start,
    )


def failures(net: ZooNet, outcome: Outcome) -> list[str]:
    """What the outcome of one network lacks, in words; empty if nothing."""
    demands = {
        f"{outcome.left} additions left": outcome.left == 0,
        f"{outcome.rows} report rows for {net.adds} additions": outcome.rows == net.adds,
        f"{outcome.joins} of {net.adds} joins compared": outcome.joins == net.adds,
        "error at the usual size": outcome.error_even <= ERROR_LIMIT,
        "error at the odd size": outcome.error_odd <= ERROR_LIMIT,
        "comparison not sensitive": outcome.sensitivity >= SENSITIVITY_FLOOR,
    }
    if net.classifier:
        demands["not plain"] = outcome.plain
        exact = outcome.sequential is not None and outcome.sequential <= ERROR_LIMIT
        demands["to_sequential differs"] = exact
    return [what for what, holds in demands.items() if not holds]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns 1 if a limit is exceeded."""
    nets = zoo()
    options_parser = parser(__doc__)
    options_parser.add_argument("--small", action="store_true", help="small inputs, much faster")
    options, names = choose_models(options_parser, nets, arguments)
    outcomes: list[Outcome] = []
    problems: list[str] = []
    progress = tqdm(names)
    for name in progress:
        progress.set_description(name)
        try:
            outcome = evaluate(nets[name], small=options.small)
        except (AssertionError, RuntimeError, rmfx.RmfxError) as error:
            problems.append(f"{name}: {error}")
            continue
        outcomes.append(outcome)
        problems += [f"{name}: {what}" for what in failures(nets[name], outcome)]
    limits = [Limit("failed demands", len(problems), 0)]
    notes = "\n".join(problems)
    return show([vars(o) for o in outcomes], limits, as_json=options.json, notes=notes)


def _largest_error(check: Equivalence) -> float:
    return max([check.error, *(join.error for join in check.joins)])


def _sequential_error(converted: GraphModule, inputs: Sequence[Tensor]) -> float:
    """Largest relative difference between a plain graph and its `nn.Sequential`."""
    chain = rmfx.to_sequential(converted)
    errors = []
    for x in inputs:
        expected = converted(x)
        errors.append(float((expected - chain(x)).abs().max() / expected.abs().max()))
    return max(errors)


if __name__ == "__main__":
    sys.exit(main())
