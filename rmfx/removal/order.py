"""Columns that put channels in another order: an index, which multiplies nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from rmfx.algebra.laws import in_turn
from rmfx.algebra.layer import Layer

from .column import Column, Label, Spot
from .side_tensors import Widths, pick
from .site import Site


@dataclass(frozen=True)
class Shuffle(Layer):
    """Groups of channels take turns, as torch.nn.ChannelShuffle has it, in each of some blocks.

    Attributes:
        blocks: of channels, which stay where they are.
        groups: of each block, which take turns behind it.
    """

    blocks: int = 1
    groups: int = 1

    def order(self, channels: int) -> Tensor:
        """Which channel of its input each of its output is."""
        numbers = torch.arange(channels).reshape(self.blocks, self.groups, -1)
        return numbers.transpose(1, 2).flatten()


@dataclass(frozen=True, eq=False)
class Shuffled(Column):
    """The branch's channels in another order, and both blocks in other runs."""

    main: Shuffle
    before: int = 1  # the runs in front of it

    @classmethod
    def of(cls, layers: Sequence[Any], widths: Widths, carried: fx.Node | None) -> Column:
        return cls(layers[0])

    @property
    def stays(self) -> bool:
        """Whether every channel stays where it is."""
        return self.main.groups == 1 and self.before == self.runs

    def label(self, site: Site, index: int) -> Label:
        return "", site.join

    def put(self, spot: Spot) -> fx.Node:
        main, carry = spot.widths
        carried = main + torch.arange(carry)
        stood = in_turn([torch.arange(main), carried], self.before)
        wanted = in_turn([self.main.order(main), carried], self.runs)
        channels = stood.argsort()[wanted]
        return pick(spot.net, spot.source, channels.tolist(), spot.site.dims)
