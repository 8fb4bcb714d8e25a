"""Taking residual blocks out of a traced network of basic blocks or inverted residuals."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from _fashion import Split
from _training import loss
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

import rmfx


@torch.no_grad()
def multiply_adds(net: nn.Module, x: Tensor) -> float:
    """Multiply-adds of a network as it runs, which is quicker than reading its graph."""
    with FlopCounterMode(display=False) as counter:
        net(x)
    return float(counter.get_total_flops()) / 2


def joins_of(net: fx.GraphModule) -> list[fx.Node]:
    """The additions."""
    return [node for node in net.graph.nodes if len(node.all_input_nodes) == 2]


def is_projected(net: fx.GraphModule, join: fx.Node) -> bool:
    """Whether the block's input meets the branch behind a layer of its own."""
    first = min(join.all_input_nodes)
    layer = net.get_submodule(str(first.target)) if first.op == "call_module" else None
    return len(first.users) == 1 and isinstance(layer, nn.BatchNorm2d)


def replaced(
    net: fx.GraphModule, name: str, by: Callable[[fx.Node, fx.Node], fx.Node]
) -> fx.GraphModule:
    """A copy in which one operand stands for an addition."""
    made = copy.deepcopy(net)
    (join,) = (node for node in made.graph.nodes if node.name == name)
    first, second = sorted(join.all_input_nodes)
    join.replace_all_uses_with(by(first, second))
    made.graph.eliminate_dead_code()
    made.recompile()
    made.delete_all_unused_submodules()
    return made


def shortened(net: nn.Module, looked_at: Split, budget: float = 0.0) -> fx.GraphModule:
    """Without as many blocks with an identity skip as a budget of multiply-adds wants.

    The next one is always that which the loss misses least. Without any if there are too few.
    """
    x = looked_at.images[:1]
    short: fx.GraphModule = rmfx.remove_noops(net, x)
    while multiply_adds(short, x) > budget:
        joins = [join for join in joins_of(short) if not is_projected(short, join)]
        if not joins:
            break
        forms = [replaced(short, join.name, by=lambda first, second: first) for join in joins]
        short = min(forms, key=lambda form: loss(form, looked_at))
    return short
