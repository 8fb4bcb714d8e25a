"""A join of values whose dimensions were swapped stands where the layers of its branch are.

    x + s(f(r(x))) = s(r(x) + f(r(x)))    r and s swap dimensions, and s undoes r

Networks for speech keep tokens before channels and swap both around their convolutions. Behind the
join the next block swaps back what this one swaps, and both go (`spans.py`): what is left are
convolutions with an ordinary shortcut.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from rmfx.algebra.activation import is_activation, is_per_channel
from rmfx.ir.facts import Inference, facts_of
from rmfx.ir.kinds import ADDITIVE, NO_OPS, is_a
from rmfx.ir.nodes import data_read, has_hooks, two_operands
from rmfx.ir.notes import forget, set_shape, shape_of, why_frozen

from .earlier_joins import join_earlier
from .rearrangements import order_of


def join_before_swaps(gm: fx.GraphModule) -> bool:
    """Let joins stand before a swap that undoes the one before their branch.

    Returns:
        Whether there was such a join.
    """
    facts = facts_of(gm, by_readers=True)
    joins = [
        node for node in gm.graph.nodes if node.target in ADDITIVE and why_frozen(node) is None
    ]
    return sum([_moved(gm, facts, join) for join in joins]) > 0


def _moved(gm: fx.GraphModule, facts: Inference, join: fx.Node) -> bool:
    operands = two_operands(join)
    if not all(isinstance(x, fx.Node) for x in operands) or operands[0] is operands[1]:
        return False
    for own, other in (operands, operands[::-1]):
        chain = _chain(gm, facts, own)
        if chain is None:
            continue
        back, *acts = chain
        there = _undone_by(facts, back, other, join)
        if there is not None:
            _move(join, (own, other), there, back, acts)
            return True
    return False


def _chain(gm: fx.GraphModule, facts: Inference, node: Any) -> list[fx.Node] | None:
    """A swap, and what acts on each number alone behind it; nobody else reads any of it."""
    found: list[fx.Node] = []
    while len(node.users) == 1 and why_frozen(node) is None and len(data_read(node)) == 1:
        found.insert(0, node)
        if _order(facts, node) is not None:
            return found
        module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        acts = module is not None and (is_activation(module) or is_a(module, NO_OPS))
        if not acts or is_per_channel(module) or has_hooks(module):  # type: ignore[arg-type]
            return None
        node = data_read(node)[0]
    return None


def _order(facts: Inference, node: fx.Node) -> list[int] | None:
    """Which dimension of its input each one is, of a node that swaps some."""
    read = data_read(node)
    rank = facts.rank(read[0]) if len(read) == 1 and why_frozen(node) is None else None
    found = None if rank is None else order_of(node, rank)
    return None if found == sorted(found or ()) else found


def _undone_by(facts: Inference, back: fx.Node, value: Any, join: fx.Node) -> fx.Node | None:
    """What swaps dimensions of a value as another node swaps them back."""
    order = _order(facts, back) or []
    for user in value.users:
        first = _order(facts, user) if user < join else None
        if first is not None and [first[i] for i in order] == [*range(len(order))]:
            return user  # type: ignore[no-any-return]
    return None


def _move(
    join: fx.Node,
    operands: tuple[Any, Any],
    there: fx.Node,
    back: fx.Node,
    acts: list[fx.Node],
) -> None:
    value = data_read(back)[0]
    for act in acts:
        act.replace_input_with(back, value)
        set_shape(act, shape_of(value))
        forget(act)
    places = {operands[0]: acts[-1] if acts else value, operands[1]: there}
    join_earlier(join, places, back, shape_of(there), "swapped")
