"""The columns of a plain chain: what stands side by side, what it costs, and the build.

Both branches are written side by side, one *column* per layer of the plain chain:
    linear      f_i beside a Dirac tap, the shortcut's map, or the other branch's layer:
                the first column is a `stack` (Δ merged in), the last a `join` (∇ merged in),
                those between are direct sums, a single column is a `plus`
    activation  acts on one block of channels, or on both
    norm        a batch norm on the main block, an identity batch norm on the carry
    lateral     a product, a sum or a concatenation with other tensors, on one block: the other
                block meets ones, zeros or nothing
    shared      padding with other values than zeros, or a max pool, which both blocks get
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from rmfx.algebra.activation import Activation, Block, Blockwise
from rmfx.algebra.affine import AffineConv
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
from rmfx.ir.elements import Border, MaxPool
from rmfx.ir.laterals import Lateral

from .site import Norm, Step

POINTWISE = (Activation, Blockwise)
Tap = tuple[fx.Node, int]


@dataclass(frozen=True, eq=False, kw_only=True)
class _Column:
    """What all columns have.

    Attributes:
        steps: the layers of the site that it stands for.
        taps: nodes whose value it holds and others read, each with its block (0 or 1).
    """

    steps: tuple[Step, ...] = ()
    taps: tuple[Tap, ...] = ()


@dataclass(frozen=True, eq=False)
class Linear(_Column):
    """A linear column."""

    main: AffineConv
    carry: AffineConv


@dataclass(frozen=True, eq=False)
class Pointwise(_Column):
    """An activation column; None leaves a block unchanged.

    `carried` is the node whose value the carry holds here, None if it is not a node's value. In so
    many `runs` the blocks take turns.
    """

    main: Activation | Blockwise | None
    carry: Activation | Blockwise | None
    widths: tuple[int, int]
    carried: fx.Node | None = None
    runs: int = 1

    @property
    def blocks(self) -> tuple[Block, ...]:
        main, carry = (width // self.runs for width in self.widths)
        return (_blocks(main, self.main) + _blocks(carry, self.carry)) * self.runs

    @property
    def may_take_turns(self) -> bool:
        """Whether the same function applies to all channels of a block."""
        layers = [layer for layer in (self.main, self.carry) if layer is not None]
        return not any(isinstance(f, Blockwise) or f.is_per_channel for f in layers)


def _blocks(width: int, layer: Activation | Blockwise | None) -> tuple[Block, ...]:
    return layer.blocks if isinstance(layer, Blockwise) else (Block(width, layer),)


@dataclass(frozen=True, eq=False)
class Normalised(_Column):
    """A batch norm on the main block, the identity on the carry; `runs` as in `Pointwise`."""

    main: Norm
    carried: int
    runs: int = 1


@dataclass(frozen=True, eq=False)
class Sided(_Column):
    """A combination with other tensors, of the main block (0) or of the carry (1)."""

    lateral: Lateral
    block: int


@dataclass(frozen=True, eq=False)
class Shared(_Column):
    """A padding or a max pool, of both blocks alike."""

    layer: Border | MaxPool


Column = Linear | Pointwise | Normalised | Sided | Shared
Layer = AffineConv | Pointwise | Normalised | Sided | Shared


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


def taps_of(step: Step, block: int) -> tuple[Tap, ...]:
    """What others read of a step, in which block."""
    return ((step.value, block),) if step.tapped and step.value is not None else ()


# ---- cost and build ------------------------------------------------------------------------------
def work_of(columns: Sequence[Column]) -> float | Refusal:
    """Multiply-adds per position of the fork, without building any weight."""
    sizes = sizes_of(columns)
    if isinstance(sizes, Refusal):
        return sizes
    areas = area_after([c.main for c in columns if isinstance(c, Linear)])
    return float(sum(size * area for size, area in zip(sizes, areas, strict=True)))


def sizes_of(columns: Sequence[Column]) -> list[int] | Refusal:
    """Weights of each linear column once it is built."""
    linear = [c for c in columns if isinstance(c, Linear)]
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
    if not start.main.dims or any(c.taps or isinstance(c, Sided) for c in between):
        return 1
    if not all(c.may_take_turns for c in between if isinstance(c, Pointwise)):
        return 1
    return math.gcd(start.main.groups, start.carry.groups)


def build(columns: Sequence[Column]) -> list[Layer] | Refusal:
    """The layers of the plain chain."""
    linear = [i for i, c in enumerate(columns) if isinstance(c, Linear)]
    first, last, runs = linear[0], linear[-1], runs_of(columns)
    order: Tensor | None = None  # in which the next linear layer meets what it reads
    layers: list[Layer] = []
    for i, column in enumerate(columns):
        if not isinstance(column, Linear):
            if order is not None and isinstance(column, (Pointwise, Normalised)):
                column = replace(column, runs=runs)
            layers.append(column)
            continue
        pair = (column.main, column.carry)
        if first == last:
            layer = plus(*pair)
        elif i == first:
            layer = stack(*pair, runs=runs)
        else:
            layer = join(*pair) if i == last else direct_sum(*pair)
        if isinstance(layer, Refusal):
            return layer
        layers.append(layer if order is None else layer.reading(order))
        order = None
        if i == first and runs > 1:
            main, carry = (f.out_channels for f in pair)
            order = in_turn([torch.arange(main), main + torch.arange(carry)], runs)
    return layers
