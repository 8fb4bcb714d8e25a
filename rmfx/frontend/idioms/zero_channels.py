"""Zeros beside a value's channels become a padding, and numbers of channels become numbers.

Shortcuts of CIFAR ResNets and PyramidNets grow by channels of zeros, which people write as

    torch.cat((x, torch.zeros(n, c, h, w)), 1)
    torch.cat((x, x.mul(0)), 1)
    F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))

All are F.pad with a number that the layers fix, whatever the input; so is the number in

    x / math.sqrt(x.size(1))

A number that may follow from the size of the image stays as it is.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from rmfx.algebra.activation import is_activation
from rmfx.ir.kinds import ADDS, CHANNELWISE, SCALES, SUBS, is_a
from rmfx.ir.memo import on_demand
from rmfx.ir.notes import without_notes
from rmfx.options import is_number

aten = torch.ops.aten
LIKE = (torch.zeros_like, aten.zeros_like.default)
OF_SIZE = (torch.zeros, aten.zeros.default)
BY_METHOD = ("new_zeros", aten.new_zeros.default)
COPIES = (torch.clone, aten.clone.default, aten.detach.default, "clone", "detach", "contiguous")
PRODUCTS = (operator.mul, torch.mul)
OF_NUMBERS = (
    *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.neg),
    *(operator.truediv, operator.pow, math.sqrt),
)


@dataclass(frozen=True)
class Given:
    """What layers fix of a value: its channels, in dimension 1 of `dims` + 2."""

    channels: int
    dims: int


class Fixed:
    """What layers fix of each node's value: `Given`, a number for a number, None for nothing."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._modules = dict(gm.named_modules(remove_duplicate=False))
        self._known: dict[fx.Node, Given | float | None] = {}

    def __call__(self, node: fx.Node) -> Given | float | None:
        return on_demand(node, self._known, self._deduce)

    def resolved(self, value: Any) -> Any:
        """Arguments with the numbers that are fixed in the places of their nodes."""

        def number(node: fx.Node) -> Any:
            found = self(node)
            return node if found is None or isinstance(found, Given) else found

        return fx.map_arg(value, number)

    def _deduce(self, node: fx.Node) -> Given | float | None:
        if node.meta.get("number"):
            return self._number(node)
        found, shape = self._tensor(node), node.meta.get("shape")
        if found is None or shape is None:
            return found
        fits = len(shape) == found.dims + 2 and shape[1] in (None, found.channels)
        return found if fits else None

    def _number(self, node: fx.Node) -> float | None:
        value, index = size_read(node)
        given = self._known.get(value) if value is not None else None
        if isinstance(given, Given):
            return given.channels if index in (1, -1 - given.dims) else None
        if node.target not in OF_NUMBERS or node.kwargs:
            return None
        numbers = [self._known[a] if isinstance(a, fx.Node) else a for a in node.args]
        if not all(is_number(n) for n in numbers):
            return None
        try:
            value = node.target(*numbers)
        except (ArithmeticError, ValueError):  # it fails when the network runs, and not before
            return None
        return value if is_number(value) and math.isfinite(value) else None

    def _tensor(self, node: fx.Node) -> Given | None:
        tensors = [self._known[n] for n in node.all_input_nodes if not n.meta.get("number")]
        given = [one for one in tensors if isinstance(one, Given)]
        same = given[0] if given and all(one == given[0] for one in tensors) else None
        if node.op == "placeholder":
            return self._read_by(node)
        if node.op == "call_module":
            module = self._modules[str(node.target)]
            if is_a(module, nn.modules.conv._ConvNd):
                return Given(module.out_channels, len(module.kernel_size))
            return same if is_activation(module) or is_a(module, CHANNELWISE) else None
        if node.target in (*ADDS, *SUBS, *SCALES, *LIKE, *COPIES):
            return same
        if node.target in (*OF_SIZE, *BY_METHOD):
            return self._of_size(node)
        if node.target is operator.getitem and same:
            return self._sliced(node, same)
        return self._padded(node, same) if node.target is F.pad and same else None

    def _read_by(self, node: fx.Node) -> Given | None:
        """What a convolution demands of an input of the network."""
        for user in node.users:
            module: Any = self._modules[str(user.target)] if user.op == "call_module" else None
            if is_a(module, nn.modules.conv._ConvNd):
                return Given(module.in_channels, len(module.kernel_size))
        return None

    def _of_size(self, node: fx.Node) -> Given | None:
        """`zeros((n, c, h, w))`, `zeros(n, c, h, w)`, and the same as methods of a tensor."""
        sizes: Any = node.args[1:] if node.target in BY_METHOD else node.args
        if len(sizes) == 1 and isinstance(sizes[0], (list, tuple)):
            sizes = sizes[0]
        channels = self.resolved(sizes[1]) if len(sizes) > 2 else None
        return Given(channels, len(sizes) - 2) if isinstance(channels, int) else None

    def _sliced(self, node: fx.Node, given: Given) -> Given | None:
        index = self.resolved(node.args[1])
        if not isinstance(index, tuple) or not all(isinstance(s, slice) for s in index):
            return None
        chosen = index[1] if len(index) > 1 else slice(None)
        if not all(b is None or isinstance(b, int) for b in (chosen.start, chosen.stop)):
            return None
        if chosen.step not in (None, 1):
            return None
        return Given(len(range(given.channels)[chosen]), given.dims)

    def _padded(self, node: fx.Node, given: Given) -> Given | None:
        amounts = self.resolved(node.args[1] if len(node.args) > 1 else node.kwargs["pad"])
        more = amounts[2 * given.dims :]
        if not all(isinstance(n, int) for n in more) or any(more[2:]):
            return None
        return Given(given.channels + sum(more), given.dims)


def size_read(node: fx.Node) -> tuple[fx.Node | None, Any]:
    """Of which value a node reads a size, and of which dimension."""
    if node.target in ("size", aten.sym_size.int) and len(node.args) == 2:
        return node.args[0], node.args[1]  # type: ignore[return-value]
    whole, index = node.args if node.target is operator.getitem else (None, None)
    if not isinstance(whole, fx.Node):
        return None, None
    if whole.target is operator.getitem and isinstance(whole.args[1], slice):
        whole, index = _through(whole.args[1], whole.args[0], index)
    is_shape = whole.target is getattr and whole.args[1] == "shape"
    if is_shape or (whole.target == "size" and len(whole.args) == 1):
        return whole.args[0], index  # type: ignore[return-value]
    return None, None


def _through(part: slice, shape: Any, index: Any) -> tuple[Any, Any]:
    """A shape and a place in it, for a place in a part of it: x.shape[2:][1] is x.shape[3]."""
    start = part.start or 0
    numbers = isinstance(index, int) and isinstance(start, int) and part.step is None
    if not numbers or index < 0 or (start < 0 <= start + index):
        return shape, None
    return shape, start + index


def pad_for_zeros(gm: fx.GraphModule) -> None:
    """Rewrite concatenations with zeros; paddings, slices and scales by numbers that layers fix."""
    fixed = Fixed(gm)
    for node in list(gm.graph.nodes):
        if node.meta.get("frozen"):
            continue
        if node.target is F.pad or node.target is operator.getitem:
            node.args = (node.args[0], *fixed.resolved(node.args[1:]))
            node.kwargs = {k: fixed.resolved(v) for k, v in node.kwargs.items()}
        elif node.target is torch.cat:
            _pad(node, fixed)
        elif node.target in SCALES and not node.meta.get("number"):
            node.args = fixed.resolved(node.args)


def _pad(cat: fx.Node, fixed: Fixed) -> None:
    """Write a concatenation that begins or ends with zeros as a padding."""
    operands, dim = _operands(cat)
    zeros = [fixed(n) if _is_zero(n) else None for n in operands]
    kept = [i for i, given in enumerate(zeros) if not isinstance(given, Given)]
    given = next((g for g in zeros if isinstance(g, Given)), None)
    if given is None or not kept or dim not in (1, -1 - given.dims):
        return
    inner = operands[kept[0] : kept[-1] + 1]
    if len(inner) == len(operands) or not _keeps_type(cat, inner[0]):
        return
    before, after = (
        sum(g.channels for g in side if isinstance(g, Given))
        for side in (zeros[: kept[0]], zeros[kept[-1] + 1 :])
    )
    with cat.graph.inserting_before(cat):
        value = inner[0]
        if len(inner) > 1:
            value = cat.graph.call_function(torch.cat, (inner, 1))
            value.meta = without_notes(cat, "shape")
            shape = cat.meta.get("shape")
            if shape is not None:
                channels = None if shape[1] is None else shape[1] - before - after
                value.meta["shape"] = (shape[0], channels, *shape[2:])
        padded = cat.graph.call_function(F.pad, (value, (*[0] * 2 * given.dims, before, after)))
    padded.meta = dict(cat.meta)
    cat.replace_all_uses_with(padded)
    cat.graph.erase_node(cat)


def _operands(cat: fx.Node) -> tuple[list[fx.Node], Any]:
    """What is put together, none if that is not written out, and the dimension."""
    tensors = cat.args[0] if cat.args else cat.kwargs.get("tensors")
    dim = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
    if not isinstance(tensors, (list, tuple)):
        return [], dim
    nodes = [n for n in tensors if isinstance(n, fx.Node)]
    return ([] if any(n.meta.get("frozen") for n in nodes) else nodes), dim


def _is_zero(node: fx.Node) -> bool:
    """Whether a node gives zeros, for finite inputs."""
    while node.target in COPIES and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    if node.target in (*LIKE, *OF_SIZE, *BY_METHOD):
        return not node.meta.get("frozen")
    return node.target in PRODUCTS and any(type(a) in (int, float) and a == 0 for a in node.args)


def _keeps_type(cat: fx.Node, value: fx.Node) -> bool:
    """Whether zeros leave the type of what stands beside them, which example inputs tell."""
    kinds = [n.meta.get("dtype") for n in (cat, value)]
    return None not in kinds and kinds[0][0] == kinds[1][0]  # type: ignore[index]
