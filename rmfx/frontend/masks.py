"""Constant masks as indices: how many places a mask chooses follows from its values.

Tensors without values cannot tell, so where a model's own tensors decide it they are asked.

    x[:, mask]    x[:, places]         places = mask.nonzero(), one index for each of its dimensions
    mask.nonzero()                     its own value
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from rmfx.ir.kinds import overloads

INDEXING = overloads(
    "index.Tensor", "index_put", "index_put_", "_unsafe_index.Tensor", "_index_put_impl_"
)
MASKS = (torch.bool, torch.uint8)
Real = Callable[[Tensor], Tensor | None]  # the value of what depends on the model alone


def gives_as_many_as_values_say(func: Any) -> bool:
    """Whether the size of what an operator gives depends on values."""
    return torch.Tag.dynamic_output_shape in func.tags and func not in INDEXING


def with_places(func: Any, args: tuple[Any, ...], real: Real) -> tuple[Any, ...]:
    """The arguments of an operator that indexes, with places for masks whose values are known."""
    if func not in INDEXING:
        return args
    indices: list[Tensor | None] = []
    for index in args[1]:
        with unset_fake_temporarily():
            mask = real(index) if isinstance(index, Tensor) and index.dtype in MASKS else None
        indices += [index] if mask is None else places_of(mask) or ()
    return (args[0], indices, *args[2:])


def places_of(index: object) -> tuple[Tensor, ...] | None:
    """The places that a mask chooses, an index for each of its dimensions; None of what is none."""
    if not isinstance(index, Tensor) or index.dtype not in MASKS:
        return None
    with unset_fake_temporarily():
        return index.nonzero().unbind(1)
