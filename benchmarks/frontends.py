"""The same network, handed over in every way that rmfx takes one: the same rows, the same numbers.

Each network of the zoo that must convert whole, in float64 and with random batch norm statistics,
is converted as

- module: `nn.Module` and example inputs,
- fx: the `GraphModule` of `torch.fx.symbolic_trace`,
- export: the `ExportedProgram` of `torch.export.export`,
- dynamo: Dynamo's graph, inside a backend of one's own,
- backend: Dynamo's graph, by `torch.compile(model, backend="rmfx")` with the eager backend behind,
- inductor (with --inductor): the same with inductor behind, in float32.

Limits for each: no addition left, by the report and counted in the graph; as many rows as the
network has additions, and the same rows as the first way (`source` is compared where it is known:
torch.fx does not record it); relative error at most 1e-10, for the first three ways at every join
as well. With inductor, in float32 and against float64, the median of five inputs: 1e-5, or twice
what plain inductor with frozen weights makes, where that is more. Exit code 1 if one is exceeded.

With --others it is all other networks of the zoo, as module, export and backend. Most have
additions that cannot be removed, and a tracer may write them in another way, so the rows may
differ; where they do, the numbers of the ways stand side by side. Limits for each: nothing raises;
every addition is removed or refused with a reason; relative error as above.

The batch is 2, so that nothing specialises on a batch of 1, and inputs are small; --full takes
those of zoo.py. cifar1202A and B alone take most of the time, --models leaves them out.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from _common import (
    FAILURES,
    choose_models,
    count_additions,
    demands_limit,
    each,
    message,
    parser,
    show,
)
from _zoo import ZooNet, prepared, random_input, zoo
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import rmfx
from rmfx.files.trials import relative_error
from rmfx.testing import assert_equivalent

BATCH = 2
ERROR_LIMIT = 1e-10
FLOAT32_LIMIT = 1e-5
INPUTS = 5
INDUCTOR_SKIPS = ("cifar1202A", "cifar1202B")  # thousands of kernels, of which none is new
OTHER_WAYS = ("module", "export", "backend")

Row = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What came of a network in one of the ways to hold it.

    Attributes:
        rows: of the report, with plain values.
        left: additions left, by the report or counted in the graph, whichever are more.
        joins: joins whose values were compared; None where only the output can be.
        error: largest relative error at the output and at every join compared.
        limit: the largest that is allowed.
    """

    rows: list[Row]
    left: int
    joins: int | None
    error: float
    limit: float = ERROR_LIMIT


# ---- the ways to hold a network -----------------------------------------------------------------


def from_module(model: nn.Module, x: Tensor) -> Result:
    """The module itself."""
    return _converted(model, rmfx.remove_residuals(model, x), x)


def from_fx(model: nn.Module, x: Tensor) -> Result:
    """The graph that plain torch.fx makes of it."""
    given = fx.symbolic_trace(model)
    # Compared with what was given: torch.fx makes a dict of an OrderedDict.
    return _converted(given, rmfx.remove_residuals(given, x), x)


def from_export(model: nn.Module, x: Tensor) -> Result:
    """The program that torch.export makes of it, for this size."""
    return _converted(model, rmfx.remove_residuals(torch.export.export(model, (x,))), x)


def from_dynamo(model: nn.Module, x: Tensor) -> Result:
    """Dynamo's graph, converted inside a backend of one's own."""
    made: list[fx.GraphModule] = []

    def own(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        made.append(rmfx.remove_residuals(gm, inputs))
        return made[-1].forward

    error = relative_error(model(x), torch.compile(model, backend=own)(x))
    return _result(list(map(rmfx.report, made)), list(map(count_additions, made)), error)


def from_backend(model: nn.Module, x: Tensor) -> Result:
    """Dynamo's graph, converted by rmfx's backend and run as it is."""
    left: list[int] = []

    def eager(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        left.append(count_additions(gm))
        return gm.forward

    return _compiled(model, x, {"backend": eager}, left)


def from_inductor(model: nn.Module, x: Tensor) -> Result:
    """The same in float32, compiled by inductor as rmfx's backend does it by default."""
    left: list[int] = []

    def look(graph: fx.Graph) -> None:
        left.append(count_additions(fx.GraphModule(graph.owning_module or nn.Module(), graph)))

    single = copy.deepcopy(model).float()
    options = {"backend": "inductor", "backend_options": {"pre_grad_custom_pass": look}}
    result = _compiled(single, x.float(), options, left)
    # A float32 network has rounding of its own: inductor's with batch norm folded is the measure.
    inputs = [random_input(tuple(x.shape), seed) for seed in range(INPUTS)]
    torch._dynamo.reset()
    error = _median_error(model, torch.compile(single, backend="rmfx"), inputs)
    torch._dynamo.reset()
    with torch._inductor.config.patch(freezing=True):
        plain = _median_error(model, torch.compile(single), inputs)
    return replace(result, error=error, limit=max(FLOAT32_LIMIT, 2 * plain))


def _median_error(model: nn.Module, single: Any, inputs: Sequence[Tensor]) -> float:
    """The median over some inputs of the error that a float32 version of a model makes."""
    errors = []
    for x in inputs:
        found = pytree.tree_map_only(Tensor, lambda y: y.double(), single(x.float()))
        errors.append(relative_error(model(x), found))
    return statistics.median(errors)


Way = Callable[[nn.Module, Tensor], Result]
WAYS: dict[str, Way] = {
    "module": from_module,
    "fx": from_fx,
    "export": from_export,
    "dynamo": from_dynamo,
    "backend": from_backend,
    "inductor": from_inductor,
}


def _converted(before: nn.Module, after: fx.GraphModule, x: Tensor) -> Result:
    check = assert_equivalent(before, after, x, tolerance=ERROR_LIMIT)
    error = max([check.error, *(join.error for join in check.joins)])
    return _result([rmfx.report(after)], [count_additions(after)], error, joins=len(check.joins))


def _compiled(model: nn.Module, x: Tensor, options: dict[str, Any], left: list[int]) -> Result:
    """`left` is filled by the backend behind, once for each graph."""
    reports: list[rmfx.Report] = []
    options = options | {"on_report": reports.append}
    compiled = torch.compile(model, backend="rmfx", options=options)
    error = relative_error(model(x), compiled(x))
    if len(left) != len(reports):
        raise AssertionError(f"{len(left)} graphs were compiled, {len(reports)} were converted")
    return _result(reports, left, error)


def _result(
    reports: Sequence[rmfx.Report],
    counted: Sequence[int],
    error: float,
    joins: int | None = None,
) -> Result:
    rows = [row for report in reports for row in report.to_dict()["sites"]]
    reported = sum(report.adds_left for report in reports)
    return Result(rows, max(reported, sum(counted)), joins, error)


# ---- the demands --------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(net: ZooNet, ways: Sequence[str], *, full: bool = False) -> dict[str, Result | str]:
    """Converts one network in several ways; of a way that fails, what it says.

    Args:
        net: which network.
        ways: names of `WAYS`.
        full: use the full input shape.
    """
    shape = net.shapes.even if full else net.shapes.small_even
    model = prepared(net, shape)
    x = random_input((BATCH, *shape[1:]))
    return {way: attempt(WAYS[way], model, x) for way in ways}


def attempt(way: Way, model: nn.Module, x: Tensor) -> Result | str:
    """What comes of a network in one of the `WAYS`; what the error says where there is one."""
    torch._dynamo.reset()
    try:
        return way(model, x)
    except FAILURES as error:
        return message(error)


def failures(net: ZooNet, results: dict[str, Result | str]) -> list[str]:
    """What the results of one network lack, in words; empty if nothing."""
    first = next((r for r in results.values() if isinstance(r, Result)), None)
    problems = []
    for way, result in results.items():
        if isinstance(result, str) or first is None:
            problems.append(f"{way}: {result}")
            continue
        demands = _common_demands(result)
        if net.kind == "whole":
            demands |= _whole_demands(net, result)
            difference = _difference(first.rows, result.rows)
            demands[difference] = not difference
        problems += [f"{way}: {what}" for what, holds in demands.items() if not holds]
    return problems


def _common_demands(result: Result) -> dict[str, bool]:
    refused = [row for row in result.rows if row["status"] != "removed"]
    unexplained = ", ".join(row["join"] for row in refused if not row["reason"])
    return {
        f"refused without a reason: {unexplained}": not unexplained,
        f"relative error {result.error:.3g}": result.error <= result.limit,
    }


def _whole_demands(net: ZooNet, result: Result) -> dict[str, bool]:
    all_compared = result.joins in (None, net.adds) or net.hidden
    return {
        f"{result.left} additions left": result.left == 0,
        f"{len(result.rows)} report rows for {net.adds} additions": len(result.rows) == net.adds,
        f"{result.joins} of {net.adds} joins compared": all_compared,
    }


def _difference(expected: Sequence[Row], found: Sequence[Row]) -> str:
    """The first difference between the rows of two reports, in words; "" if there is none."""
    if len(expected) != len(found):
        return f"{len(found)} rows instead of {len(expected)}"
    for number, (a, b) in enumerate(zip(expected, found, strict=True)):
        for key in a:
            if a[key] != b[key] and not (key == "source" and None in (a[key], b[key])):
                return f"row {number}: {key} is {b[key]!r} instead of {a[key]!r}"
    return ""


def _table_row(net: ZooNet, results: dict[str, Result | str], seconds: float) -> Row:
    done = [result for result in results.values() if isinstance(result, Result)]
    equal = len(done) == len(results) and not any(_difference(done[0].rows, r.rows) for r in done)
    errors = {way: r.error if isinstance(r, Result) else None for way, r in results.items()}
    return {
        "network": net.name,
        "rows": _side_by_side([len(r.rows) for r in done]),
        "removed": _side_by_side([sum(row["status"] == "removed" for row in r.rows) for r in done]),
        "left": max((r.left for r in done), default=None),
        **errors,
        "rows equal": "yes" if equal else "NO" if net.kind == "whole" else "no",
        "seconds": round(seconds, 1),
    }


def _side_by_side(numbers: Sequence[int]) -> str:
    """One number where all agree, else those of all ways."""
    return "/".join(map(str, numbers if len(set(numbers)) > 1 else numbers[:1]))


def _ways(options: argparse.Namespace, name: str) -> Sequence[str]:
    if options.others:
        return OTHER_WAYS
    has_inductor = options.inductor and name not in INDUCTOR_SKIPS
    return [way for way in WAYS if way != "inductor" or has_inductor]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns 1 if a limit is exceeded."""
    nets = zoo()
    made = parser(__doc__)
    made.add_argument("--full", action="store_true", help="larger inputs, much slower")
    made.add_argument("--inductor", action="store_true", help="inductor too, in float32")
    made.add_argument("--others", action="store_true", help="networks with refusals, in three ways")
    options, names = choose_models(made, nets, arguments, default=())
    if not options.models:
        names = [name for name, net in nets.items() if (net.kind != "whole") == options.others]
    rows: list[Row] = []
    problems: list[str] = []
    for name in each(names):
        start = time.perf_counter()
        results = evaluate(nets[name], _ways(options, name), full=options.full)
        rows.append(_table_row(nets[name], results, time.perf_counter() - start))
        problems += [f"{name}: {what}" for what in failures(nets[name], results)]
    if options.inductor:
        rows = [{key: row.get(key) for key in max(rows, key=len)} for row in rows]
    limit = demands_limit(problems)
    return show(rows, [limit], as_json=options.json, notes="\n".join(problems))


if __name__ == "__main__":
    sys.exit(main())
