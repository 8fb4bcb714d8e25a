"""How main block and carry stand between the layers of a plain chain: found before any weight.

Between two linear columns the channels stand in r runs (`rmfx.algebra.laws`). Each linear column is
a form of so many groups that reads some runs and writes some; what stands between acts on each
channel alone and keeps the runs. So the cheapest layout of a chain is a shortest path over
(column, runs), of which only the shapes of the layers are asked.

The price of a form is its multiply-adds. Where the target is time, groups of fewer than 8 channels
count as if they had 8, except in depthwise layers: the libraries of CPUs compute in vectors of 8 or
16 channels, and take as long for a group of 2 as for one of 8.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rmfx.algebra.affine import AffineConv
from rmfx.algebra.laws import (
    area_after,
    direct_sum,
    groups_side_by_side,
    join,
    plus,
    spread,
    stack,
    window_of,
)
from rmfx.choices import TARGETS
from rmfx.errors import Refusal
from rmfx.rules.linear import MOVING

from .column import Column
from .columns import Linear, linear_of

Runs = tuple[int, int]  # before and behind a layer


@dataclass(frozen=True)
class Target:
    """What a layout is chosen for.

    Attributes:
        narrow: channels that each side of a group counts for at least.
    """

    narrow: int


TIME, MACS = Target(narrow=8), Target(narrow=1)
BY_NAME = dict(zip(TARGETS, (TIME, MACS), strict=True))


@dataclass(frozen=True)
class Form:
    """What a linear column becomes.

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
    """The forms of a chain's linear columns.

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
    for column in linear:
        window = window_of((column.main, column.carry))
        if isinstance(window, Refusal):
            return window
    areas = area_after([c.main for c in linear])
    best: dict[int, tuple[float, tuple[Form, ...]]] = {1: (0.0, ())}  # by the runs behind
    gaps = [*_runs_behind(columns, linear, target), [1]]
    for column, area, behind in zip(linear, areas, gaps, strict=True):
        ends = (column is linear[0], column is linear[-1])
        found: dict[int, tuple[float, tuple[Form, ...]]] = {}
        for (runs, (price, forms)), after in itertools.product(best.items(), behind):
            form = min(
                _forms(column, (runs, after), ends, target), key=lambda f: f.price, default=None
            )
            if form is None:
                continue
            total = price + form.price * area
            if after not in found or total < found[after][0]:
                found[after] = total, (*forms, form)
        best = found
    price, forms = best[1]
    work = sum(form.weights * area for form, area in zip(forms, areas, strict=True))
    return Layout(forms, work, price)


def _runs_behind(
    columns: Sequence[Column], linear: Sequence[Linear], target: Target
) -> Iterator[list[int]]:
    """The runs that are worth a look behind each linear column but the last."""
    counts = {n for column in linear for f in (column.main, column.carry) for n in (f.groups,)}
    counts |= {n for c in linear for n in groups_side_by_side((c.main, c.carry)) or ()}
    where = [i for i, column in enumerate(columns) if isinstance(column, Linear)]
    for column, (start, end) in zip(linear, itertools.pairwise(where), strict=False):
        between = columns[start:end]
        alone = all(c.may_take_turns and c.taps_are_pooled for c in between)
        most = math.gcd(column.main.out_channels, column.carry.out_channels)
        if not column.main.dims or not alone:
            yield [1]
            continue
        wide = {most // n for n in (1, target.narrow, 2 * target.narrow) if most % n == 0}
        yield sorted({1} | wide | {n for n in counts if most % n == 0})


def _forms(column: Linear, runs: Runs, ends: tuple[bool, bool], target: Target) -> Iterator[Form]:
    """Every form of a linear column between given runs; ends: whether it is the first, the last."""
    pair = (column.main, column.carry)
    window = window_of(pair)
    if isinstance(window, Refusal):
        return
    if column.picked is not None and runs == (1, 1) and not any(ends):
        yield Form(runs, 0, 0, MOVING * len(column.picked))
    taps = math.prod(window[2])
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
    sides = block if block == (1, 1) else [max(n, target.narrow) for n in block]
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


def described(layout: Layout) -> str:
    """How the carry stands beside the main block between the two ends."""
    turns = ", in turns with the branch" if any(f.runs[1] > 1 for f in layout.forms) else ""
    grouped = {form.groups != 1 for form in layout.forms[1:-1] if form.groups != 0}
    if not grouped:
        return turns
    how = "carry partly grouped" if len(grouped) == 2 else "grouped" if True in grouped else "dense"
    return f"{turns}, {how}"
