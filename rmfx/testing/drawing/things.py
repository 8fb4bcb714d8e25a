"""Rows of tables of what may be drawn: how, where it suits, and how often."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .draws import Draws
from .values import Path

Draw = Callable[..., object]  # appends to the path it is given, with the choices it is given
Suits = Callable[..., bool]


def anywhere(sampler: Draws, path: Path, *_: Any) -> bool:
    """At every value."""
    return True


def on_maps(sampler: Draws, path: Path, *_: Any) -> bool:
    """At values with spatial dimensions."""
    return path.value.is_map


def on_tokens(sampler: Draws, path: Path, *_: Any) -> bool:
    """At tokens."""
    return path.value.tokens


@dataclass(frozen=True)
class Thing:
    """One row of a table: how something is drawn, and where it suits.

    Attributes:
        draw: called with the choices, the path that it appends to, and what `draw_one` is given.
        suits: called with the same.
        times: how often it stands among the options.
    """

    draw: Draw
    suits: Suits = anywhere
    times: int = 1


def draw_one(sampler: Draws, path: Path, things: Sequence[Thing], *given: Any) -> None:
    """Draw one of the things that suit."""
    options = [
        thing.draw
        for thing in things
        if thing.suits(sampler, path, *given)
        for _ in range(thing.times)
    ]
    sampler.pick(options)(sampler, path, *given)


def simplest_first(*tables: Sequence[Thing]) -> tuple[Thing, ...]:
    """One table of several; what suits anywhere is the simplest, to which draws shrink."""
    return tuple(sorted(itertools.chain(*tables), key=lambda thing: thing.suits is not anywhere))
