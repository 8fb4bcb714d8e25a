"""Tries a pass on random networks and makes the first that it breaks small.

    from rmfx.fuzz import fuzz

    report = fuzz("mypackage.passes:my_pass", examples=500, seed=1)
    print(report)  # what the networks were made of, what the pass did
    if report.failure:
        print(report.failure.script)  # a program that fails

Example i of seed s is always the same network, whatever the other options are, but that "compiled"
ones are small. The network, the pass's result and every join that its report lists are compared by
`rmfx.testing.assert_equivalent`, and by `rmfx.verify` at other sizes than the example's; a size on
which the original fails, or which the result refuses itself, says nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from random import Random
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmfx.choices import FRONTENDS, PASSES, STRATEGIES
from rmfx.errors import OptionError, TraceError, first_line
from rmfx.ir.spec import enforced
from rmfx.options import check_choice, count_of, number_of
from rmfx.passes.batch_norm import fold_batch_norm
from rmfx.passes.branches import merge_branches
from rmfx.passes.dead_channels import eliminate_dead_channels
from rmfx.passes.linear import merge_convs
from rmfx.passes.noop import remove_noops
from rmfx.passes.residual import remove_residuals
from rmfx.report import SiteReport
from rmfx.table import Column, table
from rmfx.testing import FEATURES, Equivalence, NetworkSpec, random_block, random_network
from rmfx.testing.compare import SIZES, TracedOnce, compare, rows_of
from rmfx.testing.compiled import CHANGES, MOST_CHANGES, MOVED, compare_compiled, compiles
from rmfx.testing.script import Case, script
from rmfx.testing.shrink import shrink

__all__ = [
    "COUNTED",
    "FRONTENDS",
    "PASSES",
    "WRONG",
    "Failure",
    "FuzzReport",
    "compare",
    "compare_compiled",
    "draw_case",
    "fuzz",
    "load_pass",
    "without_names",
]
_VERBS: dict[str, Callable[..., Any]] = {
    verb.__name__: verb
    for verb in (
        *(remove_residuals, fold_batch_norm, merge_branches, merge_convs, remove_noops),
        eliminate_dead_channels,
    )
}
WRONG = "wrong numbers"
COSTLY = ("scale", "odd-pair")  # ways past an activation that cost digits


# what is counted: what networks are made of, at which sizes they ran, what changed between calls
COUNTED = FEATURES | {*SIZES} | {f"{change} between calls" for change in CHANGES}


@dataclass(frozen=True)
class Failure:
    """The first network on which the pass failed, made small.

    Attributes:
        example: the number of the network that was drawn.
        kind: "wrong numbers" on the example, "VerificationError" on other inputs, or the name of
            the error that the pass or its result raised.
        message: what was said about the small network.
        spec: the small network.
        script: a program that builds it and fails in the same way.
    """

    example: int
    kind: str
    message: str
    spec: NetworkSpec
    script: str


@dataclass
class FuzzReport:
    """What was tried. `str()` gives tables, `to_dict` what JSON can hold.

    Attributes:
        name: the pass.
        frontend: how the networks were held.
        seed: of the draws.
        examples: networks tried.
        without_inputs: of those, how many were also given to the pass without example inputs.
        skipped: networks that nothing can trace in this way; they count as tried.
        untraced: why, by what torch says without the names and numbers of one network.
        features: for each of `COUNTED`, in how many networks it occurred.
        removed: sites removed, by strategy and exactness.
        refused: sites refused, by reason without its names and numbers.
        joins: joins whose values were compared.
        errors: the largest relative error of an output or a join, by the network's type.
        failure: None where the pass held.
    """

    name: str
    frontend: str
    seed: int
    examples: int = 0
    without_inputs: int = 0
    skipped: int = 0
    untraced: Counter[str] = field(default_factory=Counter)
    features: Counter[str] = field(default_factory=Counter)
    removed: Counter[tuple[str, str]] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    joins: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    failure: Failure | None = None

    @property
    def error(self) -> float:
        """The largest relative error of a network in float64."""
        return self.errors.get("float64", 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists."""
        failure = self.failure and {
            "example": self.failure.example,
            "kind": self.failure.kind,
            "message": self.failure.message,
            "spec": repr(self.failure.spec),
            "script": self.failure.script,
        }
        return {
            "pass": self.name,
            "frontend": self.frontend,
            "seed": self.seed,
            "examples": self.examples,
            "without_inputs": self.without_inputs,
            "skipped": self.skipped,
            "untraced": dict(self.untraced.most_common()),
            "removed": self.removed.total(),
            "refused": self.refused.total(),
            "joins": self.joins,
            "error": self.error,
            "errors": self.errors,
            "features": {name: self.features[name] for name in sorted(COUNTED)},
            "strategies": [
                {"strategy": strategy, "exactness": exactness, "sites": count}
                for (strategy, exactness), count in self.removed.most_common()
            ],
            "reasons": dict(self.refused.most_common()),
            "failure": failure,
        }

    def __str__(self) -> str:
        features = [(name, self.features[name]) for name in sorted(COUNTED)]
        removed = [(*key, count) for key, count in self.removed.most_common()]
        parts = [
            _counts(features, "feature", "networks"),
            _counts(removed, "strategy", "exactness", "sites removed"),
            _counts(self.refused.most_common(), "reason", "sites refused"),
            _counts(self.untraced.most_common(), "why it cannot be traced", "networks"),
            self.summary(),
        ]
        return "\n\n".join(filter(None, parts))

    def summary(self) -> str:
        """One paragraph: how much was tried, and the largest error."""
        coarse = "".join(f", {e:.1e} in {t}" for t, e in self.errors.items() if t != "float64")
        seen = sum(self.features[name] > 0 for name in COUNTED)
        skipped = f", {self.skipped} of which torch cannot trace" if self.skipped else ""
        return (
            f"{self.examples} networks (seed {self.seed}, {self.frontend}){skipped} through"
            f" {self.name}, {self.without_inputs} of them without example inputs too;"
            f" {seen} of {len(COUNTED)} features.\n"
            f"{self.removed.total()} sites removed, {self.refused.total()} refused,"
            f" {self.joins} joins compared; largest error {self.error:.1e}{coarse}."
        )


def _counts(rows: Sequence[tuple[Any, ...]], *titles: str) -> str:
    """A table that counts something: what comes first, its number last."""
    first, *others = (Column(title, itemgetter(i)) for i, title in enumerate(titles))
    others[-1] = replace(others[-1], right=True)
    return table(rows, [replace(first, width=72), *others])


def fuzz(
    transform: str = "remove_residuals",
    *,
    examples: int | None = 100,
    seed: int = 0,
    frontend: str = "module",
    activation: str | tuple[str, ...] = "auto",
    seconds: float | None = None,
    step: Callable[[str], object] = lambda text: None,
) -> FuzzReport:
    """Try a pass on random networks until one fails.

    Args:
        transform: one of `PASSES`, or `package.module:function`, called as `f(model, inputs)`. It
            fails where it raises, an `RmfxError` included: every network drawn is a valid one.
        examples: how many networks; None for as many as `seconds` allow.
        seed: equal seeds draw equal networks.
        frontend: "module", "traced" (by `torch.fx`), "exported" (an `ExportedProgram`), or
            "compiled": calls of `torch.compile(model, backend="rmfx")` with changes of the weights
            in between, for the built-in remove_residuals.
        activation: the option of `remove_residuals`, or "random" for another one each time.
        seconds: draw no more networks after so many.
        step: called with a line about the state before each network.

    Returns:
        What was tried; its `failure` is None where the pass held.

    Raises:
        OptionError: an option has a value that is not known, or there is no such pass.

    >>> fuzz("remove_noops", examples=3).failure is None
    True
    """
    _check_options(transform, examples, seconds, frontend, activation)
    apply = load_pass(transform)
    report = FuzzReport(transform, frontend, seed)
    end = math.inf if seconds is None else time.monotonic() + seconds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a pass may warn; the exporter does so all the time
        while report.failure is None and report.examples != examples and time.monotonic() < end:
            step(f"{report.removed.total()} sites removed")
            example = report.examples
            case = draw_case(example, seed, transform, frontend, activation)
            report.features.update(case.features())
            report.examples += 1
            _try_case(report, case, apply, example)
    return report


def _check_options(
    transform: str,
    examples: int | None,
    seconds: float | None,
    frontend: str,
    activation: str | tuple[str, ...],
) -> None:
    if examples is None and seconds is None:
        raise OptionError("examples and seconds are both None: that would never end")
    if examples is not None:
        count_of("examples", examples)
    if seconds is not None:
        number_of("seconds", seconds, above=0)
    check_choice("frontend", frontend, FRONTENDS)
    if frontend == "compiled" and transform != "remove_residuals":
        raise OptionError("frontend='compiled' is for remove_residuals, which the backend runs")
    if activation != "auto" and transform != "remove_residuals":
        raise OptionError("activation is an option of remove_residuals only")
    known = (*STRATEGIES, "auto", "relu", "random")
    names = (activation,) if isinstance(activation, str) else activation
    unknown = [name for name in names if name not in known]
    if unknown or not names or (len(names) > 1 and not {*names} <= {*STRATEGIES, "relu"}):
        raise OptionError(f"activation={activation!r}: choose one or more of {', '.join(known)}")


# ---- passes -------------------------------------------------------------------------------------
def load_pass(name: str) -> Callable[..., Any]:
    """The built-in pass of that name, or the function that `package.module:function` names.

    Raises:
        OptionError: there is no such pass.
    """
    if name in PASSES:
        return _VERBS[name]
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise OptionError(
            f"pass {name!r}: choose from {', '.join(PASSES)}, or give package.module:function"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise OptionError(f"pass {name!r}: {error}") from error
    if not callable(found):
        raise OptionError(f"pass {name!r} is a {type(found).__name__}, not a function")
    return found  # type: ignore[no-any-return]


# ---- cases --------------------------------------------------------------------------------------
def draw_case(
    example: int,
    seed: int,
    transform: str = "remove_residuals",
    frontend: str = "module",
    activation: str | tuple[str, ...] = "auto",
) -> Case:
    """The network of that number, and the way in which it is handed to the pass."""
    random = Random(f"{seed}/{example}")
    compiled = frontend == "compiled"
    spec = random_block(random) if compiled else random_network(random)
    # Drawn for every pass, though not each has such options: equal seeds then draw equal ways.
    without = random.randrange(4) == 0
    bounded = random.randrange(2) == 0
    drawn: str | tuple[str, ...] = random.choice(["auto", "relu", "some", "some"])
    some = tuple(name for name in STRATEGIES if random.randrange(2)) or STRATEGIES[:1]
    if spec.dtype != "float64" and random.randrange(3):
        some = COSTLY
    ways = activation
    if activation == "random":
        ways = some if drawn == "some" else drawn
    return Case(
        spec,
        transform,
        frontend,
        ways,
        without_inputs=without and transform in PASSES and frontend in ("module", "traced"),
        input_range=bounded and transform == "remove_residuals",
        calibrated=transform == "remove_residuals" and ways != "auto" and not compiled,
        changes=_draw_changes(random, spec) if compiled else (),
    )


def _draw_changes(random: Random, spec: NetworkSpec) -> tuple[str, ...]:
    """What is done to the weights; nothing that would do nothing."""
    norms = ("module BN", "functional BN", "statistics that are views")
    has_norms = bool(spec.features().intersection(norms))
    names = [name for name in CHANGES if has_norms or name != MOVED]
    return tuple(random.choice(names) for _ in range(random.randint(1, MOST_CHANGES)))


class _NotHeldError(Exception):
    """Nothing can trace the network in this way: nothing is said about the pass."""


# What a pass did at every join, what was measured, at which of `SIZES`.
_Trial = tuple[tuple[SiteReport, ...], Equivalence, frozenset[str]]


def _try_case(report: FuzzReport, case: Case, apply: Callable[..., Any], example: int) -> None:
    """Count what becomes of one network; a failure is made small and noted."""
    try:
        for trial in _check(case, apply):
            _count(report, trial, case.spec.dtype)
        report.without_inputs += case.without_inputs
    except _NotHeldError as error:
        report.skipped += 1
        report.untraced[without_names(str(error))] += 1
    except Exception as error:  # noqa: BLE001  (whatever a pass raises is what is looked for)
        report.failure = _failure(case, apply, example, _kind(error))


def _check(case: Case, apply: Callable[..., Any]) -> Iterator[_Trial]:
    """Apply the pass and compare, with example inputs and perhaps without; give the results."""
    model, inputs = case.spec.build(seed=0), case.spec.inputs(seed=0)
    options = case.options(inputs)
    if case.frontend == "compiled":
        yield _check_compiled(case, model, inputs)
        return
    given, before = _held(model, inputs, case.frontend)
    source = TracedOnce()
    for arguments in ((given, inputs), (given,)) if case.without_inputs else ((given, inputs),):
        after = _applied(case, apply, arguments, options)
        bounds = options.get("input_range")
        yield rows_of(after), *compare(before, after, inputs, input_range=bounds, source=source)


def _applied(
    case: Case, apply: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    """What the pass makes of the network.

    Raises:
        _NotHeldError: a pass of rmfx cannot trace it, and nor can torch.
    """
    try:
        with enforced():
            made = apply(*arguments, **options)
        if not callable(made):
            raise OptionError(f"the pass returned {made!r:.40}, which is no network")
        return made
    except TraceError as error:
        if case.transform not in PASSES or _is_traceable(case, arguments):
            raise
        raise _NotHeldError(str(error)) from error


def _is_traceable(case: Case, arguments: tuple[Any, ...]) -> bool:
    """Whether torch can trace the network with what the pass was given."""
    ways = ("traced", "exported") if len(arguments) > 1 else ("traced",)
    for way in ways:
        try:
            _held(case.spec.build(seed=0), case.spec.inputs(seed=0), way)
        except _NotHeldError:
            continue
        return True
    return False


def _check_compiled(case: Case, model: nn.Module, inputs: tuple[Tensor, ...]) -> _Trial:
    """Compare every answer of the compiled network, if Dynamo can hold it."""
    try:
        return *compare_compiled(model, inputs, case.changes, case.options(inputs)), frozenset()
    except AssertionError:
        raise
    except Exception as error:
        if compiles(case.spec.build(seed=0), inputs):
            raise
        raise _NotHeldError(_said(error)) from error


def _held(model: nn.Module, inputs: tuple[Tensor, ...], frontend: str) -> tuple[Any, nn.Module]:
    """The network as it is given to the pass, and as the module to compare with."""
    if frontend == "module":
        return model, model
    try:
        if frontend == "traced":
            traced = fx.symbolic_trace(model)
            return traced, traced
        with _quiet_logs():
            program = torch.export.export(model, inputs)
            return program, program.module()
    except Exception as error:
        raise _NotHeldError(_said(error)) from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


@contextlib.contextmanager
def _quiet_logs() -> Iterator[None]:
    """Without what the exporter logs of a network that it cannot hold."""
    import logging

    logger = logging.getLogger("torch")
    former = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(former)


def _kind(error: Exception) -> str:
    return WRONG if type(error) is AssertionError else type(error).__name__


def _failure(case: Case, apply: Callable[..., Any], example: int, kind: str) -> Failure:
    """Make the network small for as long as it fails in the same way."""
    said: dict[NetworkSpec, str] = {}

    def fails(spec: NetworkSpec) -> bool:
        try:
            for _ in _check(case.of(spec), apply):
                pass
        except Exception as error:  # noqa: BLE001  (as above)
            said[spec] = str(error)
            return _kind(error) == kind
        return False

    spec = shrink(case.spec, fails)
    fails(spec)
    message = said.get(spec, "it failed once and not again")
    return Failure(example, kind, message, spec, script(case.of(spec), f"{kind}: {message}"))


# ---- counts -------------------------------------------------------------------------------------
def _count(report: FuzzReport, trial: _Trial, dtype: str) -> None:
    rows, found, sizes = trial
    report.features.update(sizes)
    for row in rows:
        if row.status == "removed":
            report.removed[row.strategy, row.exactness] += 1
        else:
            report.refused[without_names(row.reason)] += 1
    report.joins += len(found.joins)
    errors = (report.errors.get(dtype, 0.0), found.error, *(join.error for join in found.joins))
    report.errors[dtype] = max(errors)


def without_names(reason: str) -> str:
    """A reason for a refusal without the names and numbers of one network.

    >>> without_names("body_1_add: the branch has stride (1, 2) and the shortcut 3")
    'the branch has stride N and the shortcut N'
    """
    text = re.sub(r"^\w+(, \w+)*: ", "", reason)
    text = re.sub(r"\w+(\.\w+)+", "NAME", text)  # the path of a module
    text = re.sub(r"\((\w+)\)$", "", text)  # the operation that writes in place
    text = re.sub(r"\[[\d, ]*\]|\([\d, ]*\)|(?<!\w)-?\d+(?!\w)", "N", text)
    return text.strip()
