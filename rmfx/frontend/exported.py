"""Graphs of `torch.export`, with the conditions under which they hold."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.node import Argument
from torch.utils import _pytree as pytree

from rmfx.ir.conditions import (
    demand_sizes,
    demand_that,
    is_constant,
    own_conditions,
    put_conditions,
)
from rmfx.ir.converted import copy_graph
from rmfx.ir.notes import VAL
from rmfx.ir.threads import without_warnings

from .guards import demand_guard, texts_of

EXPORTED = "exported"  # in a graph's metadata: its notes hold for every call
Size = int | str | None


def unlifted(program: ExportedProgram, dropped: Collection[str] = ()) -> fx.GraphModule:
    """The program as a graph that owns its weights, with its conditions as nodes.

    Args:
        program: the program.
        dropped: conditions that it does not need.
    """
    if any(sets_level(node) for node in program.graph.nodes):
        program = program.run_decompositions({})  # which computes with whole batches instead
    with without_warnings():  # tensors that are neither parameters nor buffers are fine
        gm: fx.GraphModule = program.module(check_guards=False)
    gm._forward_pre_hooks.clear()  # torch's own check, which the nodes replace
    gm._forward_pre_hooks_with_kwargs.clear()
    guards = [text for text in guards_of(program) if text not in dropped]
    return _with_conditions(gm, program.range_constraints, guards)


def guards_of(program: ExportedProgram) -> list[str]:
    """The conditions under which a program holds, Python in words."""
    return list(getattr(program, "_guards_code", None) or ())


def sets_level(node: fx.Node) -> bool:
    """Whether a node switches a level of `torch.func` (vmap, jvp) for those behind it."""
    place = str(getattr(node.target, "__module__", ""))
    return place.startswith(("torch._functorch.", "torch._C._functorch"))


def is_exported(gm: nn.Module) -> bool:
    """Whether a graph is the `.module()` of an exported program, with torch's check of inputs."""
    names = [getattr(hook, "__name__", "") for hook in gm._forward_pre_hooks.values()]
    return isinstance(gm, fx.GraphModule) and "_check_input_constraints_pre_hook" in names


def without_checks(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of an exported program's `.module()` with nodes in place of its checks."""
    gm = fx.GraphModule(module, copy_graph(module), type(module).__name__)
    guards: list[str] = []
    for node in gm.graph.find_nodes(op="call_module", target="_guards_fn"):
        check: Any = module.get_submodule("_guards_fn").forward
        guards += texts_of(check, len(node.args))
        gm.graph.erase_node(node)
    gm.meta = dict(module.meta)
    return _with_conditions(gm, getattr(module, "range_constraints", None) or {}, guards)


# ---- conditions ---------------------------------------------------------------------------------
def _with_conditions(
    gm: fx.GraphModule, constraints: Mapping[Any, Any], guards: list[str]
) -> fx.GraphModule:
    """The graph, with nodes for all that torch.export fixed."""
    conditions = own_conditions(gm.graph)
    inputs = conditions.find_nodes(op="placeholder")
    ranges = {str(symbol): _limits(limits) for symbol, limits in constraints.items()}
    ranges = {name: limits for name, limits in ranges.items() if limits != (0, math.inf)}
    owners: dict[str, tuple[fx.Node, int]] = {}
    for node in inputs:
        value = node.meta.get(VAL)
        if isinstance(value, Tensor):
            _demand_shape(conditions, node, [_size(n) for n in value.shape], ranges, owners)
        elif VAL in node.meta and isinstance(value, (int, float, str, bool, type(None))):
            _demand_constant(conditions, node, value)
    bound = _bound(gm, inputs)
    for text in guards:
        demand_guard(conditions, text, bound)
    put_conditions(conditions, gm.graph)
    _read_constants_directly(gm.graph)
    gm.recompile()
    gm.meta[EXPORTED] = True
    return gm


def _read_constants_directly(graph: fx.Graph) -> None:
    """Drop the in-place `detach_` of the copy that exporting makes of a constant in the code."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.detach_.default):
        copied = node.args[0]
        if isinstance(copied, fx.Node) and copied.target is torch.ops.aten.lift_fresh_copy.default:
            node.replace_all_uses_with(copied)
            graph.erase_node(node)


def _bound(gm: fx.GraphModule, inputs: Sequence[fx.Node]) -> dict[str, Any]:
    """Inputs by the parameters of the network, as the containers that it is called with."""
    spec = gm.graph._codegen.pytree_info.in_spec  # type: ignore[attr-defined]
    args, kwargs = pytree.tree_unflatten(list(inputs), spec)
    found = dict(inspect.signature(gm.forward).bind(*args, **kwargs).arguments)
    rest: dict[str, dict[int, Any]] = {}  # of a forward(x, *rest), whose parts got names
    for name, value in found.items():
        whole, _, place = name.rpartition("_")
        if whole not in found and place.isdecimal():
            rest.setdefault(whole, {})[int(place)] = value
    return rest | found


def _demand_constant(conditions: fx.Graph, node: fx.Node, value: Argument) -> None:
    message = (
        f"the network was exported for {value!r}; convert it again with example inputs of that "
        "value"
    )
    condition = conditions.call_function(is_constant, (node, value))
    demand_that(conditions, condition, node, message)


def _demand_shape(
    conditions: fx.Graph,
    node: fx.Node,
    sizes: Sequence[Size],
    ranges: Mapping[str, tuple[float, float]],
    owners: dict[str, tuple[fx.Node, int]],
) -> None:
    """Let a graph demand of a tensor what was exported of its sizes.

    Args:
        conditions: the graph.
        node: the input.
        sizes: a number, the name of a size that may vary, or None for any.
        ranges: lowest and highest value of each size that has a name.
        owners: the first input and dimension with each of the names.
    """
    message = (
        f"the network was exported for {_described(sizes, ranges)}; convert it again with example "
        "inputs of that shape"
    )
    fixed = [n if isinstance(n, int) else None for n in sizes]
    demand_sizes(conditions, node, fixed, message)
    for dim, name in enumerate(sizes):
        if not isinstance(name, str):
            continue
        size = conditions.call_method("size", (node, dim))
        if name in owners:
            first = conditions.call_method("size", owners[name])
            condition = conditions.call_function(operator.eq, (size, first))
            demand_that(conditions, condition, node, f"{message}, {owners[name][0].target}'s")
            continue
        owners[name] = (node, dim)
        low, high = ranges.get(name, (0, math.inf))
        for limit, holds in ((low, operator.ge), (high, operator.le)):
            if 0 < limit < math.inf:
                condition = conditions.call_function(holds, (size, int(limit)))
                demand_that(conditions, condition, node, message)


def _described(sizes: Sequence[Size], ranges: Mapping[str, tuple[float, float]]) -> str:
    often = [n for n in sizes if sizes.count(n) > 1]
    fixed = [n for n in sizes if isinstance(n, int) or n in ranges or n in often]
    text = ", ".join(str(n) if n is not None and n in fixed else "any" for n in sizes)
    limits = [
        f"{low:g} <= {name} <= {high:g}" if high < math.inf else f"{name} >= {low:g}"
        for name, (low, high) in ranges.items()
        if name in sizes
    ]
    return f"({text})" + (f" with {', '.join(limits)}" if limits else "")


def _limits(limits: Any) -> tuple[float, float]:
    # torch notes 2 where it means any size: 0 and 1 are what it likes to treat apart.
    low, high = float(limits.lower), float(limits.upper)
    return (low if low > 2 else 0, high if high < 2**62 else math.inf)


def _size(n: int | torch.SymInt) -> Size:
    if isinstance(n, int):
        return n
    return str(n) if str(n).isidentifier() else None
