"""Conditions on the inputs of a network, as nodes of its graph.

A graph may hold for some inputs only: `torch.export` fixes sizes and numbers, and a rewrite may
rely on the number of dimensions, or on sizes at which two operands agree. Each condition is a call
of `demand`, behind calls that compute what it demands:

    fits = rmfx_ir_conditions_fits(x, [-1, -1, -1, -1])
    demand = rmfx_ir_conditions_demand(fits, x, 'x', 'the network was made for 4 dimensions; …')

Nodes, unlike hooks, go wherever a graph goes: into pickles, copies, exported programs, traces and
scripts. While rules run, `take_conditions` keeps them apart, so that a plain graph is plain.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.fx.node import has_side_effect
from torch.jit import is_scripting, is_tracing, script_if_tracing  # type: ignore[attr-defined]
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary

from rmfx.errors import ShapeError

from .functions import IN_PLACE_SYMBOLS, asks_for_number, is_of_numbers

AGAIN = "convert the network again with example inputs like these"
WAY_OUT = "use another size, or convert the network again with example inputs of this one"


class Condition(Protocol):
    """What a rewrite demands of the network's inputs; equal ones are demanded once."""

    def write(self, graph: fx.Graph, inputs: Mapping[fx.Node, fx.Node]) -> None:
        """Let a graph demand it of its inputs, which stand for those of the network."""


# ---- what the nodes call: by Python, proxies, torch.jit.trace and torch.jit.script --------------
def demand(condition: bool, value: Tensor, name: str, message: str) -> None:
    """Raise ShapeError unless a condition on an input holds.

    Args:
        condition: the condition.
        value: the input.
        name: of the input.
        message: what is wanted instead, and the way out.
    """
    if is_scripting():
        torch._assert(condition, name + " does not fit the network: " + message)
    else:
        _demand(condition, value, name, message)


def _demand(condition: Any, value: Any, name: str, message: str) -> Any:
    if has_torch_function((condition, value)):
        return handle_torch_function(demand, (condition, value), condition, value, name, message)
    if isinstance(condition, Tensor):  # while torch.jit.trace records, sizes are tensors
        return _demand_recorded(condition, f"{name} does not fit the network: {message}")
    if not condition:
        raise ShapeError(f"{name} {_described(value)}, but {message}")
    return None


@script_if_tracing  # type: ignore[untyped-decorator]
def _demand_recorded(condition: Tensor, message: str) -> Tensor:
    torch._assert(bool(condition), message)
    return condition  # what gives nothing cannot be recorded


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"has shape {tuple(value.shape)}"
    return "is not given" if value is None else f"is {value!r}"


def fits(x: Tensor, sizes: list[int]) -> bool:
    """Whether an input is a tensor of these sizes, of which -1 stands for any."""
    if is_scripting():
        return _has_sizes(x, sizes)
    else:
        found: bool = _fits(x, sizes)
        return found


def _fits(x: Any, sizes: list[int]) -> Any:
    if has_torch_function((x,)):
        return handle_torch_function(fits, (x,), x, sizes)
    if is_tracing():
        return _fits_recorded(x, sizes)
    return isinstance(x, Tensor) and _has_sizes(x, sizes)


def _has_sizes(x: Tensor, sizes: list[int]) -> bool:
    if x.dim() != len(sizes):
        return False
    for i, size in enumerate(sizes):  # noqa: SIM110  (TorchScript knows no generators)
        if size >= 0 and x.size(i) != size:
            return False
    return True


@script_if_tracing  # type: ignore[untyped-decorator]
def _fits_recorded(x: Tensor, sizes: list[int]) -> Tensor:
    return torch.tensor(_has_sizes(x, sizes))


def inner_size(x: Tensor, dim: int, growth: int, stride: int) -> int:
    """⌊(size + growth)/stride⌋: the size of a map inside the network."""
    if has_torch_function_unary(x):
        size: int = handle_torch_function(inner_size, (x,), x, dim, growth, stride)
        return size
    return (x.size(dim) + growth) // stride


def is_constant(value: Any, constant: Any) -> Any:
    """Whether an input is the number, the string or the None for which a graph was made."""
    if has_torch_function((value,)):
        return handle_torch_function(is_constant, (value,), value, constant)
    if type(value) is not type(constant):
        return False
    return value == constant or (value != value and constant != constant)


has_side_effect(demand)  # torch.fx would take it for dead code


def refuses(error: BaseException) -> bool:
    """Whether an error says that inputs do not fulfil a network's conditions.

    That of the network itself, or what torch makes of it in an exported program or a script.
    """
    marks = ("Guard failed", " does not fit the network: ")
    return isinstance(error, ShapeError) or any(mark in str(error) for mark in marks)


# ---- conditions in a graph ----------------------------------------------------------------------
def demand_sizes(graph: fx.Graph, x: fx.Node, sizes: Sequence[int | None], message: str) -> None:
    """Let a graph demand of an input to be a tensor of these sizes, None for any."""
    whole = [-1 if size is None else size for size in sizes]
    condition = graph.call_function(fits, (x, whole))
    demand_that(graph, condition, x, message)


def demand_that(graph: fx.Graph, condition: fx.Node, x: fx.Node, message: str) -> None:
    """Let a graph demand of an input that a condition on it holds."""
    name = str(x.target) if x.op == "placeholder" else x.name
    graph.call_function(demand, (condition, x, name, message))


def demand_rank(graph: fx.Graph, x: fx.Node, rank: int) -> None:
    """Let a graph demand a number of dimensions of an input, or of a value behind it."""
    message = (
        f"the network was converted for {rank} dimensions; add or remove a batch dimension, or "
        f"{AGAIN}"
    )
    demand_sizes(graph, x, [None] * rank, message)


@dataclass(frozen=True)
class SizeCondition:
    """What must hold of one size of an input.

    Attributes:
        source: the input.
        dim: which of its sizes, counted from the end: a batch dimension may be missing.
        cause: what demands it.
    """

    source: fx.Node
    dim: int
    cause: str


@dataclass(frozen=True)
class Multiple(SizeCondition):
    """⌊(size + growth)/stride⌋ must be a multiple of a number."""

    stride: int
    growth: int
    multiple: int

    def write(self, graph: fx.Graph, inputs: Mapping[fx.Node, fx.Node]) -> None:
        """Let a graph demand it of its inputs, which stand for the sources."""
        x = inputs[self.source]
        size = graph.call_function(inner_size, (x, self.dim, self.growth, self.stride))
        rest = graph.call_function(operator.mod, (size, self.multiple))
        message = (
            f"{self.cause} averages fewer values where its last window hangs over the border, as "
            f"ceil_mode=True lets it, unless {_floor(self.dim, self.growth, self.stride)} is a "
            f"multiple of {self.multiple}; {WAY_OUT}"
        )
        demand_that(graph, graph.call_function(operator.eq, (rest, 0)), x, message)


@dataclass(frozen=True)
class Agreement(SizeCondition):
    """Two sizes ⌊(size + growth)/stride⌋, of one input or of two, must be equal."""

    strides: tuple[int, int]
    growths: tuple[int, int]
    other: fx.Node | None = None

    def write(self, graph: fx.Graph, inputs: Mapping[fx.Node, fx.Node]) -> None:
        """Let a graph demand it of its inputs, which stand for the sources."""
        x = inputs[self.source]
        of_other = f" of {self.other.name}" if self.other else ""
        sources = (x, inputs[self.other or self.source])
        laws = list(zip(sources, self.growths, self.strides, strict=True))
        sizes = [graph.call_function(inner_size, (y, self.dim, a, s)) for y, a, s in laws]
        floors = [_floor(self.dim, a, s) for _, a, s in laws]
        where = f"{' = '.join(floors)}{of_other}"
        message = f"{self.cause} combines equal sizes only where {where}; {WAY_OUT}"
        demand_that(graph, graph.call_function(operator.eq, tuple(sizes)), x, message)


def _floor(dim: int, growth: int, stride: int) -> str:
    """⌊(shape[-1] + 2)/2⌋, in words."""
    return f"(shape[{dim}] {'-' if growth < 0 else '+'} {abs(growth)}) // {stride}"


def own_conditions(graph: fx.Graph) -> fx.Graph:
    """An empty graph with the inputs of another one, for conditions to be put there."""
    conditions = fx.Graph()
    for node in graph.find_nodes(op="placeholder"):
        conditions.node_copy(node)
    return conditions


def has_conditions(graph: fx.Graph) -> bool:
    """Whether a graph demands anything of its inputs."""
    return bool(graph.find_nodes(op="call_function", target=demand))


def take_conditions(graph: fx.Graph) -> fx.Graph:
    """Take the conditions out of a graph, into one of their own with the same inputs."""
    conditions = own_conditions(graph)
    inputs = graph.find_nodes(op="placeholder")
    places = dict(zip(inputs, conditions.nodes, strict=True))
    found = nodes_of_conditions(graph)
    for node in found:
        places[node] = conditions.node_copy(node, places.__getitem__)
    for node in reversed(found):
        if not node.users:
            graph.erase_node(node)
    return conditions


def nodes_of_conditions(graph: fx.Graph) -> list[fx.Node]:
    """Every `demand` that depends on sizes of inputs alone, and what it reads."""
    needed = set(graph.find_nodes(op="call_function", target=demand))
    if not needed:
        return []
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    inputs = set(graph.find_nodes(op="placeholder"))
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        follows = all(n in found or n in inputs for n in node.all_input_nodes)
        if node in needed and follows and _asks(node):
            found[node] = None
    return list(found)


def _asks(node: fx.Node) -> bool:
    """Whether a node does nothing but ask for sizes, or compute with numbers."""
    place, name = (getattr(node.target, key, "") for key in ("__module__", "__name__"))
    computes = place == __name__ or (is_of_numbers(node.target) and name not in IN_PLACE_SYMBOLS)
    return asks_for_number(node) or (node.op == "call_function" and computes)


def put_inputs_first(graph: fx.Graph) -> None:
    """Put all inputs before whatever reads the first, so that conditions find room there."""
    for one, following in itertools.pairwise(graph.find_nodes(op="placeholder")):
        one.append(following)


def put_conditions(conditions: fx.Graph, graph: fx.Graph) -> None:
    """Put conditions behind the inputs of a graph, except those that it has already."""
    if not has_conditions(conditions):
        return
    inputs = graph.find_nodes(op="placeholder")
    places = dict(zip(conditions.find_nodes(op="placeholder"), inputs, strict=True))
    behind = itertools.islice(graph.nodes, list(graph.nodes).index(inputs[-1]) + 1, None)
    # Equal calls may stand further behind, where what reads a condition cannot wait for them.
    in_front = list(itertools.takewhile({*nodes_of_conditions(graph)}.__contains__, behind))
    known = {_call(n.target, n.args): n for n in in_front}
    taken = {node.name for node in graph.nodes}
    with graph.inserting_before([inputs[-1], *in_front][-1].next):
        for node in conditions.nodes:
            if node.op in ("placeholder", "output"):
                continue
            call = _call(node.target, fx.map_arg(node.args, places.__getitem__))
            if call not in known:
                known[call] = graph.node_copy(node, places.__getitem__)
                known[call].name = _first_free(node.name, taken)
            places[node] = known[call]


def _first_free(name: str, taken: set[str]) -> str:
    """The name without its number, or with the first that is free: a second pass changes none."""
    base = re.sub(r"_\d+$", "", name)
    names = itertools.chain([base], (f"{base}_{i}" for i in itertools.count(1)))
    free = next(one for one in names if one not in taken)
    taken.add(free)
    return free


def _call(target: Any, args: Any) -> str:
    """What a node computes, in words."""
    return f"{target} {args}"
