"""How the size of a map follows from the size of the network's input.

Layers map a size H to ⌊(H + a)/s⌋, and nested floors combine, so a map far inside a network has the
size ⌊(H + a)/s⌋ of some input, too. That turns a condition on an inner size into one that can be
checked at the door. Two of them are needed: that an inner size is a multiple of a number, and that
two operands have equal sizes. Where they have not, and one of them is 1, a sum spreads it out,
which no convolution does.

Behind a layer that changes sizes in another way, sizes follow from those of its result.

Pooling with `ceil_mode` rounds the size up, with a last window that hangs over the border. Where
(H + 2p − k) is a multiple of the stride no window does, and the pool is a convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from operator import getitem
from typing import Any

import torch
from torch import fx, nn

from rmfx.algebra.affine import CONVS, Ints
from rmfx.algebra.layer import Layer
from rmfx.algebra.modules import from_conv
from rmfx.errors import Refusal

from .callees import is_touched
from .elements import Interpolation
from .kinds import MAX_POOLS, POOL_DIMS, POOLS_OF_ALL
from .last_sizes import last_size
from .memo import on_demand, succeed
from .net import Net
from .nodes import averaged_dims, each, is_tensor_node
from .notes import shape_of, why_frozen
from .size_keeping import keeps_sizes, meets


@dataclass(frozen=True)
class SizeLaw:
    """Spatial sizes ⌊(H + growth)/stride⌋ of the sizes H of an input.

    Attributes:
        source: the input.
        stride, growth: per spatial dimension.
        clips: whether a slice is on the way, which gives 0 where that would be negative.
        agreed: combinations on the way whose operands have equal sizes at the example's, though not
            at all: where they do not agree, one may be spread out, and the law does not hold.
    """

    source: fx.Node
    stride: Ints
    growth: Ints
    clips: bool = field(default=False, compare=False)
    agreed: frozenset[fx.Node] = field(default=frozenset(), compare=False)

    def through(self, stride: Ints, growth: Ints) -> SizeLaw:
        """The law behind a layer."""
        grown = tuple(a + s * g for a, s, g in zip(self.growth, self.stride, growth, strict=True))
        steps = tuple(s * t for s, t in zip(self.stride, stride, strict=True))
        return replace(self, stride=steps, growth=grown)


Reader = Callable[[Net, fx.Node], Layer | Refusal]


class Sizes:
    """The size laws of the values of one net, computed on demand and kept.

    Args:
        net: the net.
        read: what a node means, as far as its sizes go.
    """

    def __init__(self, net: Net, read: Reader) -> None:
        self.net = net
        self._read = read
        self._known: dict[fx.Node, SizeLaw | None] = {}

    def law(self, node: fx.Node) -> SizeLaw | None:
        """The size law of a value, None if it is not known."""
        return on_demand(node, self._known, self._compute)

    def note(self, node: fx.Node, other: fx.Node) -> None:
        """Take note that a value has the sizes of another one."""
        self._known[node] = self.law(other)

    def succeed(self, node: fx.Node, other: fx.Node) -> None:
        """Take note that a node holds another one's value from now on."""
        succeed(self._known, node, other)

    def _compute(self, node: fx.Node) -> SizeLaw | None:
        if node.op == "placeholder":
            return self._of_its_own(node)
        inputs = [n for n in node.all_input_nodes if is_tensor_node(n)]
        found = None
        if node.target == "expand_as" and len(inputs) > 1:  # it has the sizes of the second one
            found = self._known[inputs[1]]
        elif len(inputs) > 1 and meets(self.net, node):
            found = self._of_largest(node, inputs)
        elif len(inputs) == 1 and not why_frozen(node):
            before = self._known[inputs[0]]
            found = before and self._behind(node, before)
        return found or ((self._of_positions(node) or self._of_its_own(node)) if inputs else None)

    def _of_positions(self, node: fx.Node) -> SizeLaw | None:
        """The sizes of a mask that is made of the numbers of the positions of another value."""
        place = last_size(self.net, node) if self.net.rank(node) == 3 else None
        if place is None or place[0] is None or place[1] not in (2, -1):
            return None
        found = self._known.get(place[0])
        return found if found is not None and len(found.stride) == 1 else None

    def _of_its_own(self, node: fx.Node) -> SizeLaw | None:
        """The sizes of a value that follow from no others: by them we know those behind it."""
        rank = self.net.rank(node)
        dims = rank - 2 if rank else 0
        return SizeLaw(node, (1,) * dims, (0,) * dims) if dims > 0 else None

    def _of_largest(self, node: fx.Node, inputs: list[fx.Node]) -> SizeLaw | None:
        """Of a combination, which has the sizes of the operand that is not spread out."""
        laws = sorted((self._known[one] for one in inputs), key=lambda law: bool(law and law.clips))
        if len(set(laws)) == 1 and (node.target is not torch.cat or node.args[1] == 1):
            agreed = frozenset().union(*(law.agreed for law in laws if law))
            return laws[0] and replace(laws[0], agreed=agreed)
        large = {law for law in laws if law is None or not is_one_position(self.net, law)}
        if len(large) == 1 and node.target is not torch.cat:
            return large.pop()
        shape = shape_of(node, (None,) * 3)
        for one in inputs:
            law = self._known[one]
            if law and None not in shape[2:] and shape_of(one, ())[2:] == shape[2:]:
                # What is concatenated is never spread out.
                here = {node} if node.target is not torch.cat else {}
                return replace(law, agreed=law.agreed.union(here))
        return None

    def _behind(self, node: fx.Node, before: SizeLaw) -> SizeLaw | None:
        module: Any = self.net.module(node)
        if type(module) in MAX_POOLS:
            dims = POOL_DIMS[type(module)]
            fits = dims == len(before.stride) and not module.ceil_mode
            return _behind_pool(module, before) if fits else None
        if keeps_sizes(self.net, node) and not (module is not None and is_touched(module)):
            return before
        element: Any = self._read(self.net, node)
        if isinstance(element, Refusal) and type(module) in CONVS and not is_touched(module):
            element = from_conv(module)  # which may be shared: its geometry is the same
        if not isinstance(element, Refusal):
            dims = len(before.stride)
            channels = self.net.channels(node.all_input_nodes[0], dims)
            element = element.resolved(channels, dims)
        if isinstance(element, (Refusal, Interpolation)):
            return None
        element = element.geometry(1)
        if element is None:
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


def is_one_position(net: Net, law: SizeLaw) -> bool:
    """Whether values of such a size have one position in space, at all sizes of the inputs."""
    behind = {(1 + a) // s for a, s in zip(law.growth, law.stride, strict=True)}
    return behind == {1} and _has_one_position(net, law.source, len(law.stride))


def _has_one_position(net: Net, node: fx.Node, dims: int) -> bool:
    """Whether a value has one position in space at all sizes of the network's inputs."""
    module: Any = net.module(node)
    if type(module) in POOLS_OF_ALL:
        return set(each(module.output_size, dims)) == {1}
    if averaged_dims(node, dims) == ({*range(2, dims + 2)}, True):
        return True
    shape = shape_of(node)
    if shape is None or {*shape[2:]} != {1}:
        return False
    return all(net.is_sure(node, dim) for dim in range(2, len(shape)))
