"""How the size of a map follows from the size of the network's input.

Layers map a size H to ⌊(H + a)/s⌋, and nested floors combine, so a map far inside a network has the
size ⌊(H + a)/s⌋ of some input, too. That turns a condition on an inner size into one that can be
checked at the door.

Pooling with `ceil_mode` rounds the size up, with a last window that hangs over the border. Where
(H + 2p − k) is a multiple of the stride no window does, and the pool is a convolution.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from operator import getitem
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from ._affine import AffineConv, Ints
from ._calls import AVERAGE_POOLS, each
from ._errors import Refusal
from ._infer import on_demand, succeed
from ._input_guard import SizeCondition

if TYPE_CHECKING:
    from ._graph import Net

MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
KEEP_SIZE = (torch.add, torch.sub, torch.mul, torch.div, torch.cat)


@dataclass(frozen=True)
class SizeLaw:
    """Spatial sizes ⌊(H + growth)/stride⌋ of the sizes H of an input.

    `clips` says that a slice is on the way, which gives 0 where that would be negative.
    """

    source: fx.Node
    stride: Ints
    growth: Ints
    clips: bool = field(default=False, compare=False)

    def through(self, stride: Ints, growth: Ints) -> SizeLaw:
        """The law behind a layer."""
        grown = tuple(a + s * g for a, s, g in zip(self.growth, self.stride, growth, strict=True))
        steps = tuple(s * t for s, t in zip(self.stride, stride, strict=True))
        return SizeLaw(self.source, steps, grown, self.clips)


class Sizes:
    """The size laws of the values of one net, computed on demand and kept."""

    def __init__(self, net: Net) -> None:
        self._net = net
        self._known: dict[fx.Node, SizeLaw | None] = {}

    def law(self, node: fx.Node) -> SizeLaw | None:
        """The size law of a value, None if it is not known."""
        return on_demand(node, self._known, self._compute)

    def succeed(self, node: fx.Node, other: fx.Node) -> None:
        """Take note that a node holds another one's value from now on."""
        succeed(self._known, node, other)

    def _compute(self, node: fx.Node) -> SizeLaw | None:
        from ._layers import is_tensor_node

        if node.op == "placeholder":
            rank = self._net.rank(node)
            dims = rank - 2 if rank else 0
            return SizeLaw(node, (1,) * dims, (0,) * dims) if dims > 0 else None
        inputs = [n for n in node.all_input_nodes if is_tensor_node(self._net, n)]
        if not inputs or node.meta.get("frozen"):
            return None
        if len(inputs) > 1:
            return self._of_largest(node, inputs) if node.target in KEEP_SIZE else None
        before = self._known[inputs[0]]
        return before and self._behind(node, before)

    def _of_largest(self, node: fx.Node, inputs: list[fx.Node]) -> SizeLaw | None:
        """Of a combination, which has the sizes of the operand that is not spread out."""
        laws = sorted((self._known[one] for one in inputs), key=lambda law: bool(law and law.clips))
        if len(set(laws)) == 1 and (node.target is not torch.cat or node.args[1] == 1):
            return laws[0]
        shape = node.meta.get("shape", (None,) * 3)
        for one in inputs:
            if None not in shape[2:] and one.meta.get("shape", ())[2:] == shape[2:]:
                return self._known[one]
        return None

    def _behind(self, node: fx.Node, before: SizeLaw) -> SizeLaw | None:
        from ._layers import Border, Deferred, read

        module: Any = self._net.module(node)
        if type(module) in MAX_POOLS:
            dims = MAX_POOLS.index(type(module)) + 1
            fits = dims == len(before.stride) and not module.ceil_mode
            return _behind_pool(module, before) if fits else None
        element = read(self._net, node)
        if isinstance(element, Deferred):
            dims = len(before.stride)
            channels = self._net.channels(node.all_input_nodes[0], dims)
            element = element.build(channels, dims) if channels else Refusal("")
        if isinstance(element, Border):
            element = element.affine(1)
        if isinstance(element, Refusal):
            return None
        if not isinstance(element, AffineConv):
            return before
        if element.dims != len(before.stride):
            return None
        clips = before.clips or (node.target is getitem and min(element.growth) < 0)
        return replace(before.through(element.stride, element.growth), clips=clips)


def _behind_pool(pool: nn.Module, before: SizeLaw) -> SizeLaw:
    dims = len(before.stride)
    kernel, stride, padding, dilation = (
        each(getattr(pool, name), dims) for name in ("kernel_size", "stride", "padding", "dilation")
    )
    growth = tuple(
        2 * p - d * (k - 1) - 1 + s
        for k, s, p, d in zip(kernel, stride, padding, dilation, strict=True)
    )
    return before.through(stride, growth)


def conditions_of(net: Net, node: fx.Node) -> tuple[SizeCondition, ...] | Refusal:
    """The input sizes for which a node is the linear layer that it is read as."""
    pool: Any = net.module(node)
    if type(pool) not in AVERAGE_POOLS or not pool.ceil_mode:
        return ()
    dims = AVERAGE_POOLS.index(type(pool)) + 1
    names = ("kernel_size", "stride", "padding")
    kernel, stride, padding = (each(getattr(pool, name), dims) for name in names)
    law = net.sizes.law(node.all_input_nodes[0])
    shape = node.all_input_nodes[0].meta.get("shape")
    if law is None or shape is None or len(law.stride) != dims:
        return Refusal(
            "average pooling with ceil_mode=True averages fewer values at the border of maps of "
            "some sizes; pass example_inputs of a size at which it does not"
        )
    position = net.graph.find_nodes(op="placeholder").index(law.source)
    found = []
    for i, (k, s, p) in enumerate(zip(kernel, stride, padding, strict=True)):
        if s == 1:
            continue
        size = shape[i + 2]
        if size is None or (size + 2 * p - k) % s:
            known = "an unknown size" if size is None else f"size {size}"
            return Refusal(
                "average pooling with ceil_mode=True averages fewer values at the border of maps "
                f"of {known}"
            )
        growth = law.growth[i] + law.stride[i] * (2 * p - k)
        found.append(SizeCondition(position, i + 2, law.stride[i], growth, s, node.name))
    return tuple(found)
