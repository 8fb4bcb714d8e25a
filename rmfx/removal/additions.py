"""Additions that are no residual connections, told apart from those that are refused.

A residual connection adds two values that come from one. None is there
    - where the operands come from different inputs (a bias for each sample, made of a time or a
      class), or one depends on sizes alone (a position embedding);
    - where one operand is spread out (a bias for each sample, made of the whole of it);
    - where one operand comes back from another scale (the map of a deeper stage, enlarged);
    - where a sum of values that are used anyway is there for a gate: what computes a gate's vector
      has nothing to carry;
    - where branches were put side by side to be summed over their axis: that is opened where it
      costs little.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx

from rmfx.errors import Refusal
from rmfx.ir.functions import ATTRIBUTES_OF_NUMBERS, reads_sizes_alone, torch_name
from rmfx.ir.joins import read_join
from rmfx.ir.kinds import FILLED
from rmfx.ir.laterals import laterals
from rmfx.ir.net import Net
from rmfx.ir.nodes import is_tensor_node
from rmfx.ir.notes import OF_BRANCHES, Shape, gives_container, shape_of
from rmfx.ir.reading import is_spatial_pool
from rmfx.ir.reasons import operation_name, reason_for
from rmfx.report import SiteReport

Sources = Mapping[fx.Node, frozenset[str]]
FILLED_NAMES = frozenset(op.overloadpacket.__name__ for op in FILLED)
RESIZES = re.compile("interpolate|upsample|resize")
DEAR = 2  # times the multiply-adds of branches
OVER_BRANCHES = Refusal(
    "no residual connection: a sum over an axis of branches, dearer to open than they are",
    apart=True,
)
LARGEST_GATE = 200  # nodes between a sum and the products that it is a gate of
FOR_A_GATE = Refusal("no residual connection: it adds for a gate what others read, too", apart=True)


def told_apart(net: Net, refusals: Mapping[fx.Node, Refusal]) -> dict[fx.Node, Refusal]:
    """Refusals of which those that concern no residual connection say so."""
    sources = _sources(net)
    return {
        node: refusal if refusal.by_choice else _told(net, node, refusal, sources)
        for node, refusal in refusals.items()
    }


def _told(net: Net, join: fx.Node, refusal: Refusal, sources: Sources) -> Refusal:
    terms = read_join(join)
    if not isinstance(terms, tuple):
        return refusal
    ours, others = (sources[x] for x, _ in terms)
    if not ours or not others:
        reason = "one operand depends on no value of the inputs, but on sizes at most"
        return Refusal(f"no residual connection: {reason}", (join.name,), apart=True)
    if ours.isdisjoint(others):
        found = " and ".join(", ".join(sorted(names)) for names in (ours, others))
        reason = f"no residual connection: the operands come from different inputs, {found}"
        return Refusal(reason, (join.name,), apart=True)
    shapes = [shape_of(x) for x, _ in terms]
    if None not in shapes and _differ(*shapes):
        sizes = " and ".join("x".join("?" if n is None else str(n) for n in s) for s in shapes)
        reason = f"no residual connection: the add broadcasts, of {sizes}"
        return Refusal(reason, (join.name,), apart=True)
    if _comes_back_from_another_scale(net, terms[0][0], terms[1][0], refusal):
        return replace(refusal, reason=f"no residual connection: {refusal.reason}", apart=True)
    return refusal


def _differ(a: Shape, b: Shape) -> bool:
    """Whether two shapes are known to differ."""
    known = (pair for pair in zip(a, b, strict=False) if None not in pair)
    return len(a) != len(b) or any(m != n for m, n in known)


def _sources(net: Net) -> Sources:
    """The inputs on whose values, not sizes, each value of a graph depends."""
    found: dict[fx.Node, frozenset[str]] = {}
    for node in net.graph.nodes:
        read = [n for n in node.all_input_nodes if not _reads_sizes(node, n)]
        found[node] = frozenset().union(*(found[n] for n in read))
        if node.op == "placeholder":
            found[node] = frozenset({node.name})
        elif node.target is operator.getitem and _is_container(node.args[0]):
            found[node] = frozenset({f"{node.args[0]}[{node.args[1]}]"})
    return found


def _is_container(value: object) -> bool:
    return isinstance(value, fx.Node) and value.op == "placeholder" and gives_container(value)


def _reads_sizes(node: fx.Node, value: fx.Node) -> bool:
    """Whether a node reads nothing of a value but its sizes, its type or where it lies."""
    if node.target is getattr:
        return node.args[1] in ATTRIBUTES_OF_NUMBERS
    name = torch_name(node).partition(".")[0] if node.op != "call_module" else ""
    takes_its_type = name in ("to", "type_as") and value is not node.args[0]
    return takes_its_type or name in FILLED_NAMES or reads_sizes_alone(node, value)


# ---- scales -------------------------------------------------------------------------------------
def _comes_back_from_another_scale(net: Net, a: fx.Node, b: fx.Node, refusal: Refusal) -> bool:
    """Whether one operand was made smaller and larger again behind what both come from."""
    behind_a, behind_b = _behind(a), _behind(b)
    resizes = [
        n
        for n in behind_a ^ behind_b
        if refusal.nodes == (n.name,) and RESIZES.search(operation_name(net, n).lower())
        if refusal.reason == reason_for(net, n) and not _keeps_size(n)
    ]
    common = behind_a & behind_b
    fork = shape_of(max(common)) if common else None
    return bool(resizes) and fork is not None and fork[2:] == (shape_of(a) or ())[2:]


def _keeps_size(resize: fx.Node) -> bool:
    """Whether what resizes is known to give the size that it reads."""
    before, after = shape_of(resize.all_input_nodes[0]), shape_of(resize)
    return before is not None and None not in before and before == after


def _behind(node: fx.Node) -> set[fx.Node]:
    """The tensors that a value depends on, and itself."""
    found, waiting = {node}, [node]
    while waiting:
        here = waiting.pop()
        fresh = {n for n in here.all_input_nodes if is_tensor_node(n)} - found
        found |= fresh
        waiting += fresh
    return found


# ---- sums that are not worth a carry ------------------------------------------------------------
def why_not_opened(net: Net, join: fx.Node, row: SiteReport, dims: int) -> Refusal | None:
    """Why an addition that could be opened is no residual connection to open, if it is none.

    Args:
        row: what opening it would do.
        dims: spatial dimensions of the values that it adds.
    """
    if row.carry and _serves_a_gate(net, join, dims):
        return FOR_A_GATE
    return OVER_BRANCHES if _is_dear_sum(join, row) else None


def _is_dear_sum(join: fx.Node, row: SiteReport) -> bool:
    """Whether a sum over an axis of branches is dearer to open than their layers are.

    Nobody wrote it as an addition, and no value passes by a branch there.
    """
    if OF_BRANCHES not in join.meta:
        return False
    before, after = row.macs_before, row.macs_after
    if before is None or after is None:
        before, after = row.params_before or 0, row.params_after or 0
    return 0 < before * DEAR < after


def _serves_a_gate(net: Net, join: fx.Node, dims: int) -> bool:
    """Whether values that others read as well are added for a gate's vector alone.

    Such a sum is pooled over space, and what comes of it is a factor that is spread out again.
    """
    terms = read_join(join)
    if not isinstance(terms, tuple) or any(len(x.users) < 2 for x, _ in terms):
        return False
    readers = [n for n in join.users if not reads_sizes_alone(n, join)]
    if not readers or not all(is_spatial_pool(net, n, dims) for n in readers):
        return False
    waiting, seen = [*readers], {*readers}
    while waiting and len(seen) < LARGEST_GATE:
        here = waiting.pop()
        fresh = {n for n in here.users if not _spreads(net, n, here)} - seen
        if any(n.op == "output" for n in fresh):
            return False
        seen |= fresh
        waiting += fresh
    return not waiting


def _spreads(net: Net, product: fx.Node, gate: fx.Node) -> bool:
    """Whether a node multiplies something by a value that is spread out there."""
    found = laterals(net, product) if product.target is torch.mul else []
    return any(one.value is gate and one.spread_dims - {0, 1} for one in found)
