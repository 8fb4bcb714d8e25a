"""What a node that takes one tensor can mean, as values of the algebra."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from rmfx.algebra.activation import Activation, Blockwise
from rmfx.algebra.affine import AffineConv, Pads
from rmfx.errors import Refusal


@dataclass(frozen=True, eq=False)
class Virtual:
    """A layer that has no module yet."""

    layer: AffineConv | Blockwise
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, eq=False)
class Deferred:
    """A linear layer that is fixed by (channels, dims) of its place."""

    build: Callable[[int, int], AffineConv | Refusal]


@dataclass(frozen=True, eq=False)
class Border:
    """Padding with other values than zeros: reflected, repeated, wrapped round or constant.

    Attributes:
        node: what pads; it does so channel by channel.
        pairs: (before, after) per spatial dimension, not negative.
        filling: the mode and the value.
    """

    node: fx.Node
    pairs: Pads
    filling: tuple[str, float]

    @property
    def dims(self) -> int:
        return len(self.pairs)

    @property
    def signature(self) -> tuple[object, ...]:
        """Equal for paddings that do the same."""
        return (self.filling, self.pairs)

    def affine(self, channels: int) -> AffineConv:
        """A layer of the same geometry, which is the same map away from the border."""
        return AffineConv.identity(channels, len(self.pairs), padding=self.pairs)


@dataclass(frozen=True, eq=False)
class MaxPool:
    """The largest of some neighbours, channel by channel.

    Attributes:
        node: what pools.
        dims: spatial dimensions.
        signature: equal for pools that do the same.
        reason: why a carry cannot pass it.
    """

    node: fx.Node
    dims: int
    signature: tuple[object, ...]
    reason: str


CHANNEL_BY_CHANNEL = (Border, MaxPool)
Element = AffineConv | Deferred | Activation | Blockwise | Border | MaxPool
