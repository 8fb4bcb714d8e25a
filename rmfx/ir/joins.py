"""Reading sums of two tensors: the joins at which residual connections end."""

from __future__ import annotations

from torch import fx

from rmfx.errors import Refusal
from rmfx.modules.factors import Elementwise

from .callees import Calls
from .kinds import ADDITIVE, ARITHMETIC, SUBS, is_a
from .nodes import describe, is_tensor_node, two_operands

Term = tuple[object, float]


def adds_itself(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node calls a module that adds values."""
    return is_a(Calls(gm).module(node), Elementwise) and len(node.all_input_nodes) > 1


def operands(node: fx.Node) -> tuple[Term, Term] | Refusal:
    """The two operands of an addition or subtraction with their factors."""
    known = {"input", "other", "alpha"}
    if set(node.kwargs) - known or len(node.args) + len(node.kwargs) < 2 or len(node.args) > 2:
        return Refusal(describe(node) + " with options")
    alpha = node.kwargs.get("alpha", 1)
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        return Refusal("an alpha that is not a constant number")
    a, b = two_operands(node)
    return (a, 1.0), (b, float(-alpha if node.target in SUBS else alpha))


def read_join(node: fx.Node) -> tuple[tuple[fx.Node, float], ...] | Refusal | None:
    """The two tensors that a node adds, with their factors; None if it adds no two tensors."""
    if node.op not in ("call_function", "call_method"):
        return None
    if ARITHMETIC.get(node.target) not in ADDITIVE:
        return None
    if not all(is_tensor_node(x) for x in two_operands(node)):
        return None
    terms = operands(node)
    if isinstance(terms, Refusal):
        return terms.at(node.name)
    return tuple((x, c) for x, c in terms if isinstance(x, fx.Node))
