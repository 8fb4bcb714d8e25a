"""What the command shows of its work: the progress on stderr, the result on stdout."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from rmfx.errors import quiet_logs

from .values import OutputError


def show(options: argparse.Namespace, text: str, result: dict[str, Any]) -> None:
    """Writes what came out to stdout: text, or with `--json` an object."""
    try:
        sys.stdout.write((json.dumps(result, indent=2) if options.json else text) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"stdout cannot be written: {error.strerror or error}") from error


def wrote(path: str) -> str:
    """A line on a file that was written."""
    return f"Wrote {path} ({os.path.getsize(path) / 1000:,.1f} kB)."


@contextlib.contextmanager
def progress(steps: int | None, width: int = 20) -> Iterator[Callable[[str], None]]:
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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Sends what models print to stderr, as stdout is for the result; torch logs nothing."""
    with contextlib.redirect_stdout(sys.stderr), quiet_logs():
        yield
