"""Letting a join stand before what stands behind both of its operands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from rmfx.ir.nodes import data_read
from rmfx.ir.notes import Shape, forget, set_shape


def join_earlier(
    join: fx.Node,
    places: Mapping[Any, fx.Node],
    last: fx.Node,
    shape: Shape | None,
    suffix: str,
) -> None:
    """Let what two operands end in stand once, behind their join.

    Args:
        join: of the operands; it becomes a call of what they end in.
        places: the operands -> what is added in their places.
        last: what one of them ends in.
        shape: of the new sum.
        suffix: of its name. The old name is that of the old value: who compares joins by name finds
            none of another size, or with its dimensions in another order.
    """
    given = fx.map_arg((join.args, join.kwargs), lambda n: places.get(n, n))
    with join.graph.inserting_before(join):
        name = f"{join.name}_{suffix}"
        moved = join.graph.create_node(join.op, join.target, *given, name=name)
    moved.meta = dict(join.meta)
    set_shape(moved, shape)
    forget(moved)
    (value,) = data_read(last)
    join.op, join.target = last.op, last.target
    join.args, join.kwargs = fx.map_arg(
        (last.args, last.kwargs), lambda n: moved if n is value else n
    )
