"""The rules in their order, from a graph in the dialect to one without parallel linear branches."""

from __future__ import annotations

from torch import fx

from rmfx.analysis.ranges import Ranges
from rmfx.ir.driver import apply_rule
from rmfx.ir.net import Net
from rmfx.rules.batch_norm import fold
from rmfx.rules.linear import LinearRule
from rmfx.rules.noop import NoopRule

from .policy import Policy
from .rule import ResidualRule, apply_to_joins, as_one_layer, check_strict, finish, joins_of


def merge(
    source: fx.GraphModule, *, strict: bool = False, policy: Policy = "all"
) -> fx.GraphModule:
    """The network with parallel linear branches as one layer each, and a report on its joins."""
    net = Net(source)
    apply_rule(net, NoopRule())
    fold(net)
    joins = joins_of(net)
    sums = ResidualRule(Ranges(net), arrange=as_one_layer, policy=policy)
    made, refusals = apply_to_joins(net, sums)
    check_strict("merge_branches", refusals, strict=strict)
    apply_rule(net, LinearRule(concerns=made.__contains__))
    return finish(net, sums, refusals, joins)
