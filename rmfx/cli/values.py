"""What the command `rmfx` makes of the text of its options; what it cannot take is wrong usage."""

from __future__ import annotations

import argparse
import math
import os
import sys
from typing import Any, TypeVar

from rmfx.choices import RUNTIMES, STRATEGIES
from rmfx.errors import RmfxError

N = TypeVar("N", int, float)
_MOST = sys.maxsize // 16  # of the widest numbers, so many bytes can be addressed
INPUT_FILES = (".pt", ".npz", ".safetensors")


class UsageError(RmfxError):
    """Arguments that do not go together."""


class OutputError(RmfxError):
    """Stdout does not take the result."""


class FoundError(RmfxError):
    """A random network broke the pass, or the self-test failed."""


def parse_shape(text: str) -> tuple[int, ...]:
    """A shape, as 1,3,224,224."""
    sizes = _parse_list(text, int, "sizes like 1,3,224,224")
    if math.prod(sizes) > _MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is more than a tensor can hold")
    return sizes


def parse_batches(text: str) -> tuple[int, ...]:
    """Sizes of batches, as 1,8."""
    return _parse_list(text, int, "sizes like 1,8", most=_MOST)


def parse_shares(text: str) -> tuple[float, ...]:
    """Shares in (0, 1], as 0.75,0.5."""
    return _parse_list(text, float, "shares like 0.75,0.5", most=1.0)


def parse_count(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def parse_threads(text: str) -> int:
    """A number of threads that the machine has."""
    count, most = parse_count(text), os.cpu_count() or 1
    if count > most:
        raise argparse.ArgumentTypeError(f"{count} threads are more than the {most} processors")
    return count


def parse_number(text: str) -> float:
    """A finite number, 0 or above."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, 0 or above")
    return number


class Range(argparse.Action):
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


def parse_name(text: str) -> str:
    """The name of a function, as package.module:function."""
    module, _, name = text.partition(":")
    if not module or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is no name like package.module:function")
    return text


def parse_file(text: str) -> str:
    """The name of a file."""
    if not text:
        raise argparse.ArgumentTypeError("the name of a file is missing")
    return text


def parse_inputs(text: str) -> str:
    """The name of a file of inputs."""
    if not text.endswith(INPUT_FILES):
        raise argparse.ArgumentTypeError(f"{text!r} must end in {' or '.join(INPUT_FILES)}")
    return text


def _parse_list(text: str, kind: type[N], what: str, most: float = math.inf) -> tuple[N, ...]:
    try:
        numbers = tuple(kind(number) for number in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(0 < number <= most for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of {what}")
    return numbers


def parse_ways(text: str) -> str | tuple[str, ...]:
    """Ways for carries to pass activations, or a word for a choice of them."""
    return _ways(text, ("auto",))


def parse_ways_to_try(text: str) -> str | tuple[str, ...]:
    """The same, where chance may choose as well."""
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


def parse_runtimes(text: str) -> tuple[str, ...]:
    """Names of runtimes, as eager,inductor."""
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in RUNTIMES]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"unknown: {', '.join(map(repr, unknown))}; choose from {', '.join(RUNTIMES)}"
        )
    return names
