"""What the command `rmfx` takes: its parser."""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Callable

from rmfx.choices import (
    ALLOCATIONS,
    BACKENDS,
    COSTS,
    FRONTENDS,
    IMPORTANCES,
    PASSES,
    RUNTIMES,
    STRATEGIES,
    TARGETS,
)

from .completion import SHELLS, PrintCompletion
from .values import (
    Range,
    parse_batches,
    parse_count,
    parse_file,
    parse_inputs,
    parse_name,
    parse_number,
    parse_runtimes,
    parse_shape,
    parse_shares,
    parse_threads,
    parse_ways,
    parse_ways_to_try,
)

_DTYPES = ("float32", "float64", "float16", "bfloat16")
_INPUT_DTYPES = (*_DTYPES, "int64", "int32", "int16", "int8", "uint8", "bool", "complex64")
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
    parser.add_argument(
        "--print-completion",
        metavar="SHELL",
        choices=SHELLS,
        action=PrintCompletion,
        help=f"print a script that completes the command in {', '.join(SHELLS)}",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    text = "convert a small trained network and show the result"
    commands.add_parser("demo", help=text, description=_sentence(text))
    for name, text, add_options in _commands_for_models():
        command = commands.add_parser(
            name,
            help=text,
            description=_sentence(text),
            epilog=_MODEL_HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_input_options(command)
        for add in add_options:
            add(command)
    text = "list the networks that come with rmfx, and the shapes that they take"
    commands.add_parser("models", help=text, description=_sentence(text))
    text = "say what is installed, and whether a conversion works here"
    commands.add_parser("doctor", help=text, description=_sentence(text))
    text = "try a pass on random networks; the first that it breaks is made small and shown"
    command = commands.add_parser("fuzz", help=text, description=_sentence(text), epilog=_FUZZ_HELP)
    _add_fuzz_options(command)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
        command.add_argument("--json", action="store_true", help="print one JSON object")
        command.add_argument("--traceback", action="store_true", help="show where an error arose")
    return parser


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


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
        type=parse_shape,
        help="shape of an input, batch first, e.g. 1,3,224,224; repeat it for several inputs",
    )
    text = (
        "example inputs with values: tensors as .pt, .npz or .safetensors, several in the order of"
        " the network's arguments or under their names"
    )
    examples.add_argument("--inputs", metavar="FILE", type=parse_inputs, help=text)
    text = (
        "type of the inputs, e.g. int64 for indices; repeat it for several that differ (default:"
        " that of the file, or of the model's weights)"
    )
    add("--input-dtype", metavar="TYPE", action="append", choices=_INPUT_DTYPES, help=text)
    text = (
        f"how carries pass activations: auto, relu, or some of {','.join(STRATEGIES)};"
        " relu multiplies none by more than 16, relu,scale by any number (auto)"
    )
    add("--activation", default="auto", metavar="WAYS", type=parse_ways, help=text)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="what to convert, see below")
    text = "safetensors, or a PyTorch checkpoint of tensors only"
    add("--weights", metavar="FILE", type=parse_file, help=text)
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
    add("--input-range", metavar=("LOW", "HIGH"), nargs=2, type=float, action=Range, help=text)
    text = (
        "package.module:function that gives batches of inputs, or of (inputs, classes), which show"
        " how large values are; a shift needs it"
    )
    add("--calibration", metavar="NAME", type=parse_name, help=text)
    text = "remove all that can be removed, or only what should pay by a simple cost model"
    add("--policy", choices=("all", "profitable"), default="all", help=text)


def _add_page_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--html", metavar="FILE.html", help="write one page with tables, plots and both graphs")
    names = ",".join(RUNTIMES)
    text = f"with --html: measure the latency in some of {names}, batch 1"
    add("--runtimes", type=parse_runtimes, default=(), metavar="NAMES", help=text)


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-o", "--output", metavar="OUT", required=True, help="file to write: .pt2 or .onnx")
    text = "largest relative error accepted in the written file"
    add("--tolerance", type=parse_number, help=text)


def _add_pruning_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "share of the cost to keep, in (0, 1]; several for a table or a plot"
    add("--target", metavar="SHARE,...", type=parse_shares, required=True, help=text)
    add("--of", choices=COSTS, default=COSTS[0], help="the cost that is meant (macs)")
    text = "package.module:function that gives batches of (inputs, classes)"
    add("--data", metavar="NAME", type=parse_name, help=text)
    text = "how much a filter matters (taylor with --data, else l2)"
    add("--importance", choices=IMPORTANCES, help=text)
    add("--allocation", choices=ALLOCATIONS, default=ALLOCATIONS[0], help="how layers share it")
    add("--protect", metavar="PATTERN", action="append", default=[], help="layers to leave alone")
    add("--multiple", type=parse_count, default=1, help="round the filters up to it (1)")
    add("-o", "--output", metavar="OUT", help="file to write: .pt2 or .onnx; for one target")
    add("--plot", metavar="FILE", help="file to draw the accuracy to: .svg or .png; needs --data")


def _add_bench_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("models", metavar="MODEL", nargs="+", help="what to measure, see below")
    # How long a network takes does not depend on its weights; the runtimes share float32 only.
    names = ",".join(RUNTIMES)
    add("--runtimes", type=parse_runtimes, default=tuple(RUNTIMES), help=f"some of {names} (all)")
    add("--batch", metavar="N,...", type=parse_batches, default=(1, 8), help="sizes (1,8)")
    add("--threads", type=parse_threads, help="for one inference, at most as many as processors")
    text = "measurements of each form (20); fewer than 6 cannot tell which is faster"
    add("--rounds", type=parse_count, default=20, help=text)
    text = "largest relative error accepted of a runtime"
    add("--tolerance", type=parse_number, help=text)
    add("-o", "--output", metavar="FILE.json", help="file to write the measurements to")
    add("--plot", metavar="FILE", help="file to draw the ratios to: .svg or .png")


def _add_fuzz_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    passes = ", ".join(PASSES)
    add("--examples", metavar="N", type=parse_count, help="networks (100; with --time: any number)")
    add("--seed", metavar="S", type=int, default=0, help="equal seeds draw equal networks (0)")
    add("--pass", metavar="NAME", dest="transform", default=PASSES[0], help=_PASS_HELP % passes)
    add("--frontend", choices=FRONTENDS, default=FRONTENDS[0], help="how the networks are held")
    ways = f"how carries pass activations: auto, relu, random, or some of {','.join(STRATEGIES)}"
    add("--activation", metavar="WAYS", type=parse_ways_to_try, default="auto", help=ways)
    text = "draw no more networks after so many"
    add("--time", metavar="SECONDS", type=parse_number, help=text)
    text = "processes; -1: one on each core (1)"
    add("--jobs", metavar="N", type=int, default=1, help=text)
    text = "where they are: of this machine, or of a cluster of that kind (%(default)s)"
    add("--backend", choices=BACKENDS, default=BACKENDS[0], help=text)
    add("--address", metavar="URL", help="of the cluster; without it, one of this machine")
