"""Masks of fewer dimensions than what they mask get those that are missing, as broadcasting does.

x * (torch.arange(x.size(2)) < n)        torch.where(self.mask, x, 0.0) with a mask of (t,)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from rmfx.ir.nodes import constant
from rmfx.ir.notes import set_shape, set_type, shape_of, type_of, why_frozen, without_notes

MASKED = (torch.where, torch.mul)


def lift_masks(gm: fx.GraphModule) -> None:
    """Give masks of truth values as many dimensions as the results."""
    for node in gm.graph.nodes:
        if node.target not in MASKED or why_frozen(node) or shape_of(node) is None:
            continue
        rank = len(shape_of(node))
        for x in [x for x in node.args if isinstance(x, fx.Node) and _is_mask(gm, x)]:
            missing = rank - len(shape_of(x))
            if missing > 0 and shape_of(x):
                node.replace_input_with(x, _lifted(gm, x, missing, before=node))


def _is_mask(gm: fx.GraphModule, x: fx.Node) -> bool:
    """Whether a value holds truth values, and its shape is known."""
    held = constant(gm, x)
    if held is not None:
        if held.dtype is not torch.bool:
            return False
        set_shape(x, tuple(held.shape))
        return True
    return type_of(x) is not None and type_of(x)[0] is torch.bool and shape_of(x) is not None


def _lifted(gm: fx.GraphModule, x: fx.Node, missing: int, *, before: fx.Node) -> fx.Node:
    index: Any = (*[None] * missing, ...)
    with gm.graph.inserting_before(before):
        held = constant(gm, x)
        if held is not None:
            name = f"{str(x.target).replace('.', '_')}_of_{missing + len(shape_of(x))}_dimensions"
            gm.register_buffer(name, held[index])
            made = gm.graph.get_attr(name)
        else:
            made = gm.graph.call_function(operator.getitem, (x, index))
    made.meta = without_notes(x)
    set_shape(made, ((1,) * missing) + tuple(shape_of(x)))
    set_type(made, type_of(x))
    return made
