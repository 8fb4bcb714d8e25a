"""Parts of what gives several values: one that is read alone, and the slices of a split.

A split is the same slices whether its parts are read one by one or all at once.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import fx

from rmfx.ir.facts import Inference
from rmfx.ir.functions import SPLIT_ARGUMENTS, SPLITS, torch_name
from rmfx.ir.notes import (
    CONTAINER,
    FIRST,
    OF_VALUE,
    ORIGIN,
    VAL,
    gives_container,
    notes_of,
    set_shape,
    set_type,
    shape_of,
    type_of,
    why_frozen,
)

from .calls import CALLS, arguments_of, gives_several
from .layers import module_for

UNIFORM = ("split", "unsafe_split")  # into parts of one size, whatever comes behind them


def take_first(gm: fx.GraphModule, node: fx.Node) -> None:
    """Let an operator whose first result alone is read stand for that result."""
    call, index = node.args
    if not isinstance(call, fx.Node) or index != 0:
        return
    if call.target not in CALLS or not gives_several(call.target):
        return
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in call.users):
        return
    call.meta[FIRST] = True
    if module_for(gm, call) is None:
        del call.meta[FIRST]
        return
    for user in [user for user in call.users if user is not node]:
        user.replace_all_uses_with(node)
        node.graph.erase_node(user)
    node.target, node.args, node.kwargs = call.target, call.args, dict(call.kwargs)
    keep: dict[str, Any] = notes_of(node, *OF_VALUE, VAL)
    node.meta = {**call.meta, **keep, FIRST: True}
    node.meta.pop(CONTAINER, None)
    node.graph.erase_node(call)


def slice_of_split(facts: Inference, node: fx.Node) -> None:
    """Let a part of a split be a slice: split(x, 4, dim=1)[1] is x[:, 4:8]."""
    if node.target is not operator.getitem or why_frozen(node):
        return
    parts, index = node.args
    if not isinstance(parts, fx.Node) or not isinstance(index, int):
        return
    found = _slices_of_split(facts, parts, index)
    if found is not None and -len(found[1]) <= index < len(found[1]):
        node.args = (found[0], found[1][index])


def unpack_split(facts: Inference, node: fx.Node) -> bool:
    """Let what reads all parts of a split read slices: cat(split(x, 4, 1), 1); tells if it does."""
    whole = [n for n in node.all_input_nodes if gives_container(n)]
    found = _slices_of_split(facts, whole[0]) if len(whole) == 1 else None
    if found is None or why_frozen(node) is not None:
        return False
    x, parts = found
    with node.graph.inserting_before(node):
        slices = [node.graph.call_function(operator.getitem, (x, part)) for part in parts]
    shape, kind = shape_of(x), type_of(x)
    for one, part in zip(slices, parts, strict=True):
        one.meta = notes_of(node, *ORIGIN)
        set_type(one, kind)
        if shape is not None:
            dim, size = len(part) - 1, part[-1].stop - (part[-1].start or 0)
            set_shape(one, (*shape[:dim], size, *shape[dim + 1 :]))
    node.args = tuple(slices if a is whole[0] else a for a in node.args)
    node.kwargs = {k: slices if v is whole[0] else v for k, v in node.kwargs.items()}
    return True


def _slices_of_split(
    facts: Inference, parts: fx.Node, index: int = -1
) -> tuple[fx.Node, list[tuple[slice, ...]]] | None:
    """What a split takes apart, and the index of each part; None where that is not known.

    Args:
        index: of the last part that is asked for, -1 for all of them.
    """
    name = torch_name(parts).partition(".")[0]
    named = arguments_of(parts, "input", "amount", "dim").items()
    given = {SPLIT_ARGUMENTS.get(name, name): value for name, value in named}
    x, amount, dim = given.get("input"), given.get("amount"), given.get("dim", 0)
    if name.removeprefix("unsafe_") not in SPLITS or not isinstance(x, fx.Node):
        return None
    if not isinstance(dim, int) or why_frozen(parts) is not None:
        return None
    dim = dim + (facts.rank(x) or 0) if dim < 0 else dim
    if dim < 0:  # which one that is, nobody knows
        return None
    size = facts.size(x, dim)
    if size is None and facts(x).has_channels_in(dim):
        size = facts(x).channels
    if size is None and name in UNIFORM and isinstance(amount, int) and index >= 0:
        size = (index + 1) * amount  # where all before it end
    ends = _ends_of_parts(name, amount, size)
    if ends is None:
        return None
    return x, [(*[slice(None)] * dim, slice(start or None, stop)) for start, stop in ends]


def _ends_of_parts(name: str, amount: Any, size: int | None) -> list[tuple[int, int]] | None:
    """Where the parts of a split begin and end; None where that is not known."""
    several = isinstance(amount, (list, tuple)) and all(isinstance(n, int) for n in amount)
    if name == "tensor_split":
        if size is None or not (several or (isinstance(amount, int) and amount > 0)):
            return None
        parts = torch.arange(size).tensor_split(amount)
        sizes = [len(part) for part in parts]
    elif several:
        sizes = list(amount)
    elif isinstance(amount, int) and size is not None and amount > 0:
        step = -(-size // amount) if name.endswith("chunk") else amount
        sizes = [min(step, size - start) for start in range(0, size, step)]
    else:
        return None
    stops = list(itertools.accumulate(sizes))
    return list(zip([0, *stops], stops, strict=False))
