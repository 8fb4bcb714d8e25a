"""What layers cost: multiply-adds, parameters and values moved."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from torch import Tensor, fx, nn

from rmfx.algebra.affine import MULTIPLYING
from rmfx.algebra.blockwise import Blockwise
from rmfx.ir.net import Net
from rmfx.ir.notes import Shape, positions


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


def expense_of(net: Net, nodes: Iterable[fx.Node], dims: int) -> Expense:
    """What some nodes of a net cost."""
    macs: int | None = 0
    moved: int | None = 0
    size = 0
    for node in nodes:
        taps, own = _weights(net, node)
        size += own
        if taps and macs is not None:
            count = positions(node.meta.get("shape"), dims)
            macs = None if count is None else macs + taps * count
        sizes = [_numel(n.meta.get("shape")) for n in (*node.all_input_nodes, node)]
        known = [n for n in sizes if n is not None]
        moved = None if moved is None or len(known) < len(sizes) else moved + sum(known)
    return Expense(macs, moved, size)


def _weights(net: Net, node: fx.Node) -> tuple[int, int]:
    """Multiply-adds of a node per position, and its parameters."""
    callee = net.callee(node)
    if callee is None:
        return 0, 0
    if isinstance(callee, nn.Module):
        taps = cast("Tensor", callee.weight).numel() if isinstance(callee, MULTIPLYING) else 0
        return taps, sum(p.numel() for p in callee.parameters())
    layer = callee.layer
    if isinstance(layer, Blockwise):
        return 0, layer.width
    taps = layer.weight.numel()
    return taps, taps + (layer.out_channels if layer.has_bias else 0)


def _numel(shape: Shape | None) -> int | None:
    if shape is None or None in shape:
        return None
    return math.prod(n for n in shape if n is not None)
