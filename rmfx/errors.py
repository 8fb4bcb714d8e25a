"""The errors rmfx raises, and the value with which a rule says "this does not apply".

An error means that nothing can be done with the input as it is. A `Refusal` is a normal answer:
this one site or pair cannot be rewritten exactly, everything else goes on.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace


class RmfxError(Exception):
    """Base of every error of rmfx; its text names the node, the cause and the way out."""


class TraceError(RmfxError):
    """The model cannot be turned into a graph."""


class ModeError(RmfxError):
    """A layer that behaves differently in training is in training mode."""


class WeightError(RmfxError):
    """A weight cannot be computed with: NaN, Inf, no data, not floating point, or overflow."""


class WeightValueError(RmfxError):
    """A decision would rest on the value of a weight that may change."""


class ShapeError(RmfxError):
    """Inputs do not fit the model, or the converted network was not made for their sizes."""


class VerificationError(RmfxError):
    """A result does not compute what the original computes; it is not handed out."""


class NotPlainError(RmfxError):
    """The graph is not a chain, so it cannot be written as `nn.Sequential`."""


class RefusedError(RmfxError):
    """A site was refused while `strict=True` was asked for."""


class OptionError(RmfxError):
    """An option has a name or a value that is not known."""


class InternalError(RmfxError):
    """rmfx itself has failed; its text says where, and how to report it."""


@contextlib.contextmanager
def reported(place: str) -> Iterator[None]:
    """Let nothing but errors of rmfx out of a block.

    Args:
        place: what the block does, for the message: a rule and its node, or a verb.

    Raises:
        MemoryError: there is not enough memory, in Python's words or in torch's.
        InternalError: the block raised something unexpected, which is its cause.
    """
    try:
        yield
    except (RmfxError, MemoryError, BrokenPipeError):
        raise
    # The last net: what comes here was not foreseen, whatever it is.
    except Exception as error:
        check_memory(error)
        raise fault(place, f"{type(error).__name__}: {error}") from error


def check_memory(error: BaseException) -> None:
    """Raise MemoryError if an error says that there is not enough, in Python's words or torch's."""
    if isinstance(error, MemoryError):
        raise error
    if type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
        raise MemoryError(first_line(error)) from error


@contextlib.contextmanager
def quiet_logs() -> Iterator[None]:
    """Without what torch logs of what it could not do: an error of rmfx says it in one line."""
    logger = logging.getLogger("torch")
    former = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(former)


def fault(place: str, event: str) -> InternalError:
    """The error for what must not happen, with what a report of it needs."""
    line = " ".join(event.split())[:300]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("rmfx", "torch"))
    return InternalError(
        f"{place}: {line}. Unless code of your own raised it, this is a fault of rmfx: please"
        f" report it with the traceback (the command shows it with --traceback), the call and the"
        f" network ({versions}, Python {platform.python_version()})"
    )


@dataclass(frozen=True)
class Refusal:
    """Why a law or a rule does not apply.

    Attributes:
        reason: what stands in the way, in words a model author understands.
        nodes: names of the graph nodes that stand in the way, where there are any.
        by_choice: whether nothing but the caller's policy stands in the way.
        apart: whether it is no case for the rule: an addition that is no residual connection.
    """

    reason: str
    nodes: tuple[str, ...] = ()
    by_choice: bool = False
    apart: bool = False

    def at(self, *nodes: str) -> Refusal:
        """The same reason, blamed on `nodes` unless it already names some."""
        return self if self.nodes else replace(self, nodes=nodes)

    def __str__(self) -> str:
        return f"{', '.join(self.nodes)}: {self.reason}" if self.nodes else self.reason


def install_command(packages: Iterable[str]) -> str:
    """What brings packages, however rmfx itself was installed."""
    return f"pip install {' '.join(packages)}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or ["no message"])[0]
