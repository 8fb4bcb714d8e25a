"""How wide a carry is between the layers of a plain chain.

Beside a layer of groups, each of a inputs and b outputs, a carry of C channels is more such groups
if it is padded with zero channels: to a multiple of a where a = b, else, where C ≤ min(a, b), to a
inputs and b outputs of one group. The layers next to it give and read the padded width; where they
are depthwise beside a depthwise layer they hand it on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from .column import Column
from .columns import Linear, linear_of

Widths = tuple[int, ...]  # of the carry behind each linear column but the last
MOST_CHOICES = 64


def widths_of(columns: Sequence[Column]) -> Iterator[Widths]:
    """The carry's own widths, and every padding with which it fits beside some of the layers."""
    linear = linear_of(columns)
    own = tuple(column.carry.out_channels for column in linear[:-1])
    options = [[None, *filter(None, [_wanted(column)])] for column in linear[1:-1]]
    if math.prod(map(len, options)) > MOST_CHOICES:
        options = [[choices[-1]] for choices in options]
    found = dict.fromkeys([own])
    for chosen in itertools.product(*options):
        widths = _agreed(linear, chosen)
        if widths is not None:
            found[tuple(width or n for width, n in zip(widths, own, strict=True))] = None
    yield from found


def _wanted(column: Linear) -> tuple[int, int] | None:
    """Widths before and behind a layer with which the carry is whole groups beside it."""
    (a, b), carry = column.main.block, column.carry
    count = carry.in_channels
    if not carry.is_depthwise or not carry.dims or (a, b) == (1, 1):
        return None
    if a == b:
        width = -(-count // a) * a
        return width, width
    return (a, b) if count <= min(a, b) else None


def _agreed(
    linear: Sequence[Linear], chosen: Sequence[tuple[int, int] | None]
) -> list[int | None] | None:
    """The widths in which layers and their neighbours agree, None if they do not."""
    widths: list[int | None] = [None] * (len(linear) - 1)
    for i, ends in enumerate(chosen):  # the layer between gap i and gap i + 1
        for gap, width in zip((i, i + 1), ends or (), strict=False):
            if widths[gap] not in (None, width):
                return None
            widths[gap] = width
    keeps = [c.main.is_depthwise and c.carry.is_depthwise for c in linear[1:-1]]
    order = list(enumerate(keeps))
    for i, keep in (*order, *reversed(order)):
        before, behind = widths[i : i + 2]
        if keep and before != behind:
            if None not in (before, behind):
                return None
            widths[i] = widths[i + 1] = before or behind
    return widths


def padded(columns: Sequence[Column], widths: Widths) -> list[Column]:
    """The columns with their carry so wide behind each linear one."""
    wanted = iter(widths)
    before = linear_of(columns)[0].carry.in_channels
    result: list[Column] = []
    for column in columns:
        behind = before
        if isinstance(column, Linear):
            behind = next(wanted, column.carry.out_channels)
        result.append(column.padded(before, behind))
        before = behind
    return result
