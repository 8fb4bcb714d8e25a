"""Columns that put channels in another order: an index, which multiplies nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from rmfx.algebra.laws import in_turn
from rmfx.algebra.layer import Layer

from .column import Column, Label, Spot
from .side_tensors import Widths, pick
from .site import Site


@dataclass(frozen=True)
class Order(Layer):
    """Channels of a value, in some order.

    Attributes:
        rows: which channel of its input each of its output is; None where they stay.
    """

    rows: tuple[int, ...] | None = None

    @staticmethod
    def shuffle(channels: int, *, groups: int, blocks: int = 1) -> Order:
        """Groups take turns, as torch.nn.ChannelShuffle has it, in each of some blocks."""
        numbers = torch.arange(channels).reshape(blocks, groups, -1)
        return Order(tuple(numbers.transpose(1, 2).flatten().tolist()))

    def channels_behind(self, channels: int, dims: int) -> int:
        return channels if self.rows is None else len(self.rows)


@dataclass(frozen=True, eq=False)
class Ordered(Column):
    """The branch's channels in another order, and both blocks in other runs."""

    main: Order
    before: int = 1  # the runs in front of it

    @classmethod
    def of(cls, layers: Sequence[Any], widths: Widths, carried: fx.Node | None) -> Column:
        return cls(layers[0])

    def between(self, runs: tuple[int, int]) -> Ordered:
        """The same between some runs."""
        return replace(self, before=runs[0], runs=runs[1])

    def stays_between(self, runs: tuple[int, int]) -> bool:
        """Whether every channel stays where it is."""
        return self.main.rows is None and runs[0] == runs[1]

    @property
    def stays(self) -> bool:
        """The same between its own runs."""
        return self.stays_between((self.before, self.runs))

    def widths_behind(self, widths: Widths, dims: int) -> Widths:
        return self.main.channels_behind(widths[0], dims), widths[1]

    def label(self, site: Site, index: int) -> Label:
        nodes = [node for step in self.steps for node in step.nodes]
        return "", nodes[0] if nodes else site.join

    def put(self, spot: Spot) -> fx.Node:
        main, carry = spot.widths
        own, carried = torch.arange(main), main + torch.arange(carry)
        rows: Tensor = own if self.main.rows is None else torch.tensor(self.main.rows)
        stood = in_turn([own, carried], self.before).argsort()
        channels = stood[in_turn([rows, carried], self.runs)]
        return pick(spot.net, spot.source, channels.tolist(), spot.site.dims)
