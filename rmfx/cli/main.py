"""The command `rmfx`, which does what `rmfx --help` lists.

Exit codes: 0 done, 1 it could not be done (one line on stderr says why), 2 wrong usage,
130 interrupted. With `--json`, stdout holds one JSON object and nothing else.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType

from rmfx.errors import RmfxError, first_line, reported

from .arguments import make_parser
from .values import OutputError, UsageError

_LIST = re.compile(r"-[\d.][^=]*,.*")  # of numbers, the first one below 0
_ELSEWHERE = {"fuzz": "fuzzing"}  # the files of commands that stand alone


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code.

    Args:
        arguments: without the program's name; by default those of the process.
    """
    given = sys.argv[1:] if arguments is None else arguments
    options, unknown = make_parser().parse_known_args(_with_values(given))
    if unknown:  # argparse itself would show the usage of all commands
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        with _terminable(), reported("the command"):
            place = _ELSEWHERE.get(options.command, "commands")
            commands = importlib.import_module(f"{__package__}.{place}")  # which loads torch
            getattr(commands, f"run_{options.command}")(options)
    except UsageError as error:
        options.parser.error(str(error))
    except (RmfxError, MemoryError) as error:
        if isinstance(error, OutputError):
            _drop_output()
        if options.traceback:
            raise
        _complain(_told(error))
        return 1
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except SystemExit as error:
        _complain(f"code of the model's own ended the command (SystemExit: {error})")
        return 1
    except BrokenPipeError:  # the reader of our output left (`rmfx report ... | head`)
        _drop_output()
        return 1
    return 0


def _with_values(arguments: Sequence[str]) -> list[str]:
    """The arguments, where a list that begins with a minus is part of the option before it.

    argparse takes it for an option of its own, since it is no number.
    """
    made: list[str] = []
    for argument in arguments:
        if made and made[-1].startswith("--") and _LIST.fullmatch(argument):
            made[-1] += f"={argument}"
        else:
            made.append(argument)
    return made


def _told(error: RmfxError | MemoryError) -> str:
    """An error in one line."""
    if isinstance(error, MemoryError):
        return f"not enough memory ({first_line(error)}); give smaller inputs"
    return " ".join(str(error).split())


def _complain(message: str) -> None:
    sys.stderr.write(f"rmfx: {message}\n")


def _drop_output() -> None:
    """Keeps Python from flushing, as it ends, what nobody takes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
