"""Zeros beside a value's channels become a padding, and numbers of channels become numbers.

Shortcuts of CIFAR ResNets and PyramidNets grow by channels of zeros, which people write as

    torch.cat((x, torch.zeros(n, c, h, w)), 1)
    torch.cat((x, x.mul(0)), 1)
    F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))

All are F.pad with a number that the layers fix, whatever the input; so is the number in

    x / math.sqrt(x.size(1))

A number that may follow from the size of the image stays as it is.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from rmfx.ir.facts import BY_METHOD, COPIES, LIKE, OF_SIZE, Facts, Inference, facts_of
from rmfx.ir.kinds import SCALES
from rmfx.ir.notes import (
    SHAPE,
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
    """Write a concatenation that begins or ends with zeros as a padding."""
    operands, dim = _operands(cat)
    given = [facts(n) if _is_zero(n) else Facts() for n in operands]
    zeros: list[Any] = [one.channels if one.has_channels_in(dim) else None for one in given]
    kept = [i for i, channels in enumerate(zeros) if channels is None]
    inner = operands[kept[0] : kept[-1] + 1] if kept else []
    if not inner or len(inner) == len(operands) or not _keeps_type(cat, inner[0]):
        return
    before, after = (sum(side) for side in (zeros[: kept[0]], zeros[kept[-1] + 1 :]))
    dims: Any = next(one.dims for one in given if one.has_channels_in(dim))
    with cat.graph.inserting_before(cat):
        value = inner[0]
        if len(inner) > 1:
            value = cat.graph.call_function(torch.cat, (inner, 1))
            value.meta = without_notes(cat, SHAPE)
            shape = shape_of(cat)
            if shape is not None:
                channels = None if shape[1] is None else shape[1] - before - after
                set_shape(value, (shape[0], channels, *shape[2:]))
        padded = cat.graph.call_function(F.pad, (value, (*[0] * 2 * dims, before, after)))
    padded.meta = dict(cat.meta)
    cat.replace_all_uses_with(padded)
    cat.graph.erase_node(cat)


def _operands(cat: fx.Node) -> tuple[list[fx.Node], Any]:
    """What is put together, none if that is not written out, and the dimension."""
    tensors = cat.args[0] if cat.args else cat.kwargs.get("tensors")
    dim = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
    if not isinstance(tensors, (list, tuple)):
        return [], dim
    nodes = [n for n in tensors if isinstance(n, fx.Node)]
    return ([] if any(why_frozen(n) for n in nodes) else nodes), dim


def _is_zero(node: fx.Node) -> bool:
    """Whether a node gives zeros, for finite inputs."""
    while node.target in COPIES and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    if node.target in (*LIKE, *OF_SIZE, *BY_METHOD):
        return not why_frozen(node)
    return node.target in PRODUCTS and any(type(a) in (int, float) and a == 0 for a in node.args)


def _keeps_type(cat: fx.Node, value: fx.Node) -> bool:
    """Whether zeros leave the type of what stands beside them, which example inputs tell."""
    kinds = [type_of(n) for n in (cat, value)]
    return None not in kinds and kinds[0][0] == kinds[1][0]
