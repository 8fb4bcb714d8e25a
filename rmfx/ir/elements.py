"""What a node that takes one tensor can mean, as values of the algebra."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx, nn

from rmfx.algebra.affine import AffineConv, Pads
from rmfx.algebra.blockwise import Blockwise
from rmfx.algebra.layer import Layer
from rmfx.algebra.modules import to_modules
from rmfx.errors import Refusal


@dataclass(frozen=True, eq=False)
class Virtual:
    """A layer that has no module yet."""

    layer: AffineConv | Blockwise
    dtype: torch.dtype
    device: torch.device

    def modules(self) -> tuple[nn.Module, ...]:
        """What it becomes: a module, or a padding and a convolution."""
        if isinstance(self.layer, Blockwise):
            return (self.layer.to_module(self.dtype, self.device),)
        return to_modules(self.layer, self.dtype, self.device)


@dataclass(frozen=True, eq=False)
class Deferred(Layer):
    """A linear layer that is fixed by (channels, dims) of its place."""

    build: Callable[[int, int], AffineConv | Refusal]
    is_linear: ClassVar[bool] = True
    keeps_channels: ClassVar[bool] = False

    def resolved(self, channels: int | None, dims: int) -> AffineConv | Refusal:
        if channels is None:
            return Refusal("the number of channels is unknown; pass example_inputs")
        return self.build(channels, dims)


@dataclass(frozen=True, eq=False)
class Border(Layer):
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

    @property
    def reads_one_position(self) -> bool:
        return False

    def resolved(self, channels: int | None, dims: int) -> Border:
        """The same with a pair for each spatial dimension; it names the last ones."""
        return replace(self, pairs=((0, 0),) * (dims - self.dims) + self.pairs)

    def unfit(self, channels: int, dims: int, rank: int | None) -> Refusal | None:
        return Refusal("padding reaches beyond space") if self.dims > dims else None

    def geometry(self, channels: int) -> AffineConv:
        """The same map away from the border."""
        return AffineConv.identity(channels, len(self.pairs), padding=self.pairs)


@dataclass(frozen=True, eq=False)
class ByChannel(Layer):
    """What moves and combines the values of each channel, but in another way than a linear layer.

    Two branches side by side may pass it together: it does the same to all channels.

    Attributes:
        node: what does it.
        dims: spatial dimensions.
        signature: equal for those that do the same.
        reason: why a carry cannot pass it alone.
    """

    node: fx.Node
    dims: int
    signature: tuple[object, ...]
    reason: str

    @property
    def reads_one_position(self) -> bool:
        return False

    def unfit(self, channels: int, dims: int, rank: int | None) -> Refusal | None:
        if self.dims == dims:
            return None
        return Refusal(f"it has {self.dims} dimensions and stands among layers of {dims}")


class MaxPool(ByChannel):
    """The largest of some neighbours."""

    def unfit(self, channels: int, dims: int, rank: int | None) -> Refusal | None:
        if self.dims == dims:
            return None
        return Refusal(f"pooling over {self.dims} dimensions among layers of {dims}")


class Interpolation(ByChannel):
    """Values at other positions, taken or computed from those near them."""
