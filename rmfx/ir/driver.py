"""Rules and the driver that applies them.

A rule looks at one node: `match` gives a match, a `Refusal` with the reason, or None where the rule
has nothing to say. The driver sweeps over the nodes in topological order, so what lies inside a
site is rewritten before the site itself, and sweeps again until nothing changes. It gives up after
as many sweeps as the graph has nodes: a rule that makes new work for itself would never end. Where
somebody asks for it (`spec.enforced`), it checks that what a rule leaves is still in the dialect.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from torch import fx

from rmfx.errors import Refusal, WeightValueError, fault, reported

from .net import Net
from .spec import check_if_enforced

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

    Raises:
        InternalError: the rule raised something unexpected, or does not come to an end.
    """
    name = type(rule).__name__
    check_if_enforced(net, f"what came before {name}")
    total = 0
    for _ in range(len(net.graph.nodes) + 1):
        done, refusals = _sweep(net, rule)
        total += len(done)
        if done:
            net.rewrites[name] += len(done)
        else:
            check_if_enforced(net, name)
            return total, refusals
    raise fault(f"{name} at {done[-1]}", "it finds something to rewrite for ever")


def _sweep(net: Net, rule: Rule[M]) -> tuple[list[str], dict[fx.Node, Refusal]]:
    """Apply a rule at each node once; the names of the nodes where it did, and what was refused."""
    done, refusals = [], {}
    for node in list(net.graph.nodes):
        if node._erased:
            continue
        name = node.name
        with reported(f"{type(rule).__name__} at {name}"):
            match = _match(rule, net, node)
            if isinstance(match, Refusal):
                refusals[node] = match.at(name)
            elif match is not None:
                rule.rewrite(net, node, match)
                done.append(name)
    return done, refusals


def _match(rule: Rule[M], net: Net, node: fx.Node) -> M | Refusal | None:
    """What a rule finds, or that it would have to know the value of a weight that may change."""
    try:
        return rule.match(net, node)
    except WeightValueError as error:
        return Refusal(str(error))
