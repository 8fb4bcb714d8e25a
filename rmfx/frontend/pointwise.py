"""Calls of torch that act on each value alone become one activation.

An operator is pointwise by its tag. A step by comparison, rounding, a cast there and back, or what
quantises and dequantises, takes several of them, between which values have other types: what stands
between one value and another of its type, and reads nothing else but constants, is an activation,
whatever it is made of.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from rmfx.interval import INF
from rmfx.ir.callees import is_touched
from rmfx.ir.facts import Inference
from rmfx.ir.functions import is_in_place
from rmfx.ir.kinds import FILLED, NO_OP_CALLS, NO_OP_METHODS, aten, kind_of
from rmfx.ir.nodes import constant
from rmfx.ir.notes import FOLLOWED, gives_number, type_of, why_frozen
from rmfx.ir.size_keeping import operator_name
from rmfx.modules.activations import ChannelClamp, Composed

from .dispatch import Probes, Step, families, is_open, is_pointwise, types_for
from .layers import input_of_call

MOST = 32  # calls in a row
COPIES = (*NO_OP_CALLS, *NO_OP_METHODS)
OF_TYPES = ("dtype", "device")


def composed(
    gm: fx.GraphModule, node: fx.Node, facts: Inference, probes: Probes
) -> tuple[nn.Module, fx.Node] | None:
    """A node as an activation of an earlier value, which is given with it; None if it is none."""
    if not _is_call(gm, node) or node.target in COPIES:
        return None
    region = {node}
    while len(region) <= MOST:
        bases = _read_by(region)
        if len(bases) == 1 and _same_type(facts, bases[0], node):
            if not _stays(bases[0], region):
                return None
            calls = _cut_out(gm, bases[0], region, node)
            alone = _acts_alone(calls, bases[0], facts, probes)
            return (Composed(calls), bases[0]) if alone else None
        last = max(bases, default=None)
        if last is None or not _is_call(gm, last):
            return None
        region.add(last)
    return None


def _is_call(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node may be a part of an activation."""
    if node.op == "call_module":
        return reads_one(gm, node)
    if node.target is getattr:
        return node.args[1] in OF_TYPES
    return is_open(node) and not gives_number(node)


def reads_one(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node calls a module of torch, as it is, of one value."""
    if node.op != "call_module" or why_frozen(node) or len(node.args) + len(node.kwargs) != 1:
        return False
    module = gm.get_submodule(str(node.target))
    return kind_of(module) is not None and not is_touched(module)


def _stays(base: fx.Node, region: Collection[fx.Node]) -> bool:
    """Whether the last call of a region would read of its base and constants what the first did."""
    constants = {n for node in region for n in node.all_input_nodes if n.op == "get_attr"}
    return not any(map(why_frozen, (base, *constants)))


def _read_by(region: Collection[fx.Node]) -> list[fx.Node]:
    """The values that some nodes read and do not make, in order."""
    read = {n for node in region for n in node.all_input_nodes}
    return sorted(n for n in read - set(region) if n.op != "get_attr" and _type_read(n) is None)


def _type_read(node: fx.Node) -> torch.dtype | None:
    """The type that a node reads of a value, if that is known."""
    if node.target is not getattr or node.args[1] != "dtype":
        return None
    kind = type_of(node.args[0])  # type: ignore[arg-type]
    return None if kind is None else kind[0]


def _same_type(facts: Inference, base: fx.Node, node: fx.Node) -> bool:
    """Whether two values are of one type of real numbers, as far as that is known."""
    kinds = [type_of(n) for n in (base, node)]
    # Where it is known, nothing is decided by it: the calls themselves will run.
    is_real = kinds[0][0].is_floating_point if kinds[0] else facts.is_real(base)
    return not gives_number(base) and is_real and len({*kinds} - {None}) <= 1


def _cut_out(
    gm: fx.GraphModule, base: fx.Node, region: Collection[fx.Node], end: fx.Node
) -> fx.GraphModule:
    """The nodes between two values as a graph of their own, which writes to nothing it is given."""
    graph = fx.Graph()
    copies = {base: graph.placeholder("x")}
    read = {n for node in region for n in node.all_input_nodes}
    constants = {n for n in read if n.op == "get_attr"}
    types = {n for n in read if _type_read(n) is not None and n.args[0] in (base, *region)}

    def of(node: fx.Node) -> Any:
        return copies[node] if node in copies else _type_read(node)

    for node in sorted({*region, *constants, *types}):
        copies[node] = graph.create_node(
            node.op, node.target, *fx.map_arg((node.args, node.kwargs), of)
        )
        if is_in_place(operator_name(node)):
            write_to_copy(copies[node])
    graph.output(copies[end])
    return fx.GraphModule(gm, graph, "Calls").eval()


def write_to_copy(node: fx.Node) -> fx.Node:
    """Let a call that writes to its first argument write to a copy of it, which is given."""
    written: Any = input_of_call(node)
    with node.graph.inserting_before(node):
        kept = node.graph.call_method("clone", (written,))
    if node.args:
        node.args = (kept, *node.args[1:])
    else:
        node.replace_input_with(written, kept)
    return kept


def _acts_alone(calls: fx.GraphModule, base: fx.Node, facts: Inference, probes: Probes) -> bool:
    """Whether a graph gives, of each value alone, one of the same type."""
    family = next(families([base], facts), [])
    for (shape,) in family:
        for kind in types_for(base):
            x = probes.empty(shape, kind)
            # What does not run is no news to anybody; `calls(x)` would print it.
            ran = probes.run(is_pointwise, partial(calls.forward, x))
            if ran is None or not isinstance(ran[1], Tensor):
                return False
            if all(step.operator in (*FILLED, *NO_OP_CALLS) for step in ran[0]):
                return False  # it reads no value, or only copies it
            kept = (ran[1].shape, ran[1].dtype, ran[1].device) == (x.shape, x.dtype, x.device)
            if not kept or not all(_is_alone(step, x) for step in ran[0]):
                return False
    return bool(family)


def _is_alone(step: Step, x: Tensor) -> bool:
    """Whether an operator reads x, what has its shape, and single numbers, place by place."""
    if step.operator in NO_OP_CALLS:
        return True
    if not is_pointwise(step.operator):
        return False
    return all(t.shape == x.shape or t.numel() == 1 for t in (*step.tensors, *step.made))


# ---- bounds that differ from channel to channel -------------------------------------------------
_BOUNDS: dict[OpOverload, tuple[str, str]] = {  # lower and upper one, by their names in the schema
    aten.clamp.Tensor: ("min", "max"),
    aten.clamp_min.Tensor: ("min", ""),
    aten.clamp_max.Tensor: ("", "max"),
    aten.maximum.default: ("other", ""),
    aten.minimum.default: ("", "other"),
}


def bounded(gm: fx.GraphModule, node: fx.Node, probes: Probes) -> tuple[nn.Module, fx.Node] | None:
    """A clamp by constants, a number for each channel, and what it reads; None if it is none."""
    if all(n.op != "get_attr" for n in node.all_input_nodes) or gm.meta.get(FOLLOWED):
        return None
    found = probes.meaning(node, _BOUNDS.__contains__)
    if not isinstance(found, tuple) or found[0] not in _BOUNDS:
        return None
    op, args, options = found
    given = dict(zip((a.name for a in op._schema.arguments), args, strict=False)) | options
    if given["self"].op == "get_attr" and "other" in given:
        given["self"], given["other"] = given["other"], given["self"]
    bounds = [given.get(name) for name in _BOUNDS[op]]
    ends = [n and constant(gm, n) for n in bounds]
    missing = any(n is not None and end is None for n, end in zip(bounds, ends, strict=True))
    if missing or type_of(given["self"]) is None:
        return None
    clamp = _channel_clamp(ends, *type_of(given["self"]))
    return None if clamp is None else (clamp, given["self"])


def _channel_clamp(
    ends: Sequence[Tensor | None], kind: torch.dtype, device: torch.device
) -> ChannelClamp | None:
    """The clamp between two tensors of one type, each a number or (channels, 1, …)."""
    shapes = {end.shape for end in ends if end is not None and end.numel() > 1}
    if len(shapes) != 1 or any(end is not None and end.dtype != kind for end in ends):
        return None
    (shape,) = shapes
    dims = next(i for i, n in enumerate(reversed(shape)) if n > 1)
    width = shape[-1 - dims]
    if width != shape.numel():
        return None
    low, high = (
        torch.full((width,), infinity, dtype=kind, device=device)
        if end is None
        else end.detach().flatten().expand(width)
        for end, infinity in zip(ends, (-INF, INF), strict=True)
    )
    return ChannelClamp(low, high, dims).eval()
