"""The columns of a plain chain: what stands side by side.

Both branches are written side by side, one *column* per layer of the plain chain:
    linear      f_i beside a Dirac tap, the shortcut's map, or the other branch's layer:
                the first column is a `stack` (Δ merged in), the last a `join` (∇ merged in),
                those between are direct sums, a single column is a `plus`
    activation  acts on one block of channels, or on both
    norm        a batch norm on the main block, an identity batch norm on the carry
    lateral     a product, a sum or a concatenation with other tensors, on one block: the other
                block meets ones, zeros or nothing
    shared      padding with other values than zeros, a max pool or an interpolation, which both
                blocks get
    order       an index into the channels of the main block, which may put both in other runs

A kind of column is one class, with its line in `KINDS`: which layers stand in it, at what price
side by side, and what becomes of it in the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import fx, nn

from rmfx.algebra.activation import Activation, Block
from rmfx.algebra.affine import AffineConv
from rmfx.algebra.blockwise import Blockwise, way_of
from rmfx.algebra.laws import Window, groups_side_by_side, window_of
from rmfx.algebra.layer import Layer
from rmfx.algebra.products import Unmerged
from rmfx.errors import Refusal
from rmfx.ir.elements import Border, ByChannel, Interpolation, MaxPool, Virtual
from rmfx.ir.laterals import Lateral
from rmfx.ir.notes import Shape
from rmfx.rules.batch_norm import identity_norm

from .column import Column, Label, Spot
from .order import Order, Ordered
from .side_tensors import (
    Share,
    Widths,
    call_again,
    combine,
    may_take_turns,
    spread_like_the_value,
)
from .site import Norm, Site, Step

Pair = tuple[Step | None, Step | None]


@dataclass(frozen=True, eq=False)
class Linear(Column):
    """A linear column."""

    main: AffineConv
    carry: AffineConv

    @classmethod
    def of(cls, layers: Sequence[Any], widths: Widths, carried: fx.Node | None) -> Column:
        dims = next(f.dims for f in layers if f is not None)
        pairs = zip(layers, widths, strict=True)
        return cls(*(f or AffineConv.identity(width, dims) for f, width in pairs))

    @staticmethod
    def price(layers: Sequence[Any]) -> float | None:
        fits = len(layers) > 1 or layers[0].preserves_size
        return None if not fits or isinstance(window_of(layers), Refusal) else 1.0

    @cached_property
    def window(self) -> Window | Refusal:
        """Where both blocks read."""
        return window_of((self.main, self.carry))

    @cached_property
    def groups_side_by_side(self) -> Sequence[int] | None:
        """Groups of each block where these are of one shape."""
        return groups_side_by_side((self.main, self.carry))

    def padded(self, before: int, behind: int) -> Column:
        carry = self.carry.pad_channels(before, behind)
        return self if carry is self.carry else replace(self, carry=carry)

    def widths_behind(self, widths: Widths, dims: int) -> Widths:
        return self.main.out_channels, self.carry.out_channels

    def merged(self) -> Linear | Refusal:
        """The same with the products of what is not multiplied yet."""
        blocks = [f.merged() if isinstance(f, Unmerged) else f for f in (self.main, self.carry)]
        for block in blocks:
            if isinstance(block, Refusal):
                return block
        main, carry = (f for f in blocks if isinstance(f, AffineConv))
        return replace(self, main=main, carry=carry)


@dataclass(frozen=True, eq=False)
class Built(Linear):
    """A linear column as the one layer that it becomes."""

    layer: AffineConv

    def _callee(self, spot: Spot) -> Virtual:
        return Virtual(self.layer, spot.site.dtype, spot.site.device)

    def _shape_behind(self, shape: Shape) -> Shape:
        layer = self.layer
        if not layer.dims:
            return (*shape[:-1], layer.out_channels)
        size = (
            None if n is None else (n + a) // s
            for n, a, s in zip(shape[2:], layer.growth, layer.stride, strict=True)
        )
        return (shape[0], layer.out_channels, *size)


@dataclass(frozen=True, eq=False)
class Pointwise(Column):
    """An activation column; None leaves a block unchanged.

    `carried` is the node whose value the carry holds here, None if it is not a node's value;
    `means` are those of its module, None for the simplest.
    """

    main: Activation | Blockwise | None
    carry: Activation | Blockwise | None
    widths: Widths
    carried: fx.Node | None = None
    means: str | None = None

    @classmethod
    def of(cls, layers: Sequence[Any], widths: Widths, carried: fx.Node | None) -> Column:
        return cls(layers[0], layers[1], widths, carried)

    @staticmethod
    def price(layers: Sequence[Any]) -> float:
        if len(layers) == 1:
            return 1.2
        return 1.0 if layers[0].signature == layers[1].signature else 1.1

    def padded(self, before: int, behind: int) -> Column:
        widths = (self.widths[0], behind)
        return self if widths == self.widths else replace(self, widths=widths)

    @property
    def blocks(self) -> tuple[Block, ...]:
        parts = zip((self.main, self.carry), (n // self.runs for n in self.widths), strict=True)
        main, carry = (f.over(width) if f else (Block(width, None),) for f, width in parts)
        return (main + carry) * self.runs

    @property
    def may_take_turns(self) -> bool:
        return not any(f.is_per_channel for f in (self.main, self.carry) if f is not None)

    def _callee(self, spot: Spot) -> Virtual | nn.Module:
        site, whole = spot.site, Blockwise(self.blocks, spot.site.dims, self.means)
        if way_of(whole.blocks) == "identity":
            return whole.to_module(site.dtype, site.device)
        return Virtual(whole, site.dtype, site.device)


@dataclass(frozen=True, eq=False)
class Normalised(Column):
    """A batch norm on the main block, the identity on the carry."""

    main: Norm
    carried: int

    @classmethod
    def of(cls, layers: Sequence[Any], widths: Widths, carried: fx.Node | None) -> Column:
        return cls(layers[0], widths[1])

    def padded(self, before: int, behind: int) -> Column:
        return replace(self, carried=behind)

    def _callee(self, spot: Spot) -> nn.Module:
        return identity_norm(self.main.module, self.carried, spot.moments, self.runs)


@dataclass(frozen=True, eq=False)
class Sided(Column):
    """A combination with other tensors, of the main block (0) or of the carry (1)."""

    lateral: Lateral
    block: int
    spread: Mapping[fx.Node, fx.Node]

    @classmethod
    def of(cls, layers: Sequence[Any], widths: Widths, carried: fx.Node | None) -> Column:
        block = 0 if layers[1] is None else 1
        return cls(layers[block], block, spread_like_the_value(layers[block]))

    @staticmethod
    def price(layers: Sequence[Any]) -> float | None:
        return 1.2 if len(layers) == 1 else None

    def widths_behind(self, widths: Widths, dims: int) -> Widths:
        main, carry = widths
        if self.block == 0:
            return self.lateral.channels_behind(main, dims), carry
        return main, self.lateral.channels_behind(carry, dims)

    @property
    def may_take_turns(self) -> bool:
        return may_take_turns(self.lateral)

    @property
    def combination(self) -> fx.Node:
        return self.lateral.node

    def label(self, site: Site, index: int) -> Label:
        return "", self.lateral.node

    def put(self, spot: Spot) -> fx.Node:
        lateral = self.lateral.reading(spot.elsewhere)
        share = Share(self.block, spot.widths, self.runs)
        return combine(spot.net, lateral, spot.source, share, spot.site.dims, self.spread)


@dataclass(frozen=True, eq=False)
class Shared(Column):
    """A padding, a max pool or an interpolation, of both blocks alike."""

    layer: Border | ByChannel

    @classmethod
    def of(cls, layers: Sequence[Any], widths: Widths, carried: fx.Node | None) -> Column:
        return cls(layers[0])

    @staticmethod
    def price(layers: Sequence[Any]) -> float | None:
        alike = len(layers) == 2 and layers[0].signature == layers[1].signature
        return 1.0 if alike else None

    def label(self, site: Site, index: int) -> Label:
        return "", self.layer.node

    def put(self, spot: Spot) -> fx.Node:
        return call_again(spot.net, self.layer, spot.source, sum(spot.widths))


KINDS: dict[type[Layer], type[Column]] = {
    AffineConv: Linear,
    Activation: Pointwise,
    Blockwise: Pointwise,
    Norm: Normalised,
    Lateral: Sided,
    Border: Shared,
    MaxPool: Shared,
    Interpolation: Shared,
    Order: Ordered,
}


def column_of(
    pair: Pair, layers: Sequence[Layer | None], widths: Widths, carried: fx.Node | None = None
) -> Column:
    """The column of two steps, with what stands for them side by side.

    Args:
        layers: of main block and carry; the carry's own where it is no step.
    """
    kind = next(KINDS[type(f)] for f in layers if f is not None)
    taps = [(step.value, i) for i, step in enumerate(pair) if step is not None and step.tapped]
    return replace(
        kind.of(layers, widths, carried),
        steps=tuple(step for step in pair if step is not None),
        taps=tuple((value, block) for value, block in taps if value is not None),
    )


def price_of(pair: Pair) -> float | None:
    """What a column of two steps would cost, None where it would not be exact."""
    layers = [step.layer for step in pair if step is not None]
    kinds = {KINDS[type(layer)] for layer in layers}
    return kinds.pop().price(layers) if len(kinds) == 1 else None


def linear_of(columns: Iterable[Column]) -> list[Linear]:
    """The linear ones among some columns."""
    return [column for column in columns if isinstance(column, Linear)]
