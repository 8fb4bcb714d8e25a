"""`rmfx fuzz`, which loads half a second of code that no other command needs."""

from __future__ import annotations

import argparse

from rmfx.errors import OptionError
from rmfx.fuzz import FuzzReport, InterruptedFuzzing, fuzz

from .terminal import progress, quiet, show
from .values import FoundError, UsageError


def run_fuzz(options: argparse.Namespace) -> None:
    """Try a pass on random networks."""
    examples = options.examples
    if examples is None and options.time is None:
        examples = 100
    try:
        with quiet(), progress(examples, width=30) as step:
            report = fuzz(
                options.transform,
                examples=examples,
                seed=options.seed,
                frontend=options.frontend,
                activation=options.activation,
                seconds=options.time,
                step=step,
                jobs=options.jobs,
                backend=options.backend,
                address=options.address,
            )
    except OptionError as error:
        raise UsageError(str(error)) from error
    except InterruptedFuzzing as interruption:
        _show_fuzzing(options, interruption.report)
        raise
    _show_fuzzing(options, report)
    if failure := report.failure:
        raise FoundError(f"network {failure.example}: {failure.kind}: {failure.message}")


def _show_fuzzing(options: argparse.Namespace, report: FuzzReport) -> None:
    text = f"{report}\n\n{report.failure.script}" if report.failure else str(report)
    show(options, text, report.to_dict())
