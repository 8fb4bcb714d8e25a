"""What a rewrite moves beside its chain: other tensors that get wider, and slices for readers.

An addition, a product or a choice that stays gets constants for the carry's channels on all that it
combines; a concatenation gets the value in two parts; whoever reads a value off the branch reads a
slice of a wide one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import fx

from rmfx.ir.notes import shape_of

from .column import Column
from .columns import Sided


def moved_beside(column: Column, width: int, dims: int) -> int | None:
    """Values read and written beside a column, None where shapes are unknown.

    Args:
        width: channels of the value with its carry, behind the column.
        dims: spatial dimensions.
    """
    try:
        return sum(_amounts(column, width, dims))
    except LookupError:
        return None


def _amounts(column: Column, width: int, dims: int) -> Iterator[int]:
    for value, _ in column.taps:
        yield _numel(value, dims, width) + _numel(value, dims, None)
    if not isinstance(column, Sided):
        return
    lateral = column.lateral
    for other in lateral.others:
        yield _numel(other, dims, None)
        if not lateral.is_concatenation:
            yield 2 * _numel(other, dims, width)
    if lateral.is_concatenation:
        yield 2 * _numel(lateral.value, dims, width)


def _numel(node: fx.Node, dims: int, width: int | None) -> int:
    """How many values a node gives, or would give with another number of channels.

    Raises:
        LookupError: its shape is unknown.
    """
    shape = shape_of(node)
    if not shape or None in shape:
        raise LookupError(node.name)
    channels: int = shape[1] if dims else shape[-1]
    whole: int = math.prod(shape)
    return whole if width is None else whole // max(channels, 1) * width
