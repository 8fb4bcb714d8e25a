"""Padding with what the layers before it give for zeros becomes padding before those layers.

A 1x1 convolution and its batch norm give b for zeros, and a 3x3 behind them that pads with zeros
is no continuation of theirs. So DBB (arXiv 2103.13425, `BNAndPadLayer`) pads with zeros and then
writes b over the border, in place:

    y = F.pad(bn(conv(x)), [p] * 4);  y[:, :, :p, :] = b;  y[:, :, -p:, :] = b;  …

which is bn(conv(F.pad(x, [p] * 4))). Only exporting can trace such code; here is its pattern.
Both ways to compute b differ by rounding; nothing is done where they differ by more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ._dialect import attribute
from ._meta import forget, without_notes

aten = torch.ops.aten
PADS = (aten.pad.default, aten.constant_pad_nd.default)
CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
FAR = 2**31  # an end beyond every size
ROUNDING = 1000  # in units of the last place

Side = tuple[int, str, int]  # dimension, "before" or "behind", how many


@dataclass(frozen=True, eq=False)
class _Write:
    """One side of a border written over: the nodes that do it, which side, with what."""

    nodes: tuple[fx.Node, ...]
    side: Side
    value: Tensor


@dataclass(frozen=True, eq=False)
class _Filled:
    """A padded value whose border is written over, and the pointwise layers before it."""

    pad: fx.Node
    writes: tuple[_Write, ...]
    layers: tuple[fx.Node, ...]


def pad_before(gm: fx.GraphModule) -> None:
    """Let every such padding stand before the layers whose value it writes."""
    for pad in [node for node in gm.graph.nodes if node.target in PADS]:
        found = _read(gm, pad)
        if found is not None:
            _rewrite(gm, found)


def _read(gm: fx.GraphModule, pad: fx.Node) -> _Filled | None:
    sides = _sides(pad)
    writes = [(user, _write(gm, user)) for user in pad.users]
    filled = [write for _, write in writes if write is not None]
    readers = [user for user, write in writes if write is None]
    if not sides or not filled or not readers or {w.side for w in filled} != sides:
        return None
    if max(w.nodes[-1] for w in filled) > min(readers):
        return None
    layers = _layers_before(pad)
    if not layers or not all(torch.equal(w.value, filled[0].value) for w in filled):
        return None
    given = _at_zero(gm, layers)
    if given is None or not _agree(given, filled[0].value):
        return None
    return _Filled(pad, tuple(filled), layers)


def _sides(pad: fx.Node) -> set[Side]:
    """The sides that are padded with zeros; none for other paddings."""
    shape = pad.meta.get("shape")
    amounts, *rest = [*pad.args[1:]]
    if shape is None or pad.kwargs or any(x not in ("constant", None, 0, 0.0) for x in rest):
        return set()
    if not isinstance(amounts, (list, tuple)) or len(amounts) > 2 * (len(shape) - 2):
        return set()
    if not all(isinstance(n, int) and n >= 0 for n in amounts):
        return set()
    found: set[Side] = set()
    for i, n in enumerate(amounts):
        if isinstance(n, int) and n:
            found.add((len(shape) - 1 - i // 2, "behind" if i % 2 else "before", n))
    return found


def _write(gm: fx.GraphModule, node: fx.Node) -> _Write | None:
    """A chain of slices that ends in a copy of a constant over one side of the border."""
    nodes: list[fx.Node] = []
    sides: list[Side] = []
    while node.target is aten.slice.Tensor and len(node.users) == 1:
        bounds = _bounds(node)
        if bounds is None:
            return None
        if bounds[1:] != (0, FAR):  # of all there is: exporting writes it down as well
            sides.append(_side(*bounds))
        nodes.append(node)
        node = next(iter(node.users))
    if node.target is not aten.copy_.default or node.users or len(sides) != 1:
        return None
    value = _constant(gm, node.args[1]) if node.args[0] is nodes[-1] else None
    whole = nodes[0].meta.get("shape")
    if value is None or whole is None:
        return None
    spread = (1,) * (len(whole) - value.dim()) + tuple(value.shape)
    if spread != (1, whole[1], *(1 for _ in whole[2:])):  # one number for each channel
        return None
    return _Write((*nodes, node), sides[0], value.reshape(-1))


def _bounds(node: fx.Node) -> tuple[int, int, int] | None:
    """Dimension, start and end of a slice, where they are numbers; FAR for the very end."""
    given: list[Any] = [*node.args[1:], *(0, 0, FAR, 1)[len(node.args) - 1 :]]
    if not all(isinstance(n, int) for n in given) or given[3] != 1:
        return None
    return given[0], given[1], min(given[2], FAR)


def _side(dim: int, start: int, end: int) -> Side:
    """The side of a border that a slice takes."""
    return (dim, "before", end) if start == 0 else (dim, "behind", -start if end == FAR else 0)


def _constant(gm: fx.GraphModule, node: Any) -> Tensor | None:
    """The value of a node that depends on the model's tensors alone, not spread out yet."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "get_attr":
        value = attribute(gm, node)
        return value.detach() if isinstance(value, Tensor) else None
    if node.op != "call_function" or node.kwargs or not node.all_input_nodes:
        return None
    if node.target is aten.expand.default:
        return _constant(gm, node.args[0])
    inputs = {n: _constant(gm, n) for n in node.all_input_nodes}
    if any(value is None for value in inputs.values()):
        return None
    with torch.no_grad():
        made = node.target(*fx.map_arg(node.args, lambda n: inputs[n]))  # type: ignore[operator]
    return made if isinstance(made, Tensor) else None


def _layers_before(pad: fx.Node) -> tuple[fx.Node, ...]:
    """A pointwise convolution and batch norms behind it, in order; empty if there are others."""
    found: list[fx.Node] = []
    node: Any = pad.args[0]
    reader = pad
    while isinstance(node, fx.Node) and set(node.users) == {reader}:
        found.append(node)
        if node.target in CONVS:
            return tuple(reversed(found)) if _is_pointwise(node) else ()
        if node.target is not aten.batch_norm.default:
            return ()
        node, reader = node.args[0], node
    return ()


def _is_pointwise(conv: fx.Node) -> bool:
    args: list[Any] = [*conv.args]
    shape = args[1].meta.get("shape")
    strides, pads = (args[3] if len(args) > 3 else []), (args[4] if len(args) > 4 else [])
    plain = isinstance(pads, (list, tuple)) and not any(pads) and all(n == 1 for n in strides)
    return bool(plain and not conv.kwargs and shape and math.prod(shape[2:]) == 1)


def _at_zero(gm: fx.GraphModule, layers: tuple[fx.Node, ...]) -> Tensor | None:
    """What some layers give for zeros, per channel."""
    source: Any = layers[0].args[0]
    shape, kind = source.meta.get("shape"), source.meta.get("dtype")
    if shape is None or shape[1] is None or kind is None:
        return None
    x = torch.zeros((1, shape[1], *[1] * (len(shape) - 2)), dtype=kind[0], device=kind[1])
    known: dict[fx.Node, Tensor | None] = {source: x}
    for node in layers:
        for other in node.all_input_nodes:
            known.setdefault(other, _constant(gm, other))
        if any(known[n] is None for n in node.all_input_nodes):
            return None
        with torch.no_grad():
            x = node.target(*fx.map_arg(node.args, lambda n: known[n]))  # type: ignore[operator]
        known[node] = x
    return x.reshape(-1)


def _agree(given: Tensor, written: Tensor) -> bool:
    """Whether two ways to compute the same differ by rounding only."""
    if given.shape != written.shape or not bool(torch.isfinite(given).all()):
        return False
    limit = ROUNDING * torch.finfo(given.dtype).eps * float(given.abs().max())
    return bool(((given - written).abs() <= limit).all())


def _rewrite(gm: fx.GraphModule, found: _Filled) -> None:
    first, pad = found.layers[0], found.pad
    with gm.graph.inserting_before(first):
        padded = gm.graph.node_copy(pad, lambda n: n)
    source: Any = first.args[0]
    padded.args = (source, *pad.args[1:])
    shape, before = pad.meta["shape"], source.meta["shape"]
    padded.meta = {**without_notes(pad), "shape": (*before[:2], *shape[2:])}
    first.args = (padded, *first.args[1:])
    for node in found.layers:
        node.meta["shape"] = (*node.meta["shape"][:2], *shape[2:])
        forget(node)
    for write in found.writes:
        for node in reversed(write.nodes):
            gm.graph.erase_node(node)
    pad.replace_all_uses_with(found.layers[-1])
    gm.graph.erase_node(pad)
