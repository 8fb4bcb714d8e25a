"""Padding with what the layers before it give for zeros becomes padding before those layers.

A 1x1 convolution and its batch norm give b for zeros, and a 3x3 behind them that pads with zeros
is no continuation of theirs. So DBB (arXiv 2103.13425, `BNAndPadLayer`) pads with zeros and then
writes b over the border, in place:

    y = F.pad(bn(conv(x)), [p] * 4);  y[:, :, :p, :] = b;  y[:, :, -p:, :] = b;  …

which is bn(conv(F.pad(x, [p] * 4))). torch.export writes the slices and a copy down one by one,
Dynamo an assignment to an index; here is the pattern of both.

A border is what the layers give for zeros if it is that bit for bit. Code that computes it in
another way rounds in another way; then both ways, with the model's own numbers, must agree in
float64 to the last places, whatever the model's type: a few units in the last place of a half type
are a border of its own.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from rmfx.frontend.calls import arguments_of
from rmfx.frontend.effects import effects_of
from rmfx.ir.memo import on_demand
from rmfx.ir.nodes import constant, run_node, slice_by_slice
from rmfx.ir.notes import forget, set_shape, shape_of, type_of, without_notes

aten = torch.ops.aten
PADS: dict[Any, tuple[str, ...]] = {  # with the names of their arguments
    aten.pad.default: ("input", "pad", "mode", "value"),
    aten.constant_pad_nd.default: ("input", "pad", "value"),
    F.pad: ("input", "pad", "mode", "value"),
    torch._C._nn.pad: ("input", "pad", "mode", "value"),
}
CONVS = (
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    *(torch.conv1d, torch.conv2d, torch.conv3d),
)
NORMS: dict[Any, tuple[str, ...]] = {  # with the names of their arguments
    target: ("input", *order, "training", "momentum", "eps")
    for target, order in (
        (aten.batch_norm.default, ("weight", "bias", "mean", "variance")),
        (F.batch_norm, ("mean", "variance", "weight", "bias")),
    )
}
EXPANDS = (aten.expand.default, "expand")
FAR = 2**31  # an end beyond every size
ROUNDING = 16  # of both ways together, in units in the last place of all that they add up
Side = tuple[int, str, int]  # dimension, "before" or "behind", how many


@dataclass(frozen=True, eq=False)
class _Write:
    """One side of a border written over: the nodes that do it, which side, with what, of what."""

    nodes: tuple[fx.Node, ...]
    side: Side
    value: fx.Node
    written: fx.Node


@dataclass(frozen=True, eq=False)
class _Filled:
    """A padded value whose border is written over, and the pointwise layers before it."""

    pad: fx.Node
    writes: tuple[_Write, ...]
    layers: tuple[fx.Node, ...]


def pad_before(gm: fx.GraphModule) -> None:
    """Let every such padding stand before the layers whose value it writes."""
    tensors = _Constants(gm), _Constants(gm, torch.float64)
    for pad in [node for node in gm.graph.nodes if node.target in PADS]:
        found = _read(tensors, pad)
        if found is not None:
            _rewrite(gm, found)


class _Constants:
    """Values of nodes that depend on the model's tensors alone, not spread out yet.

    Args:
        dtype: in which the model's tensors are taken, None for their own.
    """

    def __init__(self, gm: fx.GraphModule, dtype: torch.dtype | None = None) -> None:
        self._gm, self._dtype = gm, dtype
        self._known: dict[fx.Node, Tensor | None] = {}

    def __call__(self, node: Any) -> Tensor | None:
        """The value of a node, None if it is no such node."""
        if not isinstance(node, fx.Node):
            return None
        return on_demand(node, self._known, self._compute, self._read_by)

    def _compute(self, node: fx.Node) -> Tensor | None:
        if node.op == "get_attr":
            value = constant(self._gm, node)
            return None if value is None else value.detach().to(self._dtype)
        inputs = {n: self._known[n] for n in self._read_by(node)}
        if not inputs or any(value is None for value in inputs.values()):
            return None
        return inputs.popitem()[1] if node.target in EXPANDS else _run(node, inputs)

    def _read_by(self, node: fx.Node) -> list[fx.Node]:
        """What a value is made of by a call; nothing for writes and for what draws at random."""
        effects = effects_of(self._gm, node)
        if node.op not in ("call_function", "call_method") or effects.writes or effects.draws:
            return []
        return node.all_input_nodes[:1] if node.target in EXPANDS else node.all_input_nodes


def _run(node: fx.Node, known: Mapping[fx.Node, Tensor | None]) -> Tensor | None:
    with torch.no_grad():
        made = run_node(node, known)
    return made if isinstance(made, Tensor) else None


def _read(tensors: tuple[_Constants, _Constants], pad: fx.Node) -> _Filled | None:
    sides = _sides(pad)
    writes = [(user, _write(tensors[0], user)) for user in pad.users]
    filled = [write for _, write in writes if write is not None]
    readers = [user for user, write in writes if write is None]
    if not sides or not filled or not readers or {w.side for w in filled} != sides:
        return None
    if max(w.nodes[-1] for w in filled) > min(readers):
        return None
    layers = _layers_before(pad)
    values = {w.value for w in filled}
    if not layers or not all(_is_what_zeros_give(tensors, layers, value) for value in values):
        return None
    return _Filled(pad, tuple(filled), layers)


def _sides(pad: fx.Node) -> set[Side]:
    """The sides that are padded with zeros; none for other paddings."""
    shape, given = shape_of(pad), arguments_of(pad, *PADS[pad.target])
    amounts, filling = given.get("pad"), (given.get("mode"), given.get("value"))
    if shape is None or any(x not in ("constant", None, 0, 0.0) for x in filling):
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


def _write(constants: _Constants, node: fx.Node) -> _Write | None:
    """A copy of a constant over one side of the border, with the slices that lead to it."""
    found = _assigned(node) if node.target is operator.setitem else _copied(node)
    value = None if found is None else constants(found.value)
    whole = None if found is None else shape_of(found.written)
    if found is None or value is None or whole is None:
        return None
    spread = (1,) * (len(whole) - value.dim()) + tuple(value.shape)
    if spread != (1, whole[1], *(1 for _ in whole[2:])):  # one number for each channel
        return None
    return found


def _assigned(node: fx.Node) -> _Write | None:
    """y[:, :, :1, :] = b"""
    written, index, value = node.args
    index = index if isinstance(index, tuple) else (index,)
    shape = shape_of(written) if isinstance(written, fx.Node) else None
    if shape is None or node.users or not all(isinstance(i, slice) or i is ... for i in index):
        return None
    whole = slice_by_slice(index, len(shape)) if index.count(...) < 2 else []
    parts = [(dim, s) for dim, s in enumerate(whole) if s != slice(None)]
    if len(parts) != 1 or not isinstance(value, fx.Node):
        return None
    dim, part = parts[0]
    start, end = part.start or 0, FAR if part.stop is None else part.stop
    if part.step not in (None, 1) or not all(isinstance(n, int) for n in (start, end)):
        return None
    return _Write((node,), _side(dim, start, min(end, FAR)), value, written)  # type: ignore[arg-type]


def _copied(node: fx.Node) -> _Write | None:
    """A chain of slices that ends in a copy."""
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
    if node.args[0] is not nodes[-1] or not isinstance(node.args[1], fx.Node):
        return None
    return _Write((*nodes, node), sides[0], node.args[1], nodes[0].args[0])  # type: ignore[arg-type]


def _bounds(node: fx.Node) -> tuple[int, int, int] | None:
    """Dimension, start and end of a slice, where they are numbers; FAR for the very end."""
    given: list[Any] = [*node.args[1:], *(0, 0, FAR, 1)[len(node.args) - 1 :]]
    if not all(isinstance(n, int) for n in given) or given[3] != 1:
        return None
    return given[0], given[1], min(given[2], FAR)


def _side(dim: int, start: int, end: int) -> Side:
    """The side of a border that a slice takes."""
    return (dim, "before", end) if start == 0 else (dim, "behind", -start if end == FAR else 0)


def _layers_before(pad: fx.Node) -> tuple[fx.Node, ...]:
    """A pointwise convolution and batch norms behind it, in order; empty if there are others."""
    found: list[fx.Node] = []
    node: Any = pad.args[0]
    reader = pad
    while isinstance(node, fx.Node) and set(node.users) == {reader}:
        found.append(node)
        if node.target in CONVS:
            return tuple(reversed(found)) if _is_pointwise(node) else ()
        if node.target not in NORMS:
            return ()
        node, reader = node.args[0], node
    return ()


def _is_pointwise(conv: fx.Node) -> bool:
    args: list[Any] = [*conv.args]
    shape = shape_of(args[1])
    strides, pads = (args[3] if len(args) > 3 else []), (args[4] if len(args) > 4 else [])
    strides, pads = ([n] if isinstance(n, int) else n for n in (strides, pads))
    plain = isinstance(pads, (list, tuple)) and not any(pads) and all(n == 1 for n in strides)
    return bool(plain and not conv.kwargs and shape and math.prod(shape[2:]) == 1)


def _is_what_zeros_give(
    tensors: tuple[_Constants, _Constants], layers: tuple[fx.Node, ...], border: fx.Node
) -> bool:
    """Whether the numbers of a border are those that some layers give for zeros."""
    own, exact = tensors
    written, given = own(border), _at_zero(own, layers)
    if written is None or given is None:
        return False
    written = written.reshape(-1)
    if torch.equal(written, given):
        return bool(torch.isfinite(given).all())
    value, law = exact(border), _law_at_zero(exact, layers)
    if value is None or law is None or value.dtype != torch.float64:
        return False
    value, (number, size) = value.reshape(-1), law
    if value.shape != number.shape:
        return False
    last = ROUNDING * size * torch.finfo(torch.float64).eps
    last_of_type = ROUNDING * size * torch.finfo(written.dtype).eps
    same = (value - number).abs() <= last
    return bool((same & ((written - value).abs() <= last_of_type)).all())


def _at_zero(constants: _Constants, layers: tuple[fx.Node, ...]) -> Tensor | None:
    """What some layers give for zeros, per channel, in their own type."""
    source: Any = layers[0].args[0]
    shape, kind = shape_of(source), type_of(source)
    if shape is None or shape[1] is None or kind is None:
        return None
    x: Tensor | None
    x = torch.zeros((1, shape[1], *[1] * (len(shape) - 2)), dtype=kind[0], device=kind[1])
    for node in layers:
        known = {n: constants(n) for n in node.all_input_nodes}
        known[node.args[0]] = x  # type: ignore[index]
        if any(value is None for value in known.values()):
            return None
        x = _run(node, known)
    return None if x is None else x.reshape(-1)


def _law_at_zero(
    constants: _Constants, layers: tuple[fx.Node, ...]
) -> tuple[Tensor, Tensor] | None:
    """The same by their formula, and the sum of the sizes of all that it adds up."""
    conv, *norms = layers
    weight: Any = constants(conv.args[1])
    bias = constants(conv.args[2]) if len(conv.args) > 2 else None
    number = weight.new_zeros(len(weight)) if bias is None else bias
    size = number.abs()
    for norm in norms:
        given: dict[str, Any] = dict(zip(NORMS[norm.target], norm.args, strict=False))
        mean, variance = constants(given["mean"]), constants(given["variance"])
        if norm.kwargs or given["training"] or mean is None or variance is None:
            return None
        weight, bias = constants(given["weight"]), constants(given["bias"])
        scale = torch.rsqrt(variance + given["eps"])
        scale = scale if weight is None else scale * weight
        shift = torch.zeros_like(mean) if bias is None else bias
        number = (number - mean) * scale + shift
        size = (size + mean.abs()) * scale.abs() + shift.abs()
    return number, size


def _rewrite(gm: fx.GraphModule, found: _Filled) -> None:
    first, pad = found.layers[0], found.pad
    with gm.graph.inserting_before(first):
        padded = gm.graph.node_copy(pad, lambda n: n)
    source: Any = first.args[0]
    padded.args, padded.kwargs = pad.args, dict(pad.kwargs)
    padded.replace_input_with(pad.args[0], source)  # type: ignore[arg-type]
    shape, before = shape_of(pad), shape_of(source)
    padded.meta = without_notes(pad)
    set_shape(padded, (*before[:2], *shape[2:]))
    first.args = (padded, *first.args[1:])
    for node in found.layers:
        set_shape(node, (*shape_of(node)[:2], *shape[2:]))
        forget(node)
    for write in found.writes:
        for node in reversed(write.nodes):
            gm.graph.erase_node(node)
    pad.replace_all_uses_with(found.layers[-1])
    gm.graph.erase_node(pad)
