"""The command `rmfx`: `demo`, `convert`, `report`, `prune`, `bench` and `fuzz`.

Exit codes: 0 done, 1 it could not be done (one line on stderr says why), 2 wrong usage,
130 interrupted. With `--json`, stdout holds one JSON object and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from ._allocation import ALLOCATIONS
from ._errors import OptionError, RmfxError
from ._importance import BY_DATA, IMPORTANCES
from ._runtimes import RUNTIMES
from ._strategy import STRATEGIES
from .conversion import Conversion, compare, convert
from .fuzz import FRONTENDS, PASSES, fuzz
from .html import check_packages, page
from .latency import (
    PLOT_SUFFIXES,
    LatencyError,
    LatencyReport,
    Network,
    Settings,
    check_plotting,
    measure_latency,
    plot,
)
from .loading import LoadedModel, load_model, named_object
from .passes.pruning import OF
from .pruning_curve import plot as draw_curve
from .pruning_curve import pruning_curve
from .saving import SUFFIXES, SavedFile, as_function, check_output, check_place, save, whole_file
from .testing import Equivalence

_DTYPES = ("float32", "float64", "float16", "bfloat16")
_MODEL_HELP = """\
MODEL is one of
  torchvision:NAME         an architecture of torchvision, e.g. torchvision:resnet18
  timm:NAME                an architecture of timm, e.g. timm:mobilenetv2_100
  package.module:factory   a function without arguments that returns a torch.nn.Module
  FILE.pt2                 a program saved by torch.export.save

Importing a module runs its code: name only code you trust.
"""


_PASS_HELP = "one of %s, or package.module:function, called as f(model, inputs)"
_FUZZ_HELP = "Exit codes: 0 if the pass held, 1 if a network broke it, 2 for wrong usage."


class FoundError(RmfxError):
    """A random network broke the pass."""


class _UsageError(Exception):
    """Arguments that do not go together."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code.

    Args:
        arguments: without the program's name; by default those of the process.
    """
    parser = _make_parser()
    options = parser.parse_args(arguments)
    try:
        with _terminable():
            options.run(options)
    except _UsageError as error:
        parser.error(str(error))
    except RmfxError as error:
        if options.traceback:
            raise
        _complain(" ".join(str(error).split()))
        return 1
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except BrokenPipeError:
        # The reader of our output left (`rmfx report ... | head`); Python must not flush into it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rmfx", description="Removes residual connections from trained networks, exactly."
    )
    version = importlib.metadata.version("rmfx")
    parser.add_argument("--version", action="version", version=f"rmfx {version}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    demo = commands.add_parser("demo", help="convert a small trained network and show the result")
    demo.set_defaults(run=_run_demo)
    for name, run, text, add_options in (
        (
            "convert",
            _run_convert,
            "convert a network, write it to a file and check the file",
            (_add_model_options, _add_conversion_options, _add_output_options),
        ),
        (
            "report",
            _run_report,
            "say what a conversion would do: as tables, or as a page",
            (_add_model_options, _add_conversion_options, _add_page_options),
        ),
        (
            "prune",
            _run_prune,
            "remove the filters that matter least, until the network is as small as asked for",
            (_add_model_options, _add_pruning_options),
        ),
        (
            "bench",
            _run_bench,
            "time networks before and after the conversion, in several runtimes",
            (_add_bench_options,),
        ),
    ):
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=_MODEL_HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        _add_input_options(command)
        for add in add_options:
            add(command)
    models = commands.add_parser("models", help="list the networks that come with rmfx")
    models.set_defaults(run=_run_models)
    text = "try a pass on random networks; the first that it breaks is made small and shown"
    command = commands.add_parser(
        "fuzz", help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=_FUZZ_HELP
    )
    command.set_defaults(run=_run_fuzz)
    _add_fuzz_options(command)
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print one JSON object")
        command.add_argument("--traceback", action="store_true", help="show where an error arose")
    return parser


def _add_input_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--input-shape",
        metavar="N,C,H,W",
        action="append",
        type=_parse_shape,
        help="shape of an input, batch first, e.g. 1,3,224,224; repeat it for several inputs",
    )
    add(
        "--activation",
        default="auto",
        metavar="WAYS",
        type=_parse_ways,
        help=f"how carries pass activations: auto, relu, or some of {','.join(STRATEGIES)} (auto)",
    )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="what to convert, see below")
    add("--weights", metavar="FILE", help="safetensors, or a PyTorch checkpoint of tensors only")
    add("--dtype", choices=_DTYPES, help="compute in this type (default: the model's own)")


def _add_conversion_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--no-fold-batch-norm", action="store_true", help="keep batch norm layers")
    add("--strict", action="store_true", help="fail if one residual connection cannot be removed")
    text = "remove all that can be removed, or only what should pay by a simple cost model"
    add("--policy", choices=("all", "profitable"), default="all", help=text)


def _add_page_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--html", metavar="FILE.html", help="write one page with tables, plots and both graphs")
    names = ",".join(RUNTIMES)
    text = f"with --html: measure the latency in some of {names}, batch 1"
    add("--runtimes", type=_parse_runtimes, default=(), metavar="NAMES", help=text)


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-o", "--output", metavar="OUT", required=True, help="file to write: .pt2 or .onnx")
    add("--tolerance", type=float, help="largest relative error accepted in the written file")


def _add_pruning_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "share of the cost to keep, in (0, 1]; several for a table or a plot"
    add("--target", metavar="SHARE,...", type=_parse_shares, required=True, help=text)
    add("--of", choices=OF, default=OF[0], help="the cost that is meant (macs)")
    text = "package.module:function that gives batches of (inputs, classes)"
    add("--data", metavar="NAME", help=text)
    text = "how much a filter matters (taylor with --data, else l2)"
    add("--importance", choices=IMPORTANCES, help=text)
    add("--allocation", choices=ALLOCATIONS, default=ALLOCATIONS[0], help="how layers share it")
    add("--protect", metavar="PATTERN", action="append", default=[], help="layers to leave alone")
    add("--multiple", type=_parse_count, default=1, help="round the filters up to it (1)")
    add("-o", "--output", metavar="OUT", help="file to write: .pt2 or .onnx; for one target")
    add("--plot", metavar="FILE", help="file to draw the accuracy to: .svg or .png; needs --data")


def _add_bench_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("models", metavar="MODEL", nargs="+", help="what to measure, see below")
    # How long a network takes does not depend on its weights; the runtimes share float32 only.
    parser.set_defaults(weights=None, dtype=None)
    names = ",".join(RUNTIMES)
    add("--runtimes", type=_parse_runtimes, default=tuple(RUNTIMES), help=f"some of {names} (all)")
    add("--batch", metavar="N,...", type=_parse_batches, default=(1, 8), help="sizes (1,8)")
    add("--threads", type=_parse_count, default=torch.get_num_threads(), help="for one inference")
    add("--rounds", type=_parse_count, default=20, help="measurements of each form (20)")
    add("--tolerance", type=float, help="largest relative error accepted of a runtime")
    add("-o", "--output", metavar="FILE.json", help="file to write the measurements to")
    add("--plot", metavar="FILE", help="file to draw the ratios to: .svg or .png")


def _add_fuzz_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    passes = ", ".join(PASSES)
    add(
        "--examples", metavar="N", type=_parse_count, help="networks (100; with --time: any number)"
    )
    add("--seed", metavar="S", type=int, default=0, help="equal seeds draw equal networks (0)")
    add("--pass", metavar="NAME", dest="transform", default=PASSES[0], help=_PASS_HELP % passes)
    add("--frontend", choices=FRONTENDS, default=FRONTENDS[0], help="how the networks are held")
    ways = f"how carries pass activations: auto, relu, random, or some of {','.join(STRATEGIES)}"
    add("--activation", metavar="WAYS", type=_parse_ways, default="auto", help=ways)
    add("--time", metavar="SECONDS", type=float, help="draw no more networks after so many")


def _parse_shape(text: str) -> tuple[int, ...]:
    return _parse_sizes(text, "1,3,224,224")


def _parse_batches(text: str) -> tuple[int, ...]:
    return _parse_sizes(text, "1,8")


def _parse_count(text: str) -> int:
    sizes = _parse_sizes(text, "2")
    if len(sizes) != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not one number")
    return sizes[0]


def _parse_sizes(text: str, example: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sizes like {example}")
    return sizes


def _parse_shares(text: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(share) for share in text.split(","))
    except ValueError:
        shares = ()
    if not shares or not all(0 < share <= 1 for share in shares):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of shares like 0.75,0.5")
    return shares


def _parse_ways(text: str) -> str | tuple[str, ...]:
    names = tuple(text.split(","))
    return names[0] if len(names) == 1 else names


def _parse_runtimes(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in RUNTIMES]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"unknown: {', '.join(map(repr, unknown))}; choose from {', '.join(RUNTIMES)}"
        )
    return names


def _run_demo(options: argparse.Namespace) -> None:
    from .demo.run import run_demo

    with _quiet_stdout(), _progress(4) as step:
        result = run_demo(step)
    _show(options, str(result), result.to_dict())


def _run_models(options: argparse.Namespace) -> None:
    from . import models

    functions = {name: getattr(models, name) for name in models.__all__ if name.islower()}
    rows = {
        f"rmfx.models:{name}": str(made.__doc__).splitlines()[0] for name, made in functions.items()
    }
    _show(options, tabulate(rows.items(), ("MODEL", "what it is")), rows)


def _run_report(options: argparse.Namespace) -> None:
    _check_page(options)
    steps = 2 + bool(options.html) + len(options.runtimes)
    with _quiet_stdout(), _progress(steps, width=30) as step:
        step("load")
        loaded, inputs = _load(options, options.model)
        step("convert")
        conversion = _convert(options, loaded, inputs)
        if options.html:
            _write_page(options, loaded, _require(inputs), conversion, step)
    head = _describe(options, loaded, inputs)
    _show(options, f"{head}\n{conversion}", {"model": options.model, **conversion.to_dict()})


def _check_page(options: argparse.Namespace) -> None:
    """Finds out early whether a page can be made."""
    if options.html is None:
        if options.runtimes:
            raise _UsageError("argument --runtimes: needs --html")
        return
    if not options.html.endswith((".html", ".htm")):
        raise _UsageError(f"argument --html: {options.html} must end in .html")
    check_place(options.html, (".html", ".htm"))
    check_packages()


def _write_page(
    options: argparse.Namespace,
    loaded: LoadedModel,
    inputs: tuple[Tensor, ...],
    conversion: Conversion,
    step: Callable[[str], object],
) -> None:
    latency = None
    if options.runtimes:
        settings = Settings(runtimes=options.runtimes, batches=(1,), activation=options.activation)
        network = Network(options.model, loaded.model, inputs)
        latency = measure_latency([network], settings, step)
    step("write the page")
    with whole_file(Path(options.html)) as path:
        path.write_text(page(conversion, inputs, options.model, latency), encoding="utf-8")


def _run_convert(options: argparse.Namespace) -> None:
    if not options.output.endswith(SUFFIXES):
        raise _UsageError(f"argument -o: {options.output} must end in {' or '.join(SUFFIXES)}")
    check_output(options.output)
    with _quiet_stdout(), _progress(4) as step:
        step("load")
        loaded, inputs = _load(options, options.model)
        inputs = _require(inputs)
        step("convert")
        conversion = _convert(options, loaded, inputs)
        step("compare")
        found = compare(loaded.model, conversion.after, inputs, tolerance=options.tolerance)
        step("write and check")
        saved = save(
            conversion.after,
            options.output,
            inputs,
            reference=loaded.model,
            tolerance=options.tolerance,
        )
    head = _describe(options, loaded, inputs)
    result = {
        "model": options.model,
        "output": dataclasses.asdict(saved) | {"path": str(saved.path)},
        "joins": [dataclasses.asdict(join) for join in found.joins],
        **conversion.to_dict(),
    }
    _show(options, f"{head}\n{conversion}\n\n{_describe_checks(found, saved)}", result)


def _run_prune(options: argparse.Namespace) -> None:
    _check_pruning_files(options)
    data = None if options.data is None else _batches(options.data)
    with _quiet_stdout(), _progress(None, width=40) as step:
        step("load")
        loaded, inputs = _load(options, options.model)
        inputs = _require(inputs)
        curve = pruning_curve(
            loaded.model,
            inputs,
            options.target,
            data=data,
            loss=torch.nn.functional.cross_entropy,
            step=step,
            of=options.of,
            importance=options.importance or ("l2" if data is None else "taylor"),
            allocation=options.allocation,
            protect=options.protect,
            multiple=options.multiple,
        )
        if options.output is not None:
            step("write and check")
            save(curve.networks[0], options.output, inputs)
    if options.plot is not None:
        with whole_file(Path(options.plot)) as path:
            draw_curve(curve, path, options.model)
    head = _describe(options, loaded, inputs)
    _show(options, f"{head}\n{curve}", {"model": options.model, **curve.to_dict()})


def _check_pruning_files(options: argparse.Namespace) -> None:
    """Finds out before anything is measured whether the results can be written."""
    if options.output is not None:
        if len(options.target) > 1:
            raise _UsageError("argument -o: give one --target to write a file")
        if not options.output.endswith(SUFFIXES):
            raise _UsageError(f"argument -o: {options.output} must end in {' or '.join(SUFFIXES)}")
        check_output(options.output)
    if options.plot is not None:
        if options.data is None:
            raise _UsageError("argument --plot: needs --data")
        if not options.plot.endswith(PLOT_SUFFIXES):
            text = f"{options.plot} must end in {' or '.join(PLOT_SUFFIXES)}"
            raise _UsageError(f"argument --plot: {text}")
        check_place(options.plot, PLOT_SUFFIXES)
        check_plotting()
    if options.importance in BY_DATA and options.data is None:
        raise _UsageError(f"argument --importance: {options.importance} needs --data")


def _batches(name: str) -> list[Any]:
    """What a function gives, as batches of (inputs, classes)."""
    function = named_object(name)
    if not callable(function):
        raise RmfxError(f"{name} is a {type(function).__name__}, not a function")
    try:
        batches = list(function())
    # The caller's own code, which may raise anything.
    except Exception as error:
        raise RmfxError(f"{name}() raised {type(error).__name__}: {error}") from error
    pairs = [isinstance(batch, (tuple, list)) and len(batch) == 2 for batch in batches]
    if not batches or not all(pairs):
        raise RmfxError(f"{name}() must give batches of (inputs, classes)")
    return batches


def _describe_checks(found: Equivalence, saved: SavedFile) -> str:
    lines = []
    if found.joins:
        worst = max(join.error for join in found.joins)
        lines.append(
            f"Compared at {len(found.joins)} joins: the values differ by {worst:.1e} at most"
            f" (relative); a dropped skip would differ by {found.sensitivity:.1e} or more."
        )
    batch = "batches of any size" if saved.free_batch else "the batch size of the example"
    lines += [
        f"Wrote {saved.path} ({saved.size / 1e6:.1f} MB, for {batch}).",
        f"Loaded it and ran it on {saved.runs} random inputs: it differs from the original by"
        f" {saved.error:.1e} at most (accepted up to {saved.tolerance:.0e}).",
    ]
    return "\n".join(lines)


def _run_bench(options: argparse.Namespace) -> None:
    _check_bench_files(options)
    settings = Settings(
        runtimes=options.runtimes,
        batches=options.batch,
        threads=options.threads,
        rounds=options.rounds,
        tolerance=options.tolerance,
        activation=options.activation,
    )
    steps = len(options.models) * (1 + len(settings.runtimes) * len(settings.batches))
    with _quiet_stdout(), _progress(steps, width=50) as step:
        networks = [_load_network(options, name, step) for name in options.models]
        report = measure_latency(networks, settings, step)
    _write_bench_files(options, report)
    _show(options, str(report), report.to_dict())
    if report.failures:
        count = f"{len(report.failures)} of {len(report.rows)}"
        raise LatencyError(f"{count} measurements failed: {report.failures[0].failure}")


def _run_fuzz(options: argparse.Namespace) -> None:
    examples = options.examples
    if examples is None and options.time is None:
        examples = 100
    with _quiet_stdout(), _progress(examples, width=30) as step:
        try:
            report = fuzz(
                options.transform,
                examples=examples,
                seed=options.seed,
                frontend=options.frontend,
                activation=options.activation,
                seconds=options.time,
                step=step,
            )
        except OptionError as error:
            raise _UsageError(str(error)) from error
    failure = report.failure
    text = f"{report}\n\n{failure.script}" if failure else str(report)
    _show(options, text, report.to_dict())
    if failure:
        raise FoundError(f"network {failure.example}: {failure.kind}: {failure.message}")


def _load_network(options: argparse.Namespace, name: str, step: Callable[[str], object]) -> Network:
    step(f"load {name}")
    loaded, inputs = _load(options, name)
    return Network(name, loaded.model, _require(inputs))


def _check_bench_files(options: argparse.Namespace) -> None:
    """Finds out before minutes of measuring whether the results can be written."""
    for option, suffixes in (("output", (".json",)), ("plot", PLOT_SUFFIXES)):
        path = getattr(options, option)
        if path is None:
            continue
        if not path.endswith(suffixes):
            raise _UsageError(f"argument --{option}: {path} must end in {' or '.join(suffixes)}")
        check_place(path, suffixes)
    if options.plot is not None:
        check_plotting()


def _write_bench_files(options: argparse.Namespace, report: LatencyReport) -> None:
    if options.output is not None:
        with whole_file(Path(options.output)) as path:
            path.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    if options.plot is not None:
        with whole_file(Path(options.plot)) as path:
            plot(report, path)


def _load(options: argparse.Namespace, name: str) -> tuple[LoadedModel, tuple[Tensor, ...] | None]:
    """The model and its example inputs, after one run of the one on the other."""
    # Random weights, where no file is given, are the same in every run.
    torch.manual_seed(0)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    loaded = load_model(name, weights=options.weights, dtype=dtype)
    inputs = loaded.inputs
    if options.input_shape:
        inputs = tuple(torch.zeros(shape, dtype=loaded.dtype) for shape in options.input_shape)
    if inputs is not None:
        _try(loaded, inputs)
    return loaded, inputs


def _require(inputs: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    if inputs is None:
        raise _UsageError("this model's inputs are not known: give --input-shape")
    return inputs


def _try(loaded: LoadedModel, inputs: tuple[Tensor, ...]) -> None:
    """Finds out early, and says plainly, that a model does not take such inputs."""
    try:
        with torch.no_grad():
            as_function(loaded.model)(*inputs)
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        reason = f"{type(error).__name__}: {error}"
        raise RmfxError(
            f"the model fails on inputs of shape {shapes} ({reason}); give its --input-shape"
        ) from error


def _convert(
    options: argparse.Namespace, loaded: LoadedModel, inputs: tuple[Tensor, ...] | None
) -> Conversion:
    return convert(
        loaded.model,
        inputs,
        strict=options.strict,
        fold_batch_norm=not options.no_fold_batch_norm,
        activation=options.activation,
        policy=options.policy,
    )


def _describe(
    options: argparse.Namespace, loaded: LoadedModel, inputs: tuple[Tensor, ...] | None
) -> str:
    weights = "random weights" if loaded.random else options.weights or "its own weights"
    shapes = ", ".join(str(tuple(x.shape)) for x in inputs or ())
    return f"{options.model}, {weights}" + (f", input {shapes}." if shapes else ".")


def _show(options: argparse.Namespace, text: str, result: dict[str, Any]) -> None:
    sys.stdout.write((json.dumps(result, indent=2) if options.json else text) + "\n")
    sys.stdout.flush()


def _complain(message: str) -> None:
    sys.stderr.write(f"rmfx: {message}\n")


@contextlib.contextmanager
def _progress(steps: int | None, width: int = 20) -> Iterator[Callable[[str], None]]:
    """A function to call with the name of each step as it begins; shown on a terminal only."""
    form = f"{{desc:{width}}} {{bar:20}} {{n}}/{{total}} {{elapsed}}"
    with tqdm(total=steps, file=sys.stderr, disable=None, leave=False, bar_format=form) as bar:
        started = 0

        def step(name: str) -> None:
            nonlocal started
            bar.update(1 if started else 0)
            started += 1
            bar.set_description_str(name)

        yield step


def _quiet_stdout() -> contextlib.redirect_stdout[Any]:
    """Sends what models and torch print to stderr: stdout is for the result."""
    return contextlib.redirect_stdout(sys.stderr)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Lets a polite kill end the block like Ctrl-C does, so that temporary files are removed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        former = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread: signals are somebody else's business
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
