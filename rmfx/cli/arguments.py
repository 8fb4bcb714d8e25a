"""What the command `rmfx` takes: its parser, and what text becomes."""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

from rmfx.choices import (
    ALLOCATIONS,
    COSTS,
    FRONTENDS,
    IMPORTANCES,
    PASSES,
    RUNTIMES,
    STRATEGIES,
    TARGETS,
)
from rmfx.errors import RmfxError

N = TypeVar("N", int, float)
_DTYPES = ("float32", "float64", "float16", "bfloat16")
_INPUT_DTYPES = (*_DTYPES, "int64", "int32", "int16", "int8", "uint8", "bool", "complex64")
_INPUT_FILES = (".pt", ".npz", ".safetensors")
_MODEL_HELP = """\
MODEL is one of
  torchvision:NAME         an architecture of torchvision, e.g. torchvision:resnet18
  timm:NAME                an architecture of timm, e.g. timm:mobilenetv2_100
  package.module:factory   a function without arguments that returns a torch.nn.Module
  FILE.pt2                 a program saved by torch.export.save

What is safe to open: a .pt2 file, a .safetensors file and a checkpoint of tensors run nothing that
stands in them; a file that would is refused. A factory is code that runs, as is whatever stands in
its module and in the current folder: name only code you trust.
"""
_SAFETY = (
    "Files of weights and .pt2 files run no code of their own; package.module:factory is code that"
    " runs."
)
_PASS_HELP = "one of %s, or package.module:function, called as f(model, inputs)"
_FUZZ_HELP = "Exit codes: 0 if the pass held, 1 if a network broke it, 2 for wrong usage."


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command; the options say in `command` which one was given.

    Their `parser` is that of this one, which tells how it is used.
    """
    parser = argparse.ArgumentParser(
        prog="rmfx",
        description="Removes residual connections from trained networks, exactly.",
        epilog=_SAFETY,
    )
    version = importlib.metadata.version("rmfx")
    parser.add_argument("--version", action="version", version=f"rmfx {version}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("demo", help="convert a small trained network and show the result")
    for name, text, add_options in _commands_for_models():
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=_MODEL_HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_input_options(command)
        for add in add_options:
            add(command)
    commands.add_parser("models", help="list the networks that come with rmfx")
    text = "say what is installed, and whether a conversion works here"
    commands.add_parser("doctor", help=text)
    text = "try a pass on random networks; the first that it breaks is made small and shown"
    command = commands.add_parser(
        "fuzz", help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=_FUZZ_HELP
    )
    _add_fuzz_options(command)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
        command.add_argument("--json", action="store_true", help="print one JSON object")
        command.add_argument("--traceback", action="store_true", help="show where an error arose")
    return parser


AddOptions = Callable[[argparse.ArgumentParser], None]


def _commands_for_models() -> tuple[tuple[str, str, tuple[AddOptions, ...]], ...]:
    """The commands that take a model: name, what it does, and what adds its options."""
    return (
        (
            "convert",
            "convert a network, write it to a file and check the file",
            (_add_model_options, _add_conversion_options, _add_output_options),
        ),
        (
            "report",
            "say what a conversion would do: as tables, or as a page",
            (_add_model_options, _add_conversion_options, _add_page_options),
        ),
        (
            "prune",
            "remove the filters that matter least, until the network is as small as asked for",
            (_add_model_options, _add_pruning_options),
        ),
        (
            "bench",
            "time networks before and after the conversion, in several runtimes",
            (_add_bench_options,),
        ),
    )


def _add_input_options(parser: argparse.ArgumentParser) -> None:
    # What not every command takes.
    parser.set_defaults(weights=None, dtype=None, input_range=None, calibration=None, data=None)
    add = parser.add_argument
    examples = parser.add_mutually_exclusive_group()
    examples.add_argument(
        "--input-shape",
        metavar="N,C,H,W",
        action="append",
        type=_parse_shape,
        help="shape of an input, batch first, e.g. 1,3,224,224; repeat it for several inputs",
    )
    text = (
        "example inputs with values: tensors as .pt, .npz or .safetensors, several in the order of"
        " the network's arguments or under their names"
    )
    examples.add_argument("--inputs", metavar="FILE", type=_parse_inputs, help=text)
    text = (
        "type of the inputs, e.g. int64 for indices; repeat it for several that differ (default:"
        " that of the file, or of the model's weights)"
    )
    add("--input-dtype", metavar="TYPE", action="append", choices=_INPUT_DTYPES, help=text)
    text = (
        f"how carries pass activations: auto, relu, or some of {','.join(STRATEGIES)};"
        " relu multiplies none by more than 16, relu,scale by any number (auto)"
    )
    add("--activation", default="auto", metavar="WAYS", type=_parse_ways, help=text)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="what to convert, see below")
    add("--weights", metavar="FILE", help="safetensors, or a PyTorch checkpoint of tensors only")
    add("--dtype", choices=_DTYPES, help="compute in this type (default: the model's own)")


def _add_conversion_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--no-fold-batch-norm", action="store_true", help="keep batch norm layers")
    text = (
        "what it is made cheap for: time on CPUs, multiply-adds, or time in one runtime"
        " (default: %(default)s)"
    )
    add("--minimise", choices=TARGETS, default=TARGETS[0], help=text)
    text = "leave layers that several calls share as they are, instead of giving each call a copy"
    add("--keep-shared", action="store_true", help=text)
    add("--strict", action="store_true", help="fail if one residual connection cannot be removed")
    text = (
        "between which two numbers all values of the inputs are, which can prove that a carry"
        " passes an activation unchanged"
    )
    add("--input-range", metavar=("LOW", "HIGH"), nargs=2, type=float, action=_Range, help=text)
    text = (
        "package.module:function that gives batches of inputs, or of (inputs, classes), which show"
        " how large values are; a shift needs it"
    )
    add("--calibration", metavar="NAME", type=_parse_name, help=text)
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
    text = "largest relative error accepted in the written file"
    add("--tolerance", type=_parse_number, help=text)


def _add_pruning_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "share of the cost to keep, in (0, 1]; several for a table or a plot"
    add("--target", metavar="SHARE,...", type=_parse_shares, required=True, help=text)
    add("--of", choices=COSTS, default=COSTS[0], help="the cost that is meant (macs)")
    text = "package.module:function that gives batches of (inputs, classes)"
    add("--data", metavar="NAME", type=_parse_name, help=text)
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
    names = ",".join(RUNTIMES)
    add("--runtimes", type=_parse_runtimes, default=tuple(RUNTIMES), help=f"some of {names} (all)")
    add("--batch", metavar="N,...", type=_parse_batches, default=(1, 8), help="sizes (1,8)")
    add("--threads", type=_parse_threads, help="for one inference, at most as many as processors")
    add("--rounds", type=_parse_count, default=20, help="measurements of each form (20)")
    text = "largest relative error accepted of a runtime"
    add("--tolerance", type=_parse_number, help=text)
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
    add("--activation", metavar="WAYS", type=_parse_ways_to_try, default="auto", help=ways)
    text = "draw no more networks after so many"
    add("--time", metavar="SECONDS", type=_parse_number, help=text)


def _parse_shape(text: str) -> tuple[int, ...]:
    return _parse_list(text, int, "sizes like 1,3,224,224")


def _parse_batches(text: str) -> tuple[int, ...]:
    return _parse_list(text, int, "sizes like 1,8")


def _parse_shares(text: str) -> tuple[float, ...]:
    return _parse_list(text, float, "shares like 0.75,0.5", most=1.0)


def _parse_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _parse_threads(text: str) -> int:
    count, most = _parse_count(text), os.cpu_count() or 1
    if count > most:
        raise argparse.ArgumentTypeError(f"{count} threads are more than the {most} processors")
    return count


def _parse_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, 0 or above")
    return number


class _Range(argparse.Action):
    """Two finite numbers, the lower one first."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        low, high = values
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise argparse.ArgumentError(
                self, f"{low:g} {high:g} are not two finite numbers, the lower one first"
            )
        setattr(namespace, self.dest, (low, high))


def _parse_name(text: str) -> str:
    module, _, name = text.partition(":")
    if not module or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is no name like package.module:function")
    return text


def _parse_inputs(text: str) -> str:
    if not text.endswith(_INPUT_FILES):
        raise argparse.ArgumentTypeError(f"{text!r} must end in {' or '.join(_INPUT_FILES)}")
    return text


def _parse_list(text: str, kind: type[N], what: str, most: float = math.inf) -> tuple[N, ...]:
    try:
        numbers = tuple(kind(number) for number in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(0 < number <= most for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of {what}")
    return numbers


def _parse_ways(text: str) -> str | tuple[str, ...]:
    return _ways(text, ("auto",))


def _parse_ways_to_try(text: str) -> str | tuple[str, ...]:
    return _ways(text, ("auto", "random"))


def _ways(text: str, alone: tuple[str, ...]) -> str | tuple[str, ...]:
    """Ways to pass activations, or one of the words that stand alone."""
    names = tuple(text.split(","))
    known = (*alone, "relu", *STRATEGIES)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"unknown: {', '.join(map(repr, unknown))}; choose from {', '.join(known)}"
        )
    mixed = [name for name in names if name in alone and len(names) > 1]
    if mixed:
        raise argparse.ArgumentTypeError(f"{mixed[0]!r} stands alone, without other ways")
    return names[0] if len(names) == 1 else names


def _parse_runtimes(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in RUNTIMES]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"unknown: {', '.join(map(repr, unknown))}; choose from {', '.join(RUNTIMES)}"
        )
    return names


class UsageError(RmfxError):
    """Arguments that do not go together."""
