"""Rules and the driver that applies them.

A rule looks at one node: `match` gives a match, a `Refusal` with the reason, or None where the rule
has nothing to say. The driver sweeps over the nodes in topological order, so what lies inside a
site is rewritten before the site itself, and sweeps again until nothing changes.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from torch import fx

from ._errors import Refusal, WeightValueError
from ._graph import Net

M = TypeVar("M")


class Rule(Protocol, Generic[M]):
    """One local rewrite."""

    def match(self, net: Net, node: fx.Node) -> M | Refusal | None:
        """Whether and how the rule applies at `node`; must not change anything."""
        ...

    def rewrite(self, net: Net, node: fx.Node, match: M) -> None:
        """Carry out a match; may erase `node` and nodes before it."""
        ...


def apply_rule(net: Net, rule: Rule[M]) -> tuple[int, dict[fx.Node, Refusal]]:
    """Apply a rule until it applies nowhere.

    Returns:
        The number of rewrites, and what was refused at the nodes that are left.
    """
    total = 0
    while True:
        done, refusals = 0, {}
        for node in list(net.graph.nodes):
            if node._erased:
                continue
            match = _match(rule, net, node)
            if isinstance(match, Refusal):
                refusals[node] = match.at(node.name)
            elif match is not None:
                rule.rewrite(net, node, match)
                done += 1
        total += done
        if not done:
            return total, refusals


def _match(rule: Rule[M], net: Net, node: fx.Node) -> M | Refusal | None:
    """What a rule finds, or that it would have to know the value of a weight that may change."""
    try:
        return rule.match(net, node)
    except WeightValueError as error:
        return Refusal(str(error))
