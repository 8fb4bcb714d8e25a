"""Which refusals count as blocked, and why: what is not the compiler's aim, or not in its reach.

The one table that says so is `BLOCKERS`. A refused addition is sorted by the operation its refusal
names; where that says nothing about the cause, by the operations between the fork and the join.
Everything else is open: something the compiler might learn.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from rmfx.report import Report, SiteReport


@dataclass(frozen=True)
class Blocker:
    """A class of operations that block a carry.

    Attributes:
        name: how the class is called in tables.
        operations: a pattern for names of modules, functions and methods.
        why: the reason.
    """

    name: str
    operations: str
    why: str


BLOCKERS = (
    Blocker(
        "layer or group norm",
        r"(layer|group|instance)_?norm|rms_?norm",
        "divides by a statistic of the very values, so carried channels change the others",
    ),
    Blocker(
        "attention",
        r"softmax|scaled_dot_product|multihead|attention|^matmul|^bmm|^baddbmm|^einsum",
        "mixes positions with weights that depend on the input",
    ),
    Blocker(
        "resize",
        r"interpolate|upsample",
        "raises the resolution within the site; a convolution with constant stride does not",
    ),
    Blocker(
        "max pool",
        r"max_?pool",
        "the maximum over a window is not linear, and no activation passes a carry through it",
    ),
)
# These only move values about: that a refusal names one of them says nothing about its cause.
_BYSTANDERS = re.compile(
    r"^(permute|transpose|reshape|view|flatten|unflatten|contiguous|unsqueeze|squeeze|roll|clone)"
)
_NAMED = re.compile(r"^((?:\w+, )*\w+): (.*)$", re.DOTALL)
_SAYS_NOTHING = ("no common source", "in-place operation", "is not known")
_REFUSED_ITSELF = "was itself refused"


def split_reason(reason: str) -> tuple[list[str], str]:
    """The nodes that a refusal names, and the text after them.

    >>> split_reason("conv, conv_1: strides differ")
    (['conv', 'conv_1'], 'strides differ')
    """
    found = _NAMED.match(reason)
    return (found[1].split(", "), found[2]) if found else ([], reason)


def general(reason: str) -> str:
    """A refusal without what differs from place to place: names of nodes and numbers.

    >>> general("add_3: the operands have 64 and 1 channels: the add broadcasts")
    'the operands have N and N channels: the add broadcasts'
    """
    text = split_reason(reason)[1]
    return re.sub(r"\b\d+\b", "N", re.sub(r"\(\w+_\d*\)", "(...)", text))


def blocker(row: SiteReport, report: Report, graph: fx.Graph) -> str | None:
    """The name of the class that a refused addition is of; None if it is open.

    Args:
        row: the refused addition.
        report: all rows.
        graph: of `rmfx.trace(model, inputs)`, which has the names that the report uses.
    """
    nodes = {node.name: node for node in graph.nodes}
    rows = {other.join: other for other in report.rows}
    seen = {row.join}
    while True:
        names, text = split_reason(row.reason)
        found = _class_of(_operation(nodes[name]) for name in names if name in nodes)
        if found:
            return found
        # A chain of additions is refused for what the first of them is refused for.
        first = rows.get(names[0]) if names and _REFUSED_ITSELF in text else None
        if first is None or first.join in seen or not first.reason:
            break
        seen.add(first.join)
        row = first
    between = [nodes[name] for name in names if name in nodes]
    vague = any(part in text for part in _SAYS_NOTHING)
    if vague or any(_BYSTANDERS.match(_operation(node)) for node in between):
        return _class_of(map(_operation, _site(nodes[row.join])))
    return None


def _class_of(operations: Iterable[str]) -> str | None:
    names = list(operations)
    for one in BLOCKERS:
        if any(re.search(one.operations, name, re.IGNORECASE) for name in names):
            return one.name
    return None


def _operation(node: fx.Node) -> str:
    """What a node computes, by name."""
    if node.op == "call_module" and node.graph.owning_module is not None:
        return type(node.graph.owning_module.get_submodule(str(node.target))).__name__
    return str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))


def _site(join: fx.Node) -> set[fx.Node]:
    """The nodes that one operand of a join needs and not the other, and the operands."""
    before = [_needed(operand) for operand in join.all_input_nodes]
    if len(before) != 2:
        return set()
    return before[0] ^ before[1]


def _needed(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += one.all_input_nodes
    return found
