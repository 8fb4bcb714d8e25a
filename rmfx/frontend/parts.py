"""Parts of what gives several values: one that is read alone, and the slices of a split."""

from __future__ import annotations

import itertools
import operator
from typing import Any

from torch import fx

from rmfx.ir.facts import Inference
from rmfx.ir.functions import SPLIT_ARGUMENTS, SPLITS, torch_name
from rmfx.ir.notes import CONTAINER, FIRST, OF_VALUE, VAL, notes_of, why_frozen

from .calls import CALLS, arguments_of, gives_several
from .layers import module_for


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
    if not isinstance(parts, fx.Node) or not isinstance(index, int) or why_frozen(parts):
        return
    name = torch_name(parts).partition(".")[0]
    named = arguments_of(parts, "input", "amount", "dim").items()
    given = {SPLIT_ARGUMENTS.get(name, name): value for name, value in named}
    x, amount, dim = given.get("input"), given.get("amount"), given.get("dim", 0)
    if name.removeprefix("unsafe_") not in SPLITS or not isinstance(x, fx.Node):
        return
    if not isinstance(dim, int):
        return
    dim = dim + (facts.rank(x) or 0) if dim < 0 else dim
    if dim < 0:  # which one that is, nobody knows
        return
    size = facts.size(x, dim)
    if size is None and "chunk" not in name and isinstance(amount, int) and index >= 0:
        size = (index + 1) * amount  # where all before it end
    ends = _ends_of_parts("chunk" in name, amount, size)
    if ends is None or not -len(ends) <= index < len(ends):
        return
    start, stop = ends[index]
    node.args = (x, (*[slice(None)] * dim, slice(start or None, stop)))


def _ends_of_parts(chunks: bool, amount: Any, size: int | None) -> list[tuple[int, int]] | None:
    """Where the parts of a split begin and end; None where that is not known."""
    if isinstance(amount, (list, tuple)) and all(isinstance(n, int) for n in amount):
        sizes = list(amount)
    elif isinstance(amount, int) and size is not None and amount > 0:
        step = -(-size // amount) if chunks else amount
        sizes = [min(step, size - start) for start in range(0, size, step)]
    else:
        return None
    stops = list(itertools.accumulate(sizes))
    return list(zip([0, *stops], stops, strict=False))
