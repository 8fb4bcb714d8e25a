"""At which sizes of the network's inputs a node is what it is read as.

An average pool with `ceil_mode` is a convolution where its last window does not hang over, operands
meet where their sizes agree: conditions on inner sizes, which laws of sizes bring to the inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Set
from typing import Any

from torch import fx

from rmfx.errors import Refusal

from .conditions import Agreement, Condition, Multiple
from .kinds import (
    ADDITIVE,
    AVERAGE_POOLS,
    POOL_DIMS,
    SPREADING,
)
from .nodes import each, is_tensor_node
from .notes import shape_of, sizes_of_every_call
from .size_keeping import meets_constant
from .sizes import SizeLaw, Sizes, is_one_position

UNKNOWN_SIZES = (
    "the sizes of branch and shortcut agree for some input sizes only, and for which is not known"
)
UNEQUAL_SIZES = "branch and shortcut have equal sizes at no input size: one is spread out"


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
            if (
                all(sizes_of_every_call(x) is not None for x in sources)
                or node.target not in ADDITIVE
            ):
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
        if not all(_may_be_equal(_at(first, i), _at(second, i)) for i in different):
            return Refusal(UNEQUAL_SIZES)
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
    if is_one_position(sizes.net, found):
        return True
    shapes = [shape_of(x)[2:] for x in (value, other) if shape_of(x) is not None]
    of_inputs = all(one.source.op == "placeholder" for one in (law, found))
    same_source = law.source is found.source or node.target in ADDITIVE
    # The result then demands that they agree, unless the example's are not equal themselves.
    equal = len(shapes) < 2 or shapes[0] == shapes[1]
    return of_inputs and same_source and equal and _may_demand(sizes, node)


def _may_demand(sizes: Sizes, node: fx.Node) -> bool:
    """Whether a result can demand sizes at which what a node combines agrees, and so on the way."""
    return not isinstance(agreements(sizes, node), Refusal)


def _of_two(node: fx.Node, first: SizeLaw, second: SizeLaw) -> list[Condition]:
    """That the sizes that follow from two inputs are equal."""
    found: list[Condition] = []
    for i, (a, b) in enumerate(zip(first.stride, second.stride, strict=True)):
        growths = (first.growth[i], second.growth[i])
        dim = i - len(first.stride)
        found.append(Agreement(first.source, dim, node.name, (a, b), growths, second.source))
    return found


def _may_be_equal(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether ⌊(n + growth)/stride⌋ is the same positive number k for some size n.

    For a k it is s·k ≤ n + g < s·(k + 1) and t·k ≤ n + h < t·(k + 1): two ranges of n that meet
    where (t - s)·k lies between h - g - t and h - g + s.
    """
    (s, g), (t, h) = sorted((one, other))
    if s == t:
        return abs(g - h) < s
    least = -((g - h + t - 1) // (t - s))
    return max(1, least) <= (h - g + s - 1) // (t - s)


def _at(law: SizeLaw, dim: int) -> tuple[int, int]:
    return law.stride[dim], law.growth[dim]
