"""Plain graphs: every value has one consumer, so the network is an `nn.Sequential`."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor, fx, nn

from rmfx.errors import NotPlainError
from rmfx.frontend.tracing import trace
from rmfx.ir.conditions import has_conditions, take_conditions
from rmfx.ir.converted import copy_graph
from rmfx.modules.apply import Apply
from rmfx.modules.copies import copied_model
from rmfx.ordinary import layers_of
from rmfx.report import META_KEY, Report


def is_plain(model: nn.Module | Any) -> bool:
    """Whether every value of a model's graph has one consumer, from one input to one output.

    Raises:
        RmfxError: the model is no `GraphModule` and cannot be traced.
    """
    return why_not_plain(model) is None


def why_not_plain(model: nn.Module | Any) -> str | None:
    """What keeps a model's graph from being a chain, in words; None if nothing does.

    Raises:
        RmfxError: the model is no `GraphModule` and cannot be traced.
    """
    graph = copy_graph(_graph_of(model))
    take_conditions(graph)
    return _why_not_plain(graph)


def to_sequential(model: nn.Module | Any) -> nn.Sequential:
    """A plain network as `nn.Sequential`; modules are copied and keep their names.

    Its layers are those of `torch.nn` wherever there is one for a call: pools for means over space,
    paddings, softmax. `Apply` stands for other calls. A layer at the path `layer1.0.conv1` is
    called `layer1_0_conv1`. Conditions on the input are a module of their own, the first.

    Raises:
        NotPlainError: its graph is not a chain; the message names the node.
        RmfxError: the model is no `GraphModule` and cannot be traced.
    """
    gm = _graph_of(model)
    graph = copy_graph(gm)
    conditions = take_conditions(graph)
    reason = _why_not_plain(graph)
    if reason is not None:
        raise NotPlainError(f"the graph is not plain: {reason}; {_advice(gm.meta.get(META_KEY))}")
    network = nn.Sequential()
    if has_conditions(conditions):
        network.add_module("conditions", Conditions(conditions))
    for node in graph.nodes:
        if node.op not in ("placeholder", "output"):
            for layer in _layers(gm, node):
                network.add_module(_free_name(network, node.name), layer)
    return network.train(gm.training)


class Conditions(nn.Module):
    """What a network demands of its input, as a module that hands it on.

    Args:
        graph: of calls that raise where it is not fulfilled.
    """

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__()
        graph.output(next(iter(graph.nodes)))
        self.checks = fx.GraphModule(nn.Module(), graph)

    def forward(self, x: Tensor) -> Tensor:
        checked: Tensor = self.checks(x)
        return checked


def _graph_of(model: nn.Module | Any) -> fx.GraphModule:
    return model if isinstance(model, fx.GraphModule) else trace(model)


def _layers(gm: fx.GraphModule, node: fx.Node) -> tuple[nn.Module, ...]:
    """What computes the value of a node of a plain graph, in a row."""
    if node.op == "call_module":
        return (copied_model(gm.get_submodule(str(node.target))),)
    if layers := layers_of(gm, node):
        return layers
    source = node.all_input_nodes[0]
    args = tuple(Apply.INPUT if a is source else a for a in node.args)
    return (Apply(node.target, args, dict(node.kwargs)),)


def _free_name(network: nn.Sequential, name: str) -> str:
    """The name, or one like it that stands for nothing else: `append` is a method of networks."""
    names = (f"{name}_{i}" if i else name for i in itertools.count())
    return next(free for free in names if not hasattr(network, free))


def _why_not_plain(graph: fx.Graph) -> str | None:
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    if len(inputs) != 1:
        return f"it has {len(inputs)} inputs: {', '.join(n.name for n in inputs)}"
    for node in graph.nodes:
        if node.op == "output":
            if not isinstance(_given(graph, node), fx.Node):
                return f"{node.name} gives several values or a container"
            continue
        if len(node.users) != 1:
            users = ", ".join(u.name for u in node.users) or "nothing"
            return f"{node.name} is read by {users}{_meeting(node)}"
        if node.op != "placeholder" and not _reads_one_value(node):
            names = ", ".join(n.name for n in node.all_input_nodes) or "nothing"
            return f"{node.name} reads {names}, not one tensor alone"
    return None


def _advice(report: Report | None) -> str:
    """What may be done about a graph that is no chain, by the report of what made it, if any."""
    if report is None:
        return "remove_residuals makes chains of residual networks"
    if report.adds_left:
        return "print(rmfx.report(result)) says of each sum why it stayed"
    return "no sum stayed, and what puts values together otherwise, such as a gate, does"


def _meeting(node: fx.Node) -> str:
    """Where a value that several nodes read meets another one, or itself, again; "" if nowhere."""
    readers = [user for user in node.users if _meets(user)]
    later = (n for n in node.graph.nodes if n > node and _meets(n))
    found = readers[-1] if readers else next(later, None)
    if found is None:
        return ""
    names = " and ".join(n.name for n in found.all_input_nodes)
    return f", and {found.name} puts {names} together"


def _meets(node: fx.Node) -> bool:
    """Whether a node reads several values of the network."""
    return sum(n.op != "get_attr" for n in node.all_input_nodes) > 1


def _given(graph: fx.Graph, output: fx.Node) -> object:
    """What a graph gives; exported ones write a single value as a list of one."""
    spec = getattr(getattr(graph._codegen, "pytree_info", None), "out_spec", None)
    value = output.args[0]
    alone = spec is not None and spec.is_leaf() and isinstance(value, (list, tuple))
    return value[0] if alone else value  # type: ignore[index]


def _reads_one_value(node: fx.Node) -> bool:
    """Whether a node has one input node, passed once and as an argument of its own."""
    direct = sum(isinstance(a, fx.Node) for a in node.args)
    options = len(node.args) + len(node.kwargs) - 1
    alone = node.op != "call_module" or not options
    return len(node.all_input_nodes) == 1 and direct == 1 and alone
