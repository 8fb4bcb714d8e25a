"""Plans: the columns of a plain chain, the layers that they become, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from rmfx.algebra.laws import (
    area_after,
    common_block,
    direct_sum,
    in_turn,
    join,
    plus,
    stack,
    window_of,
)
from rmfx.errors import Refusal

from .columns import Built, Column, Linear, linear_of


@dataclass(frozen=True, eq=False)
class Plan:
    """An arrangement of a site.

    Attributes:
        columns: the layers of the plain chain.
        work: its multiply-adds per position of the fork.
        kept: nodes of the shortcut that stay, because others read what they give.
        layout: what sets it apart from the others.
    """

    columns: tuple[Column, ...]
    work: float
    kept: frozenset[fx.Node] = frozenset()
    layout: str = ""


def work_of(columns: Sequence[Column]) -> float | Refusal:
    """Multiply-adds per position of the fork, without building any weight."""
    sizes = sizes_of(columns)
    if isinstance(sizes, Refusal):
        return sizes
    areas = area_after([c.main for c in linear_of(columns)])
    return float(sum(size * area for size, area in zip(sizes, areas, strict=True)))


def sizes_of(columns: Sequence[Column]) -> list[int] | Refusal:
    """Weights of each linear column once it is built."""
    linear = linear_of(columns)
    runs, last = runs_of(columns), len(linear) - 1
    sizes: list[int] = []
    for i, column in enumerate(linear):
        size = _size(column, first=i == 0, last=i == last, runs=runs)
        if isinstance(size, Refusal):
            return size
        sizes.append(size)
    return sizes


def _size(column: Linear, *, first: bool, last: bool, runs: int) -> int | Refusal:
    """Weights of a linear column once it is built."""
    pair = (column.main, column.carry)
    window = window_of(pair)
    if isinstance(window, Refusal):
        return window
    taps = math.prod(window[2])
    ins, outs = [f.in_channels for f in pair], [f.out_channels for f in pair]
    if first and last:
        return outs[0] * ins[0] // math.gcd(*(f.groups for f in pair)) * taps
    if first:
        return sum(outs) * ins[0] // runs * taps
    if last:
        return outs[0] * sum(ins) * taps
    return sum(outs) * (groups_of(column) or sum(ins)) * taps


def groups_of(column: Linear) -> int | None:
    """Inputs of a group where main block and carry are one grouped layer; None if it is dense."""
    pair = (column.main, column.carry)
    block = common_block([f.block for f in pair])
    fits = block and all(f.groups % (block[0] // f.block[0]) == 0 for f in pair)
    return block[0] if block and fits else None


def runs_of(columns: Sequence[Column]) -> int:
    """In how many runs main block and carry take turns behind the first layer; 1: they do not.

    One below the other, a depthwise layer and a carry are a dense layer. With what each group gives
    put together they are a grouped one. So they stand where whatever comes before the next layer
    acts on each channel alone, and that layer is dense and can read channels in any order.
    """
    linear = [(i, c) for i, c in enumerate(columns) if isinstance(c, Linear)]
    if len(linear) < 2:
        return 1
    (first, start), (second, end) = linear[:2]
    if len(linear) > 2 and groups_of(end) is not None:
        return 1
    between = columns[first:second]
    alone = all(c.may_take_turns and not (c.taps or c.combination) for c in between)
    if not start.main.dims or not alone:
        return 1
    return math.gcd(start.main.groups, start.carry.groups)


def build(columns: Sequence[Column]) -> list[Column] | Refusal:
    """The columns with every linear one as the layer that it becomes."""
    linear, runs = linear_of(columns), runs_of(columns)
    first, last = linear[0], linear[-1]
    order: Tensor | None = None  # in which the next linear layer meets what it reads
    built: list[Column] = []
    for column in columns:
        if not isinstance(column, Linear):
            built.append(column if order is None else column.in_turns(runs))
            continue
        pair = (column.main, column.carry)
        if first is last:
            layer = plus(*pair)
        elif column is first:
            layer = stack(*pair, runs=runs)
        else:
            layer = join(*pair) if column is last else direct_sum(*pair)
        if isinstance(layer, Refusal):
            return layer
        layer = layer if order is None else layer.reading(order)
        built.append(Built(*pair, layer, steps=column.steps, taps=column.taps))
        order = None
        if column is first and runs > 1:
            main, carry = (f.out_channels for f in pair)
            order = in_turn([torch.arange(main), main + torch.arange(carry)], runs)
    return built
