"""Gives one network to one pass and compares; a network on which that fails is made small."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmfx.choices import PASSES
from rmfx.errors import OptionError, TraceError, first_line, quiet_logs
from rmfx.ir.spec import enforced

from .case import Case
from .compare import NoNumbersError, TracedOnce, compare, rows_of
from .compiled import compare_compiled, compiles
from .fuzz_report import Failure, FuzzReport, Trial, without_names
from .networks.spec import NetworkSpec
from .script import script
from .shrink import shrink

WRONG = "wrong numbers"


class NotHeldError(Exception):
    """Nothing can trace the network in this way: nothing is said about the pass."""


def try_case(report: FuzzReport, case: Case, apply: Callable[..., Any], example: int) -> None:
    """Count what becomes of one network; a failure is noted."""
    try:
        for trial in _check(case, apply):
            report.count(trial, case.spec.dtype)
        report.without_inputs += case.without_inputs
    except (NotHeldError, NoNumbersError) as error:
        report.skipped += 1
        report.untraced[without_names(str(error))] += 1
    except (Exception, SystemExit) as error:  # noqa: BLE001  (what a pass raises is looked for)
        report.failure = _failure(case, example, _kind(error), str(error))


def _check(case: Case, apply: Callable[..., Any]) -> Iterator[Trial]:
    """Apply the pass and compare, with example inputs and perhaps without; give the results.

    Raises:
        NotHeldError: the network itself does not run, or nothing can trace it.
    """
    try:
        yield from _check_running(case, apply)
    except (NotHeldError, NoNumbersError):
        raise
    except Exception as error:
        own = _own_failure(case)
        if own is None:
            raise
        raise NotHeldError(_said(own)) from error


def _own_failure(case: Case) -> Exception | None:
    """What the network itself raises on its inputs, as those that its type has no kernel for do."""
    try:
        case.spec.build(seed=0)(*case.spec.inputs(seed=0))
    except Exception as error:  # noqa: BLE001  (torch may raise anything)
        return error
    return None


def _check_running(case: Case, apply: Callable[..., Any]) -> Iterator[Trial]:
    """The same of a network that runs."""
    model, inputs = case.spec.build(seed=0), case.spec.inputs(seed=0)
    options = case.options(inputs)
    if case.frontend == "compiled":
        yield _check_compiled(case, model, inputs)
        return
    given, before = held(model, inputs, case.frontend)
    source = TracedOnce()
    for arguments in ((given, inputs), (given,)) if case.without_inputs else ((given, inputs),):
        after = _applied(case, apply, arguments, options)
        bounds = options.get("input_range")
        found = compare(before, after, inputs, input_range=bounds, source=source)
        yield Trial(rows_of(after), *found)


def _applied(
    case: Case, apply: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    """What the pass makes of the network.

    Raises:
        NotHeldError: a pass of rmfx cannot trace it, and nor can torch.
    """
    try:
        with enforced():
            made = apply(*arguments, **options)
        if not callable(made):
            raise OptionError(f"the pass returned {made!r:.40}, which is no network")
        return made
    except TraceError as error:
        if case.transform not in PASSES or is_traceable(case, arguments):
            raise
        raise NotHeldError(str(error)) from error


def is_traceable(case: Case, arguments: tuple[Any, ...]) -> bool:
    """Whether torch can trace the network with what the pass was given."""
    ways = ("traced", "exported") if len(arguments) > 1 else ("traced",)
    for way in ways:
        try:
            held(case.spec.build(seed=0), case.spec.inputs(seed=0), way)
        except NotHeldError:
            continue
        return True
    return False


def _check_compiled(case: Case, model: nn.Module, inputs: tuple[Tensor, ...]) -> Trial:
    """Compare every answer of the compiled network, if Dynamo can hold it."""
    try:
        return Trial(*compare_compiled(model, inputs, case.changes, case.options(inputs)))
    except AssertionError:
        raise
    except Exception as error:
        if compiles(case.spec.build(seed=0), inputs):
            raise
        raise NotHeldError(_said(error)) from error


def held(model: nn.Module, inputs: tuple[Tensor, ...], frontend: str) -> tuple[Any, nn.Module]:
    """The network as it is given to the pass, and as the module to compare with."""
    if frontend == "module":
        return model, model
    try:
        if frontend == "traced":
            traced = fx.symbolic_trace(model)
            return traced, traced
        with quiet_logs():
            program = torch.export.export(model, inputs)
            return program, program.module()
    except Exception as error:
        raise NotHeldError(_said(error)) from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _kind(error: BaseException) -> str:
    return WRONG if type(error) is AssertionError else type(error).__name__


def _failure(case: Case, example: int, kind: str, message: str) -> Failure:
    return Failure(example, kind, message, case.spec, script(case, f"{kind}: {message}"))


def made_small(failure: Failure, case: Case, apply: Callable[..., Any]) -> Failure:
    """The failure with the smallest network found that fails in the same way."""
    said: dict[NetworkSpec, str] = {}

    def fails(spec: NetworkSpec) -> bool:
        try:
            for _ in _check(case.of(spec), apply):
                pass
        except (Exception, SystemExit) as error:  # noqa: BLE001  (as above)
            said[spec] = str(error)
            return _kind(error) == failure.kind
        return False

    spec = shrink(case.spec, fails)
    fails(spec)
    message = said.get(spec, "it failed once and not again")
    return _failure(case.of(spec), failure.example, failure.kind, message)
