"""What layers cost: multiply-adds, parameters and values moved."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from rmfx.algebra.affine import MULTIPLYING, TRANSPOSED, AffineConv
from rmfx.algebra.blockwise import Blockwise
from rmfx.ir.elements import Virtual
from rmfx.ir.net import Net
from rmfx.ir.notes import Shape, positions, shape_of


@dataclass(frozen=True)
class Expense:
    """What some nodes cost; None where shapes are unknown.

    Attributes:
        macs: multiply-adds.
        moved: values read and written between layers.
        parameters: of the layers.
    """

    macs: int | None
    moved: int | None
    parameters: int

    def __sub__(self, other: Expense) -> Expense:
        return Expense(
            _known(operator.sub, self.macs, other.macs),
            _known(operator.sub, self.moved, other.moved),
            self.parameters - other.parameters,
        )

    def __add__(self, other: Expense) -> Expense:
        return Expense(
            _known(operator.add, self.macs, other.macs),
            _known(operator.add, self.moved, other.moved),
            self.parameters + other.parameters,
        )


def _known(combine: Callable[[int, int], int], one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else combine(one, other)


def expense_of(net: Net, nodes: Iterable[fx.Node]) -> Expense:
    """What some nodes of a net cost."""
    macs: int | None = 0
    moved: int | None = 0
    size = 0
    for node in nodes:
        work, own = work_of(node, net.callee(node))
        size += own
        macs = None if macs is None or work is None else macs + work
        sizes = [_numel(shape_of(n)) for n in (*node.all_input_nodes, node)]
        known = [n for n in sizes if n is not None]
        moved = None if moved is None or len(known) < len(sizes) else moved + sum(known)
    return Expense(macs, moved, size)


def work_of(node: fx.Node, callee: Virtual | nn.Module | None) -> tuple[int | None, int]:
    """Multiply-adds of a node, None where its shape is unknown, and parameters of what it calls."""
    layer = callee.layer if isinstance(callee, Virtual) else callee
    if layer is None:
        return 0, 0
    if isinstance(layer, Blockwise):
        return 0, layer.width if layer.own_means == "slopes" else 0  # others are buffers
    if isinstance(layer, AffineConv):
        size = layer.weight.numel() + (layer.out_channels if layer.has_bias else 0)
    else:
        size = sum(p.numel() for p in layer.parameters())
        if not isinstance(layer, MULTIPLYING):
            return 0, size
    # Where a transposed convolution is computed: at the positions that it reads.
    at = node.all_input_nodes[0] if isinstance(layer, TRANSPOSED) else node
    weight: Any = layer.weight
    count = positions(shape_of(at), weight.dim() - 2)
    return None if count is None else weight.numel() * count, size


def _numel(shape: Shape | None) -> int | None:
    if shape is None or None in shape:
        return None
    return math.prod(n for n in shape if n is not None)
