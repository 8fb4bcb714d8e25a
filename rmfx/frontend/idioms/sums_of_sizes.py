"""Numbers of a graph as sums of the sizes of its values, which hold at all sizes of the input.

Sizes are ⌊(H + a)/s⌋ of an input's, so two numbers that are computed in different ways may be seen
to be equal, or to differ by a constant.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from rmfx.algebra.affine import CONVS
from rmfx.ir.memo import on_demand
from rmfx.ir.net import Net
from rmfx.ir.notes import gives_number, noted, shape_of, sizes_of_every_call
from rmfx.ir.numbers import size_read
from rmfx.ir.reading import sizes_of

Sum = dict[object, int]  # sizes and how often each is added; under None, a constant


class Numbers:
    """Numbers of a graph as sums of sizes."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self._known: dict[fx.Node, Sum | None] = {}
        self._smallest: dict[frozenset[tuple[object, int]], int] = {}

    def note_sizes(self, value: fx.Node) -> None:
        """Take note of sizes that the graph computes, which are not negative."""
        rank = None if gives_number(value) else self.net.rank(value)
        for dim in range(2, rank or 0):
            known = self.size(value, dim)
            if known is not None:
                constant = known.get(None, 0)
                self._smallest[terms(known)] = min(
                    constant, self._smallest.get(terms(known), constant)
                )

    def is_size(self, known: Sum) -> bool:
        """Whether a number is the size of a value, or that and more."""
        smallest = self._smallest.get(terms(known))
        return smallest is not None and known.get(None, 0) >= smallest

    def __call__(self, value: object) -> Sum | None:
        if isinstance(value, fx.Node):
            return on_demand(value, self._known, self._deduce)
        return {None: value} if type(value) is int else None

    def size(self, value: fx.Node, dim: object, *, clipped: bool = False) -> Sum | None:
        """One size of a value, None if it is not known.

        Args:
            clipped: whether it may be 0 where the sum is negative, as behind a slice.
        """
        rank = self.net.rank(value)
        if rank is None or not isinstance(dim, int) or not -rank <= dim < rank:
            return None
        dim %= rank
        known = sizes_of_every_call(value)
        if known is not None:
            return _of_expression(known[dim])
        found = law_of(self.net, value, dim, clipped=clipped)
        return None if found is None else size_behind(*found)

    def constant(self, value: object) -> int | None:
        """What a number is if it is the same at all sizes."""
        known = self(value)
        return None if known is None else constant_of(known)

    def _deduce(self, node: fx.Node) -> Sum | None:
        value, dim = size_read(node)
        if value is not None:
            return self.size(value, dim)
        if isinstance(noted(node), torch.SymInt):
            return _of_expression(noted(node))
        given = [self._known[a] if isinstance(a, fx.Node) else self(a) for a in node.args]
        known = [one for one in given if one is not None]
        if not gives_number(node) or node.kwargs or len(known) != len(node.args):
            return None
        if node.target is operator.neg:
            return added({}, known[0], -1)
        if node.target in (operator.add, operator.sub):
            return added(known[0], known[1], 1 if node.target is operator.add else -1)
        numbers = [constant_of(term) for term in known]
        if node.target is operator.floordiv and numbers[1]:
            return _divided(known[0], numbers[1])
        if node.target is operator.mul and numbers != [None, None]:
            factor, place = (numbers[0], 1) if numbers[1] is None else (numbers[1], 0)
            return added({}, known[place], factor or 0)
        return None


def _divided(known: Sum, by: int) -> Sum | None:
    """A number over another one, rounded down; nested floors of one size combine."""
    sizes = terms(known)
    if all(count % by == 0 for _, count in sizes):
        return {None: known.get(None, 0) // by} | {key: count // by for key, count in sizes}
    (key, count), *others = sizes
    if others or count != 1 or by < 1 or not isinstance(key, tuple):
        return None
    source, dim, stride, growth = key
    growth += stride * known.get(None, 0)
    return size_behind(source, dim, stride * by, growth)


def law_of(
    net: Net, value: fx.Node, dim: int, *, clipped: bool = False
) -> tuple[fx.Node, int, int, int] | None:
    """A size as ⌊(H + growth)/stride⌋ of one of another value: that, dimension, stride, growth.

    Args:
        net, value, dim: which size of which value is meant.
        clipped: whether it may be 0 where that is negative, as behind a slice.
    """
    law = sizes_of(net).law(value)
    if law is None or law.agreed or dim < 2 or len(law.stride) + 2 != net.rank(value):
        return None
    if law.clips and not clipped:
        return None
    readers = [net.module(user) for user in law.source.users]
    if shape_of(value) is None and not any(type(m) in CONVS[1:] for m in readers):
        return None  # only a convolution wants a batch dimension
    return law.source, dim, law.stride[dim - 2], law.growth[dim - 2]


def size_behind(source: fx.Node, dim: int, stride: int, growth: int) -> Sum:
    """The size ⌊(H + growth)/stride⌋ for a size H of a value."""
    return {(source, dim, stride, growth % stride): 1, None: growth // stride}


def _of_expression(size: int | torch.SymInt) -> Sum | None:
    """A size as they know it."""
    if isinstance(size, int):
        return {None: size}
    found = size.node.expr.as_coefficients_dict()
    if not all(factor.is_Integer for factor in found.values()):
        return None
    return {None if term == 1 else term: int(factor) for term, factor in found.items()}


def added(a: Sum, b: Sum, factor: int) -> Sum:
    """a + factor·b."""
    keys = {**a, **b}
    return {key: a.get(key, 0) + factor * b.get(key, 0) for key in keys}


def terms(known: Sum) -> frozenset[tuple[object, int]]:
    """The sizes in a sum, without those that cancel out."""
    return frozenset((key, count) for key, count in known.items() if count and key is not None)


def constant_of(known: Sum) -> int | None:
    """What a sum is if no size is in it."""
    return None if terms(known) else known.get(None, 0)
