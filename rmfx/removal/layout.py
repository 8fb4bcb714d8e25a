"""How main block and carry stand between the layers of a plain chain: found before any weight.

Between two linear columns the channels stand in r runs (`rmfx.algebra.laws`). Each linear column is
a form of so many groups that reads some runs and writes some; what stands between acts on each
channel alone and keeps the runs. So the cheapest layout of a chain is a shortest path over
(column, runs), of which only the shapes of the layers are asked.

The price of a form is its multiply-adds. Where the target is time, groups of few channels count as
if they had more (`Target`), except in depthwise layers: the libraries of CPUs compute in vectors of
8 or 16 channels, and take as long for a group of 2 as for one of 8 in a layer of one tap.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from rmfx.algebra.affine import AffineConv
from rmfx.algebra.laws import direct_sum, join, plus, spread, stack
from rmfx.errors import Refusal
from rmfx.words import IN_TURNS, TAKEN_APART

from .column import Column
from .columns import Linear, linear_of
from .order import Ordered
from .target import Target

Runs = tuple[int, int]  # before and behind a layer


@dataclass(frozen=True)
class Form:
    """What a linear column becomes, or one of order.

    Attributes:
        runs: in which the blocks take turns before and behind it; 1 at the ends of the chain.
        groups: of the layer, None where each group of either block is one of its own; 0 where it is
            an index and no layer.
        weights: how many it has.
        price: of a position of its output.
    """

    runs: Runs
    groups: int | None
    weights: int
    price: float


@dataclass(frozen=True)
class Layout:
    """The forms of a chain's columns that have one.

    Attributes:
        work: multiply-adds per position of the chain's input.
        price: the same as it is compared.
    """

    forms: tuple[Form, ...]
    work: float
    price: float


class _Shape(NamedTuple):
    """A linear column, as far as its forms go.

    Attributes:
        n_in, n_out: channels before and behind it.
        taps: of the window of both blocks.
        groups: that both blocks have in common.
        side_by_side: groups of each block where these are of one shape.
        inner: whether both blocks stand before it, behind it.
    """

    n_in: int
    n_out: int
    taps: int
    groups: int
    side_by_side: tuple[int, ...] | None
    inner: tuple[bool, bool]

    @staticmethod
    def of(column: Linear, kernel: Sequence[int], inner: tuple[bool, bool]) -> _Shape:
        pair = (column.main, column.carry)
        ins, outs = [f.in_channels for f in pair], [f.out_channels for f in pair]
        counts = column.groups_side_by_side if all(inner) and column.main.dims else None
        return _Shape(
            sum(ins) if inner[0] else ins[0],
            sum(outs) if inner[1] else outs[0],
            math.prod(kernel),
            math.gcd(*(f.groups for f in pair)) if column.main.dims else 1,
            tuple(counts) if counts else None,
            inner,
        )


def layout_of(columns: Sequence[Column], target: Target) -> Layout | Refusal:
    """The cheapest layout of a chain."""
    linear = linear_of(columns)
    best: dict[int, tuple[float, float, tuple[Form, ...]]] = {1: (0.0, 0.0, ())}  # by runs behind
    area, width = 1.0, 0
    for column, behind in _with_runs_behind(columns, linear, target):
        form_of: Callable[[Runs], Form]
        if isinstance(column, Ordered):
            form_of = partial(_order, column, target.moving * width)
        else:
            window = column.window
            if isinstance(window, Refusal):
                return window
            area /= math.prod(column.main.stride)
            width = column.main.out_channels + column.carry.out_channels
            inner = (column is not linear[0], column is not linear[-1])
            form_of = partial(_form, _Shape.of(column, window.kernel, inner), target)
        found: dict[int, tuple[float, float, tuple[Form, ...]]] = {}
        for (before, (price, work, so_far)), after in itertools.product(best.items(), behind):
            form = form_of((before, after))
            total = price + form.price * area
            if after not in found or total < found[after][0]:
                found[after] = total, work + form.weights * area, (*so_far, form)
        best = found
    price, work, chosen = best[1]
    return Layout(chosen, work, price)


def _with_runs_behind(
    columns: Sequence[Column], linear: Sequence[Linear], target: Target
) -> Iterator[tuple[Linear | Ordered, Sequence[int]]]:
    """The columns that have a form, each with the runs that are worth a look behind it."""
    counts = {f.groups for column in linear for f in (column.main, column.carry)}
    counts |= {n for c in linear for n in c.groups_side_by_side or ()}
    placed = [(i, c) for i, c in enumerate(columns) if isinstance(c, Linear | Ordered)]
    ends = [*(i for i, _ in placed[1:]), len(columns)]
    layer, width = linear[0], 0
    for (start, column), end in zip(placed, ends, strict=True):
        layer = column if isinstance(column, Linear) else layer
        width = column.main.channels_behind(width, layer.main.dims)
        most = math.gcd(width, layer.carry.out_channels)
        alone = all(c.may_take_turns and c.taps_are_pooled for c in columns[start:end])
        if layer is linear[-1] or not layer.main.dims or not alone:
            yield column, [1]
            continue
        wide = {most // n for n in (target.narrow, 2 * target.narrow) if most % n == 0}
        yield column, sorted({1, most} | wide | {math.gcd(most, n) for n in counts})


def _order(column: Ordered, price: float, runs: Runs) -> Form:
    """Channels may come to stand in any order."""
    return Form(runs, 0, 0, 0.0 if column.stays_between(runs) else price)


@functools.lru_cache(maxsize=1 << 16)  # the same shapes come again and again
def _form(shape: _Shape, target: Target, runs: Runs) -> Form:
    """The cheapest form of a linear column between given runs."""
    common = math.gcd(shape.groups, *itertools.compress(runs, shape.inner))
    common = common if any(shape.inner) else shape.groups
    options: list[tuple[int | None, int]] = [(n, n) for n in {1, common}]
    counts = shape.side_by_side
    if counts and runs[0] == runs[1] and not any(n % runs[0] for n in counts):
        options.append((None, sum(counts)))
    least = target.narrow if shape.taps == 1 else target.narrow_window
    forms = []
    for groups, count in options:
        block = (shape.n_in // count, shape.n_out // count)
        sides = block if block == (1, 1) else [max(n, least) for n in block]
        price = float(count * math.prod(sides) * shape.taps)
        forms.append(Form(runs, groups, shape.n_in * block[1] * shape.taps, price))
    return min(forms, key=lambda form: form.price)


def built(column: Linear, form: Form, ends: tuple[bool, bool]) -> AffineConv | Refusal:
    """The layer that a linear column becomes; ends: whether it is the first, the last."""
    pair, groups = (column.main, column.carry), form.groups or 1
    if all(ends):
        return plus(*pair)
    if ends[0]:
        return stack(*pair, groups=groups, runs=form.runs[1])
    if ends[1]:
        return join(*pair, groups=groups, runs=form.runs[0])
    if form.groups is None:
        return direct_sum(*pair, runs=form.runs[0])
    return spread(*pair, groups=groups, runs=form.runs)


def described(columns: Sequence[Column], layout: Layout) -> str:
    """How the carry stands beside the main block between the two ends."""
    placed = [column for column in columns if isinstance(column, Linear | Ordered)]
    layers = [f for c, f in zip(placed, layout.forms, strict=True) if isinstance(c, Linear)]
    turns = f", {IN_TURNS}" if any(f.runs[1] > 1 for f in layers) else ""
    made = any(step.path for column in columns for step in column.steps)
    apart = f", {TAKEN_APART}" if made else ""
    grouped = {form.groups != 1 for form in layers[1:-1] if form.groups != 0}
    if not grouped:
        return turns + apart
    kinds = {True: "grouped", False: "full"}
    how = " and ".join(kinds[one] for one in sorted(grouped, reverse=True))
    return f"{turns}, inner ones {how}{apart}"
