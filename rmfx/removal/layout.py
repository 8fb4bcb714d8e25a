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

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from rmfx.algebra.affine import AffineConv
from rmfx.algebra.laws import direct_sum, groups_side_by_side, join, plus, spread, stack, window_of
from rmfx.errors import Refusal
from rmfx.report import IN_TURNS, TAKEN_APART

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


def layout_of(columns: Sequence[Column], target: Target) -> Layout | Refusal:
    """The cheapest layout of a chain."""
    linear = linear_of(columns)
    best: dict[int, tuple[float, float, tuple[Form, ...]]] = {1: (0.0, 0.0, ())}  # by runs behind
    area, width = 1.0, 0
    for column, behind in _with_runs_behind(columns, linear, target):
        forms: Callable[[Runs], Iterator[Form]]
        if isinstance(column, Ordered):
            forms = partial(_orders, column, target.moving * width)
        else:
            window = window_of((column.main, column.carry))
            if isinstance(window, Refusal):
                return window
            area /= math.prod(column.main.stride)
            width = column.main.out_channels + column.carry.out_channels
            ends = (column is linear[0], column is linear[-1])
            forms = partial(_forms, column, ends, math.prod(window[2]), target)
        found: dict[int, tuple[float, float, tuple[Form, ...]]] = {}
        for (before, (price, work, so_far)), after in itertools.product(best.items(), behind):
            form = min(forms((before, after)), key=lambda f: f.price, default=None)
            if form is None:
                continue
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
    counts |= {n for c in linear for n in groups_side_by_side((c.main, c.carry)) or ()}
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


def _orders(column: Ordered, price: float, runs: Runs) -> Iterator[Form]:
    """Channels may come to stand in any order."""
    stays = replace(column, before=runs[0], runs=runs[1]).stays
    yield Form(runs, 0, 0, 0.0 if stays else price)


def _forms(
    column: Linear, ends: tuple[bool, bool], taps: int, target: Target, runs: Runs
) -> Iterator[Form]:
    """Every form of a linear column between given runs.

    Args:
        ends: whether it is the first, the last.
        taps: of the window of both blocks.
    """
    pair = (column.main, column.carry)
    ins, outs = [f.in_channels for f in pair], [f.out_channels for f in pair]
    n_in, n_out = ins[0] if ends[0] else sum(ins), outs[0] if ends[1] else sum(outs)
    common = math.gcd(*(f.groups for f in pair)) if column.main.dims else 1
    if not all(ends):
        common = math.gcd(common, *(n for n, end in zip(runs, ends, strict=True) if not end))
    for groups in {1, common}:
        yield _form(runs, groups, groups, (n_in, n_out, taps), target)
    counts = None if any(ends) or not column.main.dims else groups_side_by_side(pair)
    if counts and runs[0] == runs[1] and not any(n % runs[0] for n in counts):
        yield _form(runs, None, sum(counts), (n_in, n_out, taps), target)


def _form(
    runs: Runs, groups: int | None, count: int, sizes: tuple[int, int, int], target: Target
) -> Form:
    n_in, n_out, taps = sizes
    block = (n_in // count, n_out // count)
    least = target.narrow if taps == 1 else target.narrow_window
    sides = block if block == (1, 1) else [max(n, least) for n in block]
    return Form(runs, groups, n_in * block[1] * taps, float(count * math.prod(sides) * taps))


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
    how = "carry partly grouped" if len(grouped) == 2 else "grouped" if True in grouped else "dense"
    return f"{turns}, {how}{apart}"
