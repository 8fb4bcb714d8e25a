"""Numbers that a graph computes of the sizes of its values."""

from __future__ import annotations

import math
import operator
from typing import Any

from torch import fx

from rmfx.options import is_number

from .kinds import aten

OF_NUMBERS = (
    *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.neg),
    *(operator.truediv, operator.pow, math.sqrt),
)


def computed(node: fx.Node, numbers: list[Any]) -> float | None:
    """What a function of numbers gives for some, None if it is none or one of them is unknown."""
    if node.target not in OF_NUMBERS or node.kwargs or not all(is_number(n) for n in numbers):
        return None
    try:
        found = node.target(*numbers)
    except (ArithmeticError, ValueError):  # it fails when the network runs, and not before
        return None
    return found if is_number(found) and math.isfinite(found) else None


def size_read(node: fx.Node) -> tuple[fx.Node | None, Any]:
    """Of which value a node reads a size, and of which dimension."""
    if node.target in ("size", aten.sym_size.int):
        given = (*node.args, *node.kwargs.values())
        if len(given) == 2:
            return given[0], given[1]  # type: ignore[return-value]
    whole, index = node.args if node.target is operator.getitem else (None, None)
    if not isinstance(whole, fx.Node):
        return None, None
    if whole.target is operator.getitem and isinstance(whole.args[1], slice):
        whole, index = _through(whole.args[1], whole.args[0], index)
    value = shape_read(whole)
    return (None, None) if value is None else (value, index)


def shape_read(node: fx.Node) -> fx.Node | None:
    """Of which value a node reads all the sizes."""
    by_attribute = node.target is getattr and node.args[1] == "shape"
    by_method = node.op == "call_method" and node.target == "size"
    is_whole = by_attribute or (by_method and len(node.args) == 1 and not node.kwargs)
    return node.args[0] if is_whole else None  # type: ignore[return-value]


def _through(part: slice, shape: Any, index: Any) -> tuple[Any, Any]:
    """A shape and a place in it, for a place in a part of it: x.shape[2:][1] is x.shape[3]."""
    start = part.start or 0
    numbers = isinstance(index, int) and isinstance(start, int) and part.step is None
    if not numbers or index < 0 or (start < 0 <= start + index):
        return shape, None
    return shape, start + index
