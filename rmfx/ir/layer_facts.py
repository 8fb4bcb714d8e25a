"""What a layer tells of the values that it reads and gives."""

from __future__ import annotations

from typing import Any

from torch import nn

from rmfx.algebra.activation import is_activation
from rmfx.algebra.affine import MULTIPLYING, AffineConv
from rmfx.algebra.blockwise import Blockwise

from .kinds import BATCH_NORMS, CHANNELWISE, is_a, kind_of

Callee = nn.Module | AffineConv | Blockwise | None
_KINDS = ("Conv", "ConvTranspose", "MaxPool", "AvgPool", "AdaptiveAvgPool")
_DIMS: dict[Any, int] = {  # that only inputs of one number of dimensions have, batches of them
    **{getattr(nn, f"{kind}{d}d"): d for d in (1, 2, 3) for kind in _KINDS},
    nn.BatchNorm2d: 2,
    nn.BatchNorm3d: 3,
}


def keeps_values(layer: Callee) -> bool:
    """Whether a layer keeps the dimensions, the channels and the type of its input."""
    if isinstance(layer, nn.Module):
        return is_activation(layer) or is_a(layer, CHANNELWISE)
    return isinstance(layer, Blockwise)


def is_on_last(layer: Callee) -> bool:
    """Whether a layer's channels are the last dimension."""
    return is_a(layer, nn.Linear) or (isinstance(layer, AffineConv) and not layer.dims)


def dims_of(layer: Callee) -> int | None:
    """Spatial dimensions of a layer that has a fixed number of them."""
    if isinstance(layer, AffineConv):
        return layer.dims or None
    return _DIMS.get(kind_of(layer)) if isinstance(layer, nn.Module) else None


def channels_out(layer: Callee) -> int | None:
    """How many channels a layer gives, if it says so."""
    return _size(layer, "out_channels", "out_features", "num_features")


def channels_in(layer: Callee) -> int | None:
    """How many channels a layer reads, if it says so."""
    return _size(layer, "in_channels", "in_features", "num_features")


def _size(layer: Callee, *names: str) -> int | None:
    if isinstance(layer, AffineConv) or is_a(layer, (*MULTIPLYING, *BATCH_NORMS)):
        return next((int(getattr(layer, n)) for n in names if hasattr(layer, n)), None)
    return None
