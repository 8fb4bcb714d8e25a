"""Tries a pass on random networks and makes the first that it breaks small.

    from rmfx.fuzz import fuzz

    report = fuzz("mypackage.passes:my_pass", examples=500, seed=1)
    print(report)  # what was tried; where the pass held, what the networks were made of as well
    if report.failure:
        print(report.failure.script)  # a program that fails

Example i of seed s is always the same network, whatever the other options are, but that "compiled"
ones are small. The network, the pass's result and every join that its report lists are compared by
`rmfx.testing.assert_equivalent`, and by `rmfx.verify` at other sizes than the example's; a size on
which the original fails, or which the result refuses itself, says nothing.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rmfx.choices import BACKENDS, FRONTENDS, PASSES, STRATEGIES
from rmfx.errors import OptionError
from rmfx.files.loading import named_object
from rmfx.files.tensors import LoadError
from rmfx.options import check_choice, count_of, number_of, with_article
from rmfx.passes.batch_norm import fold_batch_norm
from rmfx.passes.branches import merge_branches
from rmfx.passes.dead_channels import eliminate_dead_channels
from rmfx.passes.linear import merge_convs
from rmfx.passes.noop import remove_noops
from rmfx.passes.residual import remove_residuals
from rmfx.testing.case import Case, draw_case
from rmfx.testing.compare import compare
from rmfx.testing.compiled import compare_compiled
from rmfx.testing.fuzz_report import COUNTED, Failure, FuzzReport, without_names
from rmfx.testing.jobs import Jobs
from rmfx.testing.trial import WRONG, made_small, try_case

__all__ = [
    "COUNTED",
    "FRONTENDS",
    "PASSES",
    "WRONG",
    "Failure",
    "FuzzReport",
    "InterruptedFuzzing",
    "compare",
    "compare_compiled",
    "draw_case",
    "fuzz",
    "load_pass",
    "without_names",
]
BATCH = 10  # networks that a worker tries before it says what came of them
_VERBS: dict[str, Callable[..., Any]] = {
    verb.__name__: verb
    for verb in (
        *(remove_residuals, fold_batch_norm, merge_branches, merge_convs, remove_noops),
        eliminate_dead_channels,
    )
}


class InterruptedFuzzing(KeyboardInterrupt):
    """Somebody has interrupted the fuzzer.

    Args:
        report: what was tried before.
    """

    def __init__(self, report: FuzzReport) -> None:
        super().__init__()
        self.report = report


def fuzz(
    transform: str = "remove_residuals",
    *,
    examples: int | None = 100,
    seed: int = 0,
    frontend: str = "module",
    activation: str | tuple[str, ...] = "auto",
    seconds: float | None = None,
    step: Callable[[str], object] = lambda text: None,
    jobs: int = 1,
    backend: str = BACKENDS[0],
    address: str | None = None,
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
        step: called with a line about the state for each network.
        jobs: networks to try at a time, each in a process of its own; -1 for one on each core. What
            is found does not depend on it.
        backend: "loky" for processes of this machine, "dask" or "ray" for those of a cluster, of
            which that package has to be installed.
        address: of the cluster; None for one of this machine.

    Returns:
        What was tried; its `failure` is None where the pass held.

    Raises:
        OptionError: an option has a value that is not known, or there is no such pass.
        InterruptedFuzzing: by Ctrl-C; its `report` is what was tried before.

    >>> fuzz("remove_noops", examples=3).failure is None
    True
    """
    _check_options(transform, examples, seconds, frontend, activation)
    load_pass(transform)  # what cannot be found is said at once
    how = Jobs(jobs, backend, address)
    draws = _Draws(transform, seed, frontend, activation)
    end = math.inf if seconds is None else time.time() + seconds
    report = draws.report()
    size = 1 if how.is_here else BATCH
    with _telling(report):
        for part in how.results(draws.tried, _batches(examples, size, end)):
            for _ in range(part.examples):
                removed = report.removed.total()
                step(f"{removed} sites removed" if removed else "")
            report.add(part)
            if report.failure is not None:
                report.failure = draws.made_small(report.failure)
                break
    return report


@dataclass(frozen=True)
class _Draws:
    """The networks of one seed, and what is done with them; see `fuzz`."""

    transform: str
    seed: int
    frontend: str
    activation: str | tuple[str, ...]

    def report(self) -> FuzzReport:
        """Nothing so far."""
        return FuzzReport(self.transform, self.frontend, self.seed)

    @functools.cached_property
    def apply(self) -> Callable[..., Any]:
        """The pass."""
        return load_pass(self.transform)

    def tried(self, start: int, stop: int, end: float) -> FuzzReport:
        """What came of some networks, by number: one at least, until time is up or one fails."""
        report = self.report()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a pass may warn; the exporter does so all the time
            for example in range(start, stop):
                case = self._case(example)
                try_case(report, case, self.apply, example)
                report.features.update(case.features())
                report.examples += 1
                if report.failure is not None or time.time() >= end:
                    break
        return report

    def made_small(self, failure: Failure) -> Failure:
        """The failure with the smallest network found that fails in the same way."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return made_small(failure, self._case(failure.example), self.apply)

    def _case(self, example: int) -> Case:
        return draw_case(example, self.seed, self.transform, self.frontend, self.activation)


def _batches(examples: int | None, size: int, end: float) -> Iterator[tuple[int, int, float]]:
    """The numbers of networks in batches, until there are so many or time is up."""
    for start in itertools.count(0, size):
        if start == examples or time.time() >= end:
            return
        stop = start + size if examples is None else min(start + size, examples)
        yield start, stop, end
        if stop == examples:
            return


@contextlib.contextmanager
def _telling(report: FuzzReport) -> Iterator[None]:
    """Lets an interruption tell what was tried before."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise InterruptedFuzzing(report) from error


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


def load_pass(name: str) -> Callable[..., Any]:
    """The built-in pass of that name, or the function that `package.module:function` names.

    Raises:
        OptionError: there is no such pass.
    """
    if name in PASSES:
        return _VERBS[name]
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        raise OptionError(
            f"pass {name!r}: choose from {', '.join(PASSES)}, or give package.module:function"
        )
    try:
        found = named_object(name)
    except LoadError as error:
        raise OptionError(f"pass {name!r}: {error}") from error
    if not callable(found):
        raise OptionError(f"pass {name!r} is {with_article(found)}, not a function")
    return found
