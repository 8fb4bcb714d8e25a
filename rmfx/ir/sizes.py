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

import itertools
from collections.abc import Callable, Set
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
from .conditions import Agreement, Condition, Multiple
from .elements import Interpolation
from .kinds import (
    AVERAGE_POOLS,
    MAX_POOLS,
    POOL_DIMS,
    POOLS_OF_ALL,
    SPREADING,
)
from .last_sizes import last_size
from .memo import on_demand, succeed
from .net import Net
from .nodes import averaged_dims, each, is_tensor_node
from .notes import shape_of, sizes_of_every_call, why_frozen
from .size_keeping import keeps_sizes, meets, meets_constant

SUMS = (torch.add, torch.sub)
UNKNOWN_SIZES = (
    "the sizes of branch and shortcut agree for some input sizes only, and for which is not known"
)


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
        large = {law for law in laws if law is None or not _is_one_position(self.net, law)}
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


def conditions_of(sizes: Sizes, node: fx.Node) -> tuple[Condition, ...] | Refusal:
    """The input sizes for which a node is the linear layer, or the combination, it is read as."""
    if node.target in SPREADING:
        return agreements(sizes, node)
    pool: Any = sizes.net.module(node)
    if type(pool) not in AVERAGE_POOLS or not pool.ceil_mode:
        return ()
    dims = POOL_DIMS[type(pool)]
    names = ("kernel_size", "stride", "padding")
    kernel, stride, padding = (each(getattr(pool, name), dims) for name in names)
    law = sizes.law(node.all_input_nodes[0])
    shape = shape_of(node.all_input_nodes[0])
    if law is None or law.source.op != "placeholder" or not shape or len(law.stride) != dims:
        return Refusal(
            "average pooling with ceil_mode=True averages fewer values at the border of maps of "
            "some sizes; pass example_inputs of a size at which it does not"
        )
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
        found.append(Multiple(law.source, i - dims, node.name, law.stride[i], growth, s))
    behind = _all_agree(sizes, law.agreed) if found else ()
    return behind if isinstance(behind, Refusal) else (*found, *behind)


def agreements(sizes: Sizes, node: fx.Node) -> tuple[Condition, ...] | Refusal:
    """The input sizes at which the tensors that a node combines have equal sizes.

    Nothing is demanded where they are equal at all sizes, nor where they follow from sizes of their
    own, as those of a gate do, nor of what is spread out at the example's sizes already. Where
    other combinations are on the way, of which only one operand's size is known to follow so, it is
    demanded of them, too.
    """
    return _all_agree(sizes, {node})


def _all_agree(sizes: Sizes, nodes: Set[fx.Node]) -> tuple[Condition, ...] | Refusal:
    """The same of several nodes, and of those on the way."""
    found: list[Condition] = []
    seen, waiting = {*nodes}, sorted(nodes)
    while waiting:
        agreed = _agreed(sizes, waiting.pop())
        if isinstance(agreed, Refusal):
            return agreed
        conditions, others = agreed
        found += conditions
        waiting += sorted(others - seen)
        seen |= others
    return tuple(found)


def _agreed(sizes: Sizes, node: fx.Node) -> tuple[list[Condition], frozenset[fx.Node]] | Refusal:
    """The same of one node, and the combinations on the way of which it has to be demanded."""
    read = [x for x in node.all_input_nodes if is_tensor_node(x)]
    laws = [sizes.law(x) for x in read]
    known = [law for law in laws if law is not None]
    if len(laws) < 2:
        return [], frozenset()
    if len(known) < len(laws):
        fixed = all(sizes_of_every_call(x) is not None for x in read)
        return ([], frozenset()) if fixed else Refusal(UNKNOWN_SIZES)
    found: list[Condition] = []
    others: frozenset[fx.Node] = frozenset()
    for (x, first), (y, second) in itertools.pairwise(zip(read, known, strict=True)):
        shapes = [shape_of(one) for one in (x, y)]
        if None not in shapes and shapes[0][2:] != shapes[1][2:]:
            continue
        if len(first.stride) != len(second.stride):
            continue
        if first.source is not second.source:
            sources = (first.source, second.source)
            if all(sizes_of_every_call(x) is not None for x in sources) or node.target not in SUMS:
                continue
            if any(x.op != "placeholder" for x in sources):
                return Refusal(UNKNOWN_SIZES)
            found += _of_two(node, first, second)
            others |= first.agreed | second.agreed
            continue
        different = [i for i in range(len(first.stride)) if _at(first, i) != _at(second, i)]
        others |= first.agreed | second.agreed if different else first.agreed ^ second.agreed
        if different and first.source.op != "placeholder":
            if sizes_of_every_call(first.source) is None:
                return Refusal(UNKNOWN_SIZES)
            continue
        for i in different:
            pairs = tuple(zip(_at(first, i), _at(second, i), strict=True))
            dim = i - len(first.stride)
            found.append(Agreement(first.source, dim, node.name, pairs[0], pairs[1]))
    return found, others


def may_spread(sizes: Sizes, node: fx.Node, value: fx.Node) -> bool:
    """Whether combining a value with others may spread it out over space at some sizes.

    Not where another one has the value's own size, or one position, whatever the network's inputs
    are, nor where the result demands that sizes agree, or is called at the example's alone.
    """
    others = [x for x in node.all_input_nodes if is_tensor_node(x) and x is not value]
    if meets_constant(sizes.net, node) and sizes_of_every_call(value) is None:
        return True
    return any(
        any(sizes_of_every_call(x) is None for x in (value, other))
        and not _is_within(sizes, node, value, other)
        for other in others
    )


def _is_within(sizes: Sizes, node: fx.Node, value: fx.Node, other: fx.Node) -> bool:
    """Whether a value is never smaller than another one that a node combines it with."""
    law, found = sizes.law(value), sizes.law(other)
    if law is None or found is None or len(found.stride) != len(law.stride):
        return False
    if found == law:
        return found.agreed == law.agreed or _may_demand(sizes, node)
    if _is_one_position(sizes.net, found):
        return True
    shapes = [shape_of(x)[2:] for x in (value, other) if shape_of(x) is not None]
    of_inputs = all(one.source.op == "placeholder" for one in (law, found))
    same_source = law.source is found.source or node.target in SUMS
    # The result then demands that they agree, unless the example's are not equal themselves.
    equal = len(shapes) < 2 or shapes[0] == shapes[1]
    return of_inputs and same_source and equal and _may_demand(sizes, node)


def _may_demand(sizes: Sizes, node: fx.Node) -> bool:
    """Whether a result can demand sizes at which what a node combines agrees, and so on the way."""
    return not isinstance(agreements(sizes, node), Refusal)


def _is_one_position(net: Net, law: SizeLaw) -> bool:
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


def _of_two(node: fx.Node, first: SizeLaw, second: SizeLaw) -> list[Condition]:
    """That the sizes that follow from two inputs are equal."""
    found: list[Condition] = []
    for i, (a, b) in enumerate(zip(first.stride, second.stride, strict=True)):
        growths = (first.growth[i], second.growth[i])
        dim = i - len(first.stride)
        found.append(Agreement(first.source, dim, node.name, (a, b), growths, second.source))
    return found


def _at(law: SizeLaw, dim: int) -> tuple[int, int]:
    return law.stride[dim], law.growth[dim]
