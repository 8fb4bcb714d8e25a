"""What each command does: `run_NAME` gets its options.

The command imports this file once it knows that there is something to do: it loads torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rmfx.choices import BY_DATA
from rmfx.conversion import Conversion, convert
from rmfx.demo import run as demo
from rmfx.files.figures import PLOT_SUFFIXES, check_plotting
from rmfx.files.saving import (
    SUFFIXES,
    SavedFile,
    check_output,
    check_place,
    save,
    whole_file,
)
from rmfx.latency import Network, measure_latency
from rmfx.oracle.pair import NO_NUMBERS
from rmfx.removal.remove import is_calibrated
from rmfx.timing.speed import LatencyError, Settings, installed

from .bench import announcement, tried, write_files
from .doctor import diagnose
from .given import Given, load
from .own_models import listed, own_models
from .page import check_packages, page
from .pruning_curve import plot as draw_curve
from .pruning_curve import pruning_curve
from .terminal import progress, quiet, show, wrote
from .values import FoundError, UsageError


def run_demo(options: argparse.Namespace) -> None:
    """Convert a small trained network and show the result."""
    with quiet(), progress(4) as step:
        result = demo.run_demo(step)
    show(options, str(result), result.to_dict())


def run_models(options: argparse.Namespace) -> None:
    """List the networks that come with rmfx."""
    rows = own_models()
    show(options, listed(rows), {row.name: row.to_dict() for row in rows})


def run_doctor(options: argparse.Namespace) -> None:
    """Say what is installed here, and whether a conversion works."""
    with quiet(), progress(2, width=25) as step:
        found = diagnose(step)
    show(options, str(found), found.to_dict())
    if found.failure:
        raise FoundError(f"the self-test failed: {found.failure}")


def run_report(options: argparse.Namespace) -> None:
    """Say what a conversion would do."""
    _check_page(options)
    steps = 2 + bool(options.html) + len(options.runtimes)
    with quiet(), progress(steps, width=30) as step:
        step("load")
        given = load(options, options.model)
        step("convert and verify")
        conversion = _convert(options, given)
        head = _head(options, given, conversion)
        notes = _write_page(options, given, conversion, head, step) if options.html else []
    text = "\n".join([head, str(conversion), *[""] * bool(notes), *notes])
    show(options, text, {"model": options.model, **conversion.to_dict(), "notes": notes})


def _head(options: argparse.Namespace, given: Given, conversion: Conversion) -> str:
    """A line on what was worked with, and what it takes to compare anything."""
    verified = conversion.report.verification
    advice = ""
    if verified is not None and verified.reason == NO_NUMBERS:
        advice = " Give inputs of the kind that the network is made for, with --inputs FILE."
    return f"{given.describe(options)}{advice}"


def _check_page(options: argparse.Namespace) -> None:
    """Finds out early whether a page can be made."""
    if options.html is None:
        if options.runtimes:
            raise UsageError("argument --runtimes: needs --html")
        return
    _check_file("--html", options.html, (".html", ".htm"))
    check_packages()
    if options.runtimes:
        installed(options.runtimes)


def _check_file(option: str, path: str, suffixes: tuple[str, ...]) -> None:
    """Finds out, before minutes of work, whether a file that an option names can be written."""
    if not path.endswith(suffixes):
        raise UsageError(f"argument {option}: {path} must end in {' or '.join(suffixes)}")
    if suffixes == SUFFIXES:
        check_output(path)
    else:
        check_place(path, suffixes)
    if suffixes == PLOT_SUFFIXES:
        check_plotting()


def _write_page(
    options: argparse.Namespace,
    given: Given,
    conversion: Conversion,
    head: str,
    step: Callable[[str], object],
) -> list[str]:
    """Writes the page that was asked for; gives lines on it, and on runtimes that it lacks."""
    latency, inputs = None, given.required
    if options.runtimes:
        settings = Settings(runtimes=options.runtimes, batches=(1,), activation=options.activation)
        network = Network(options.model, given.loaded.model, inputs)
        latency = measure_latency([network], settings, step)
    step("write the page")
    with whole_file(Path(options.html)) as path:
        text = page(conversion, inputs, options.model, latency, head)
        path.write_text(text, encoding="utf-8")
    return [wrote(options.html), *(latency.notes if latency else ())]


def run_convert(options: argparse.Namespace) -> None:
    """Convert a network, write it to a file and check the file."""
    _check_file("-o", options.output, SUFFIXES)
    with quiet(), progress(3, width=30) as step:
        step("load")
        given = load(options, options.model)
        inputs = given.required
        step("convert and verify")
        conversion = _convert(options, given)
        step("write and check")
        saved = save(
            conversion.after,
            options.output,
            inputs,
            reference=given.loaded.model,
            tolerance=options.tolerance,
            input_range=options.input_range,
            samples=_calibration(given) if is_calibrated(conversion.after) else (),
        )
    head = _head(options, given, conversion)
    result = {
        "model": options.model,
        "output": _output(saved),
        **conversion.to_dict(),
    }
    show(options, f"{head}\n{conversion}\n\n{_describe_file(saved)}", result)


def run_prune(options: argparse.Namespace) -> None:
    """Prune a network to the sizes asked for."""
    _check_pruning_files(options)
    with quiet(), progress(None, width=40) as step:
        step("load")
        given = load(options, options.model)
        data = given.batches or None
        curve = pruning_curve(
            given.loaded.model,
            given.required,
            options.target,
            data=data,
            loss=torch.nn.functional.cross_entropy,
            step=step,
            of=options.of,
            importance=options.importance,
            allocation=options.allocation,
            protect=options.protect,
            multiple=options.multiple,
        )
        if options.output is not None:
            step("write and check")
            model = given.loaded.model
            saved = save(curve.networks[0], options.output, given.required, source=model)
    if options.plot is not None:
        with whole_file(Path(options.plot)) as path:
            draw_curve(curve, path, options.model)
    text, result = f"{given.describe(options)}\n{curve}", dict[str, Any](model=options.model)
    if options.output is not None:
        text, result["output"] = f"{text}\n\n{_written(saved)}", _output(saved)
    if options.plot is not None:
        text = f"{text}\n\n{wrote(options.plot)}"
    show(options, text, result | curve.to_dict())


def _check_pruning_files(options: argparse.Namespace) -> None:
    """Finds out before anything is measured whether the options go together."""
    if options.output is not None:
        if len(options.target) > 1:
            raise UsageError("argument -o: give one --target to write a file")
        _check_file("-o", options.output, SUFFIXES)
    if options.plot is not None:
        if options.data is None:
            raise UsageError("argument --plot: needs --data")
        _check_file("--plot", options.plot, PLOT_SUFFIXES)
    if options.importance in BY_DATA and options.data is None:
        raise UsageError(f"argument --importance: {options.importance} needs --data")


def _output(saved: SavedFile) -> dict[str, Any]:
    return dataclasses.asdict(saved) | {"path": str(saved.path)}


def _written(saved: SavedFile) -> str:
    return f"Wrote {saved.path} ({saved.size / 1e6:.1f} MB, for inputs {saved.inputs})."


def _describe_file(saved: SavedFile) -> str:
    lines = [
        _written(saved),
        f"Loaded it and ran it on {saved.runs} inputs: it differs from the original by"
        f" {saved.error:.1e} at most (accepted up to {saved.tolerance:.0e}).",
    ]
    return "\n".join(lines)


def run_bench(options: argparse.Namespace) -> None:
    """Time networks before and after the conversion."""
    for option, suffixes in (("output", (".json",)), ("plot", PLOT_SUFFIXES)):
        if getattr(options, option) is not None:
            _check_file(f"--{option}", getattr(options, option), suffixes)
    installed(options.runtimes)
    settings = Settings(
        runtimes=options.runtimes,
        batches=options.batch,
        threads=options.threads or torch.get_num_threads(),
        rounds=options.rounds,
        tolerance=options.tolerance,
        activation=options.activation,
    )
    steps = len(options.models) * (2 + len(settings.runtimes) * len(settings.batches))
    with quiet(), progress(steps, width=50) as step:
        networks = [_network(options, name, step) for name in options.models]
        trials = [tried(network, settings, step) for network in networks]
        if line := announcement(trials, settings):
            tqdm.write(line, file=sys.stderr)
        report = measure_latency(networks, settings, step)
    written = write_files(options, report)
    show(options, "\n".join([str(report), *written]), report.to_dict())
    if report.failures:
        count = f"{len(report.failures)} of {len(report.rows)}"
        raise LatencyError(f"{count} measurements failed: {report.failures[0].failure}")


def _network(options: argparse.Namespace, name: str, step: Callable[[str], object]) -> Network:
    step(f"load {name}")
    given = load(options, name)
    return Network(name, given.loaded.model, given.required)


def _convert(options: argparse.Namespace, given: Given) -> Conversion:
    return convert(
        given.loaded.model,
        given.inputs,
        strict=options.strict,
        fold_batch_norm=not options.no_fold_batch_norm,
        activation=options.activation,
        input_range=options.input_range,
        calibration=_calibration(given) or None,
        policy=options.policy,
        minimise=options.minimise,
        copy_shared=not options.keep_shared,
    )


def _calibration(given: Given) -> list[tuple[Tensor, ...]]:
    """The inputs on which values are measured."""
    return [inputs for inputs, _ in given.batches]
