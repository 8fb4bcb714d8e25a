"""Zeros beside a value become a padding, and numbers of channels become numbers.

Shortcuts of CIFAR ResNets and PyramidNets grow by channels of zeros, causal networks read zeros
before the first step, which people write as

    torch.cat((x, torch.zeros(n, c, h, w)), 1)
    torch.cat((x, x.mul(0)), 1)
    torch.cat((x.new_zeros(n, c, 2), x), 2)
    F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))

All are F.pad with a number that the layers or the code fix, whatever the input; so is the number in

    x / math.sqrt(x.size(1))

A number that may follow from the size of the image stays as it is.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from rmfx.ir.facts import Inference, facts_of
from rmfx.ir.fillings import filling, original
from rmfx.ir.kinds import SCALES
from rmfx.ir.notes import (
    SHAPE,
    Shape,
    gives_number,
    set_shape,
    shape_of,
    type_of,
    why_frozen,
    without_notes,
)

PRODUCTS = (operator.mul, torch.mul)


def pad_for_zeros(gm: fx.GraphModule) -> None:
    """Rewrite concatenations with zeros; paddings, slices and scales by numbers that layers fix."""
    facts = facts_of(gm, by_readers=True)
    for node in list(gm.graph.nodes):
        if why_frozen(node):
            continue
        if node.target is F.pad or node.target is operator.getitem:
            node.args = (node.args[0], *facts.with_numbers(node.args[1:]))
            node.kwargs = {k: facts.with_numbers(v) for k, v in node.kwargs.items()}
        elif node.target is torch.cat:
            _pad(node, facts)
        elif node.target in SCALES and not gives_number(node):
            node.args = facts.with_numbers(node.args)


def _pad(cat: fx.Node, facts: Inference) -> None:
    """Write a concatenation that begins or ends with one number everywhere as a padding."""
    operands, dim = _operands(cat)
    numbers = [_number(n) for n in operands]
    room = [
        None if n is None else _width(x, dim, facts) for x, n in zip(operands, numbers, strict=True)
    ]
    kept = [i for i, width in enumerate(room) if width is None]
    inner = operands[kept[0] : kept[-1] + 1] if kept else []
    held = {n for n, width in zip(numbers, room, strict=True) if width is not None}
    axis = _axis(operands, dim, facts)
    if not inner or len(inner) == len(operands) or len(held) != 1 or axis is None:
        return
    if not _keeps_type(cat, inner[0]):
        return
    before, after = (sum(filter(None, s)) for s in (room[: kept[0]], room[kept[-1] + 1 :]))
    with cat.graph.inserting_before(cat):
        value = inner[0]
        if len(inner) > 1:
            value = cat.graph.call_function(torch.cat, (inner, dim))
            value.meta = without_notes(cat, SHAPE)
            set_shape(value, _without(shape_of(cat), axis, before + after))
        amounts = (*[0] * 2 * axis, before, after)
        number = held.pop()
        filled: dict[str, Any] = {} if number == 0 else {"mode": "constant", "value": number}
        padded = cat.graph.call_function(F.pad, (value, amounts), filled)
    padded.meta = dict(cat.meta)
    cat.replace_all_uses_with(padded)
    cat.graph.erase_node(cat)


def _without(shape: Shape | None, axis: int, count: int) -> Shape | None:
    """A shape with fewer places in a dimension, which is counted from the last one."""
    if shape is None:
        return None
    place = len(shape) - 1 - axis
    size = shape[place]
    return (*shape[:place], None if size is None else size - count, *shape[place + 1 :])


def _axis(operands: list[fx.Node], dim: Any, facts: Inference) -> int | None:
    """A dimension that is not the batch, counted from the last one; None if not known."""
    ranks = {facts.rank(n) for n in operands} - {None}
    rank = ranks.pop() if len(ranks) == 1 else None
    if rank is None or type(dim) is not int or not -rank <= dim < rank or dim % rank == 0:
        return None
    return rank - 1 - dim % rank


def _width(node: fx.Node, dim: Any, facts: Inference) -> int | None:
    """How many places a tensor of one number has in a dimension, None if that may change."""
    given = facts(node)
    if given.has_channels_in(dim):
        return given.channels
    filled = filling(node)
    sizes = () if filled is None else filled.sizes
    known = facts.with_numbers(sizes[dim]) if type(dim) is int and sizes[dim:] else None
    return known if type(known) is int else None


def _operands(cat: fx.Node) -> tuple[list[fx.Node], Any]:
    """What is put together, none if that is not written out, and the dimension."""
    tensors = cat.args[0] if cat.args else cat.kwargs.get("tensors")
    dim = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
    if not isinstance(tensors, (list, tuple)):
        return [], dim
    nodes = [n for n in tensors if isinstance(n, fx.Node)]
    return ([] if any(why_frozen(n) for n in nodes) else nodes), dim


def _number(node: fx.Node) -> float | None:
    """The number that a node gives everywhere, for finite inputs."""
    filled = filling(node)
    if filled is not None:
        return filled.number
    node = original(node)
    is_zero = any(type(a) in (int, float) and a == 0 for a in node.args)
    return 0.0 if node.target in PRODUCTS and is_zero else None


def _keeps_type(cat: fx.Node, value: fx.Node) -> bool:
    """Whether zeros leave the type of what stands beside them, which example inputs tell."""
    kinds = [type_of(n) for n in (cat, value)]
    return None not in kinds and kinds[0][0] == kinds[1][0]
