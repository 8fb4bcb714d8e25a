"""What a network costs: multiply-adds, parameters, traffic, memory; in all and node by node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from rmfx.algebra.affine import MULTIPLYING
from rmfx.analysis.multiply_adds import work_of
from rmfx.errors import ShapeError
from rmfx.frontend.tracing import trace
from rmfx.ir.callees import Calls
from rmfx.ir.conditions import nodes_of_conditions
from rmfx.ir.driver import apply_rule
from rmfx.ir.joins import adds_itself
from rmfx.ir.kinds import ADDS, SUBS
from rmfx.ir.names import module_path
from rmfx.ir.net import Net
from rmfx.ir.notes import gives_number
from rmfx.rules.noop import NoopRule
from rmfx.table import Column, short
from rmfx.table import table as _table

from .memory import live_bytes, size_of
from .streams import Skip
from .streams import skips as _skips


@dataclass(frozen=True)
class Cost:
    """Cost of one forward pass.

    Attributes:
        macs: multiply-adds of convolutions and Linear layers.
        parameters: numbers in the parameters.
        layers: convolutions and Linear layers, counted per call.
        adds: additions and subtractions of two tensors that depend on the input.
        moved: bytes of values that nodes read and write.
        peak: bytes of the values that live at the same time, at most (weights are not counted).
    """

    macs: int
    parameters: int
    layers: int
    adds: int
    moved: int
    peak: int


@dataclass(frozen=True)
class NodeCost:
    """Cost of one node.

    Attributes:
        node: its name in `rmfx.trace(model, example_inputs)`.
        place: path of the module it belongs to.
        kind: what it calls.
        macs, parameters: as in `Cost`.
        moved: bytes it reads and writes, weights included.
        live: bytes of all values that live while it runs.
    """

    node: str
    place: str
    kind: str
    macs: int
    parameters: int
    moved: int
    live: int


def nodes(model: nn.Module | Any, example_inputs: Any) -> tuple[NodeCost, ...]:
    """The cost of every node of a model's graph, in the order in which they run.

    Args:
        model: `nn.Module`, `GraphModule` or `ExportedProgram` in eval mode.
        example_inputs: a tensor or a tuple of arguments.

    Raises:
        ShapeError: no example inputs were given, or the model does not run on them.
    """
    gm = _traced(model, example_inputs)
    live = live_bytes(gm)
    return tuple(_cost_of(gm, node, live[node]) for node in _computing(gm.graph))


def _traced(model: nn.Module | Any, example_inputs: Any) -> fx.GraphModule:
    if example_inputs is None:
        raise ShapeError("counting multiply-adds needs example inputs")
    return trace(model, example_inputs)


def _computing(graph: fx.Graph) -> list[fx.Node]:
    """The nodes of a graph, conditions aside, which look at sizes alone."""
    aside = set(nodes_of_conditions(graph))
    return [node for node in graph.nodes if node not in aside]


def _cost_of(gm: fx.GraphModule, node: fx.Node, live: int) -> NodeCost:
    module = Calls(gm).module(node)
    macs, size = work_of(node, module)
    moved = 0
    kind = node.op
    if node.op.startswith("call"):
        kind = str(getattr(node.target, "__name__", node.target))
        moved = sum(map(size_of, (*node.all_input_nodes, node)))
    if module is not None:
        kind = type(module).__name__
        moved += sum(p.numel() * p.itemsize for p in module.parameters())
    return NodeCost(node.name, module_path(node), kind, macs or 0, size, moved, live)


def count(model: nn.Module | Any, example_inputs: Any) -> Cost:
    """Count the cost of a model on example inputs.

    Args:
        model: `nn.Module`, `GraphModule` or `ExportedProgram` in eval mode.
        example_inputs: a tensor or a tuple of arguments.

    Raises:
        ShapeError: no example inputs were given, or the model does not run on them.

    Example:
        >>> import torch
        >>> from rmfx import cost
        >>> cost.count(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1)), torch.zeros(1, 3, 4, 4)).macs
        384
    """
    return count_graph(_traced(model, example_inputs))


def count_graph(gm: fx.GraphModule) -> Cost:
    """The same for a graph whose shapes are known."""
    live = live_bytes(gm)
    rows = [_cost_of(gm, node, live[node]) for node in _computing(gm.graph)]
    return Cost(
        macs=sum(row.macs for row in rows),
        parameters=sum(p.numel() for p in gm.parameters()),
        layers=sum(_is_conv(gm, node) for node in gm.graph.nodes),
        adds=sum(_adds_tensors(gm, node) for node in gm.graph.nodes),
        moved=sum(row.moved for row in rows),
        peak=max(row.live for row in rows),
    )


def _is_conv(gm: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(Calls(gm).module(node), MULTIPLYING)


def _adds_tensors(gm: fx.GraphModule, node: fx.Node) -> bool:
    if adds_itself(gm, node):
        return True
    if node.op != "call_function" or node.target not in (*ADDS, *SUBS):
        return False
    tensors = [n for n in node.all_input_nodes if n.op != "get_attr"]
    return len(tensors) == 2 and not any(gives_number(n) for n in tensors)


def skips(model: nn.Module | Any, example_inputs: Any) -> tuple[Skip, ...]:
    """The additions of a model and how many values each keeps waiting where layers are streamed.

    Args:
        model: `nn.Module`, `GraphModule` or `ExportedProgram` in eval mode.
        example_inputs: a tensor or a tuple of arguments, with a batch of one.

    Raises:
        ShapeError: no example inputs were given, or the model does not run on them.

    Example:
        >>> import rmfx, torch
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.conv = torch.nn.Conv2d(4, 4, 3, padding=1)
        ...     def forward(self, x):
        ...         return x + torch.relu(self.conv(x))
        >>> rmfx.cost.skips(Block().eval(), torch.zeros(1, 4, 8, 8))  # a row and a pixel
        (Skip(join='add', fifo=36),)
    """
    net = Net(_traced(model, example_inputs))
    apply_rule(net, NoopRule())
    return tuple(_skips(net))


def table(rows: tuple[NodeCost, ...]) -> str:
    """The costs of nodes as a table."""
    return _table(rows, _COLUMNS)


_COLUMNS = (
    Column("node", "node"),
    Column("kind", "kind"),
    Column("multiply-adds", "macs", short, right=True),
    Column("parameters", "parameters", short, right=True),
    Column("bytes moved", "moved", short, right=True),
    Column("bytes alive", "live", short, right=True),
)
