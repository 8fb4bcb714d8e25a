"""Activations that rmfx leaves in networks: those that differ from channel to channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from rmfx.interval import EVERYWHERE, INF, Interval

# name -> a closed interval that holds every value, for any options
POINTWISE: dict[str, Interval] = {
    **dict.fromkeys(("abs", "square", "exp", "sqrt", "rsqrt"), (0.0, INF)),
    **dict.fromkeys(("sin", "cos", "erf", "sign"), (-1.0, 1.0)),
    **dict.fromkeys(("pow", "log", "log1p", "reciprocal", "asinh", "atan", "sinh"), EVERYWHERE),
    "expm1": (-1.0, INF),
    "cosh": (1.0, INF),
}


class Pointwise(nn.Module):
    """A function of each value alone for which torch.nn has no module.

    Args:
        name: of the function in torch: one of `POINTWISE`.
        options: what it takes beside the value.
    """

    def __init__(self, name: str, *options: float) -> None:
        super().__init__()
        self.name, self.options = name, options

    def forward(self, x: Tensor) -> Tensor:
        return getattr(torch, self.name)(x, *self.options)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """For print."""
        return ", ".join([self.name, *map(str, self.options)])


class Composed(nn.Module):
    """A function of each value alone that several calls of torch compute, or one without a name.

    Args:
        calls: of one input, whose shape and type it keeps; the constants that it reads are its own.
    """

    def __init__(self, calls: fx.GraphModule) -> None:
        super().__init__()
        self.calls = calls
        self.text = "; ".join(calls.code.strip().splitlines()[1:])  # tells two of them apart

    def forward(self, x: Tensor) -> Tensor:
        return self.calls(x)  # type: ignore[no-any-return]


class ChannelClamp(nn.Module):
    """clamp(x, low, high) with bounds per channel.

    Args:
        low, high: (channels,), may be infinite.
        dims: trailing spatial dimensions after the channel dimension.
    """

    def __init__(self, low: Tensor, high: Tensor, dims: int) -> None:
        super().__init__()
        self.register_buffer("low", low.reshape(-1, *[1] * dims))
        self.register_buffer("high", high.reshape(-1, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(x, self.low, self.high)  # type: ignore[arg-type]


def channel_clamp(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The same with the gradient of Hardtanh: none at the bounds, where torch.clamp passes it."""
    return torch.where((x > low) & (x < high), x, torch.clamp(x, low, high).detach())


class ChannelPReLU(nn.Module):
    """PReLU with slopes per channel where the channel dimension is not dimension 1.

    Args:
        slope: (channels,).
        dims: trailing spatial dimensions after the channel dimension.
    """

    def __init__(self, slope: Tensor, dims: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(slope.reshape(-1, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        return channel_prelu(x, self.weight)


def channel_prelu(x: Tensor, weight: Tensor) -> Tensor:
    """x where it is positive, else weight·x; weight: the trailing shape of x, or broadcast.

    At 0 its gradient is the weight, as that of torch's own.
    """
    return torch.where(x > 0, x, weight * x)


class MaskedActivation(nn.Module):
    """Applies each activation to the channels of its mask and leaves the others unchanged.

    Args:
        activations: pointwise modules.
        masks: for each of them (channels,) booleans: where it applies.
        dims: trailing spatial dimensions after the channel dimension.
    """

    def __init__(
        self, activations: Sequence[nn.Module], masks: Sequence[Tensor], dims: int
    ) -> None:
        super().__init__()
        self.activations = nn.ModuleList(activations)
        for i, mask in enumerate(masks):
            self.register_buffer(f"mask{i}", mask.reshape(-1, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i, activation in enumerate(self.activations):
            mask = getattr(self, f"mask{i}")
            # A root of a carry below 0 would be NaN, and so its gradient; 1 is in every domain.
            own = torch.where(mask, x, 1.0) if isinstance(activation, NAMELESS) else x
            y = torch.where(mask, activation(own), y)
        return y


# Functions that may have no value below 0.
NAMELESS = (Pointwise, Composed)
# Modules that passes make; they are layers to whoever traces the result.
OWN_ACTIVATIONS = (ChannelClamp, ChannelPReLU, MaskedActivation)
