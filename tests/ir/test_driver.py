"""The driver: order of the sweeps, the fixpoint, what it returns, and its cost."""

from __future__ import annotations

import pytest
import torch
from builders import Apply, chain, image
from torch import fx, nn

import rmfx
from rmfx.errors import InternalError, Refusal
from rmfx.ir.driver import apply_rule
from rmfx.ir.net import Net
from rmfx.ir.nodes import input_of


class Unwrap:
    """Removes a Tanh whose input is no Tanh; refuses a Sigmoid; notes the nodes it looks at."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def match(self, net: Net, node: fx.Node) -> fx.Node | Refusal | None:
        self.seen.append(node.name)
        if isinstance(net.module(node), nn.Sigmoid):
            return Refusal("a Sigmoid stays")
        before = input_of(node)
        if before is None or not isinstance(net.module(node), nn.Tanh):
            return None
        return None if isinstance(net.module(before), nn.Tanh) else before

    def rewrite(self, net: Net, node: fx.Node, match: fx.Node) -> None:
        node.replace_all_uses_with(match)
        net.release([node])
        net.graph.erase_node(node)


class EraseBoth(Unwrap):
    """Removes a Tanh together with the node after it."""

    def rewrite(self, net: Net, node: fx.Node, match: fx.Node) -> None:
        for other in (next(iter(node.users)), node):
            super().rewrite(net, other, other.all_input_nodes[0])


def net_of(*layers: nn.Module) -> Net:
    return Net(rmfx.trace(chain(*layers).eval()))


def test_one_sweep_sees_what_earlier_nodes_became() -> None:
    net = net_of(nn.Tanh(), nn.Tanh(), nn.Tanh())
    assert apply_rule(net, Unwrap()) == (3, {})
    assert torch.equal(net.finish()(image()), image())


def test_nodes_are_visited_in_order_until_nothing_changes() -> None:
    rule = Unwrap()
    done, _ = apply_rule(net_of(nn.ReLU(), nn.Tanh()), rule)
    names = ["input_1", "_0", "_1", "output"]
    assert done == 1
    assert rule.seen == [*names, "input_1", "_0", "output"]


def test_a_second_run_rewrites_nothing() -> None:
    net = net_of(nn.Tanh(), nn.ReLU())
    apply_rule(net, Unwrap())
    assert apply_rule(net, Unwrap()) == (0, {})


def test_refusals_of_the_last_sweep_come_with_their_node() -> None:
    net = net_of(nn.Sigmoid(), nn.Tanh(), nn.Sigmoid())
    done, refusals = apply_rule(net, Unwrap())
    assert done == 1
    assert [(n.name, str(r)) for n, r in refusals.items()] == [
        ("_0", "_0: a Sigmoid stays"),
        ("_2", "_2: a Sigmoid stays"),
    ]


def test_erased_nodes_are_not_looked_at() -> None:
    rule = EraseBoth()
    net = net_of(nn.Tanh(), nn.Sigmoid(), nn.ReLU())
    assert apply_rule(net, rule) == (1, {})
    assert "_1" not in rule.seen


def test_sweeps_do_not_grow_with_the_number_of_rewrites() -> None:
    rule = Unwrap()
    count = 300
    apply_rule(net_of(*(nn.Tanh() for _ in range(count))), rule)
    assert len(rule.seen) <= 2 * (count + 2)


def test_inner_sites_are_rewritten_before_outer_ones() -> None:
    inner = Apply(lambda m, x: x + m.f(x), f=nn.Conv2d(4, 4, 3, padding=1))
    outer = Apply(lambda m, x: x + m.g(torch.relu(m.f(x))), f=inner, g=nn.Conv2d(4, 4, 1))
    gm = rmfx.remove_residuals(outer.double().eval(), image())
    assert [row.status for row in rmfx.report(gm).rows] == ["removed", "removed"]


class NeverDone(Unwrap):
    """Finds something to do at every Tanh, for ever."""

    def match(self, net: Net, node: fx.Node) -> fx.Node | None:
        self.seen.append(node.name)
        layer = net.replacement(node) or net.module(node)
        return node.all_input_nodes[0] if isinstance(layer, nn.Tanh) else None

    def rewrite(self, net: Net, node: fx.Node, match: fx.Node) -> None:
        with net.graph.inserting_after(node):
            made = net.put(nn.Tanh(), match, "again", node)
        node.replace_all_uses_with(made)
        net.release([node])
        net.graph.erase_node(node)


def test_a_rule_that_never_ends_is_stopped_and_named() -> None:
    rule = NeverDone()
    with pytest.raises(InternalError, match=r"NeverDone at again\w*: it finds .* for ever.*report"):
        apply_rule(net_of(nn.ReLU(), nn.Tanh()), rule)
    assert len(rule.seen) == 5 * 4  # one sweep more than the graph has nodes, in all
