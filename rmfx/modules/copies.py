"""Copies of modules that hold what torch cannot copy: tensors that somebody has computed.

`weight_norm` and the like leave the weight of the last call in a layer, with its gradient.
"""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def computed_tensors(module: nn.Module) -> dict[int, object]:
    """Copies of tensors that deepcopy cannot copy: results of a computation, as in weight_norm."""
    return {
        id(value): value.detach().clone()
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }


def copied_model(model: M) -> M:
    """A copy of a model, be it one with weights that are computed at every call."""
    return copy.deepcopy(model, computed_tensors(model))
