"""The dialect as a check: a rule that breaks a law is named, with the node and the law."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from builders import Residual, conv, image, ready
from torch import fx

import rmfx
from rmfx.ir.driver import apply_rule
from rmfx.ir.net import Net
from rmfx.ir.spec import LAWS, check, enforced


def traced() -> Net:
    return Net(rmfx.trace(ready(Residual(conv())), image()))


def call(net: Net, target: object, *args: object, **kwargs: object) -> fx.Node:
    """The join, called otherwise."""
    node = next(n for n in net.graph.nodes if n.name == "add")
    node.target, node.args, node.kwargs = target, args or node.args, kwargs
    return node


def by_method(net: Net) -> None:
    node = call(net, "add_")
    node.op = "call_method"
    node.target = "relu_"


def of_nothing(net: Net) -> None:
    next(n for n in net.graph.nodes if n.op == "call_module").target = "nothing"


def of_elsewhere(net: Net) -> None:
    net.make_stand_for(next(iter(net.graph.nodes)), "nothing")


def of_a_list(net: Net) -> None:
    next(iter(net.graph.nodes)).meta["shape"] = [1, 2]


def concatenated(net: Net) -> None:
    node = call(net, torch.cat)
    node.args, node.kwargs = (node.args,), {"dim": 1}


BROKEN: dict[str, Callable[[Net], object]] = {
    "calls a module that is not there": of_nothing,
    "is arithmetic in another form": lambda net: call(net, operator.add),
    "is a choice in another form": lambda net: setattr(call(net, "maximum"), "op", "call_method"),
    "concatenates in another form": concatenated,
    "writes in place": by_method,
    "has a shape that is no tuple": of_a_list,
    "stands for a value that the source has not": of_elsewhere,
}


def test_every_law_but_that_of_order_can_be_broken_here() -> None:
    assert len(BROKEN) == len(LAWS) - 1  # torch.fx does not let a node stand before what it reads


@pytest.mark.parametrize("law", BROKEN)
def test_a_rule_that_breaks_a_law_is_named(law: str) -> None:
    class Breaking:
        done = False

        def match(self, net: Net, node: fx.Node) -> bool | None:
            return True if not self.done and node.op == "output" else None

        def rewrite(self, net: Net, node: fx.Node, match: bool) -> None:
            self.done = True
            BROKEN[law](net)

    net = traced()
    check(net, "the front-end")
    with enforced(), pytest.raises(rmfx.InternalError, match=f"Breaking left .*: it {law}"):
        apply_rule(net, Breaking())


def test_what_a_graph_does_not_hold_is_not_checked_unless_asked_for() -> None:
    net = traced()
    of_a_list(net)
    with pytest.raises(rmfx.InternalError, match="has a shape"):
        check(net, "the test")


def test_a_module_may_have_the_name_of_an_operation() -> None:
    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mul, self.add_ = conv(), conv()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.add_(self.mul(x)) + x
            return result

    check(Net(rmfx.trace(ready(Named()), image())), "the front-end")
