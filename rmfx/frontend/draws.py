"""Random numbers of Python and numpy, which leave no trace: each becomes a constant."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from .holders import Generator
from .kept_state import KeepsStateError


@contextlib.contextmanager
def no_draws(again: Callable[[], object]) -> Iterator[None]:
    """Undo and refuse what is drawn inside from the generators that a process has one of.

    Args:
        again: does the same again, to tell own draws from those of other threads.

    Raises:
        KeepsStateError: something was drawn.
    """
    generators = [Generator("Python's random", random), *_of_numpy()]
    try:
        yield
    finally:
        drawn = [held for held in generators if held.changed() and _draws(held, again)]
        for generator in drawn:
            generator.restore()
        if drawn:
            raise KeepsStateError(
                f"its code draws from {drawn[0].path}, of which no graph can hold more than one "
                "number; draw in training mode only, or by torch"
            )


def _of_numpy() -> list[Generator]:
    numpy = sys.modules.get("numpy.random")
    return [] if numpy is None else [Generator("numpy.random", numpy.mtrand._rand)]


def _draws(generator: Generator, run: Callable[[], object]) -> bool:
    """Whether it is this thread that draws."""
    # It runs the model's own code, which may raise anything, as it did before.
    with contextlib.suppress(Exception):
        if generator.held is random:
            return _calls_python(run)
        with generator.held._bit_generator.lock:  # which others must wait for
            before = Generator(generator.path, generator.held)
            with contextlib.suppress(Exception):
                run()
            return before.changed() is not None
    return False


def _calls_python(run: Callable[[], object]) -> bool:
    calls: list[Any] = []
    drawing: Any = random.random

    def note(_: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and getattr(function, "__self__", None) is drawing.__self__:
            calls.append(function)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        with contextlib.suppress(Exception):
            run()
    finally:
        sys.setprofile(before)
    return bool(calls)
