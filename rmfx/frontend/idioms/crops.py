"""Slices and paddings by sizes become slices and paddings by numbers.

    x[:, :, -y.size(2):]    F.pad(x, (0, x.size(3) - y.size(3)))    x[..., 2:30] of a fixed size

Networks without padding cut a shortcut to the size of its branch. How much that is follows from the
layers between, whatever the size of the input: sizes are ⌊(H + a)/s⌋ of it, and where two of them
differ by a constant, that is the number.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from rmfx.algebra.affine import CONVS
from rmfx.ir.memo import on_demand
from rmfx.ir.net import Net
from rmfx.ir.nodes import must_stay, slice_by_slice
from rmfx.ir.notes import GUARDED, gives_number, noted, shape_of, sizes_of_every_call, why_frozen
from rmfx.ir.numbers import size_read
from rmfx.ir.reading import sizes_of

Sum = dict[object, int]  # sizes and how often each is added; under None, a constant


def crop_by_numbers(gm: fx.GraphModule) -> None:
    """Rewrite slices of space, and paddings, whose bounds are known for all sizes."""
    if not any(_is_candidate(node) for node in gm.graph.nodes):
        return
    numbers = _Numbers(Net(gm))
    own = dict(zip(numbers.net.graph.nodes, gm.graph.nodes, strict=True))
    for twin, node in own.items():
        if _is_candidate(node):
            twin.args, twin.kwargs = _bounded(numbers, twin)
            node.args, node.kwargs = fx.map_arg((twin.args, twin.kwargs), own.__getitem__)
        numbers.note_sizes(twin)
    gm.graph.eliminate_dead_code(is_impure_node=must_stay)


def _is_candidate(node: fx.Node) -> bool:
    if node.target not in (operator.getitem, F.pad) or why_frozen(node):
        return False
    by_numbers = any(gives_number(n) for n in node.all_input_nodes[1:])
    return by_numbers or GUARDED in node.meta


class _Numbers:
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
                self._smallest[_terms(known)] = min(
                    constant, self._smallest.get(_terms(known), constant)
                )

    def is_size(self, known: Sum) -> bool:
        """Whether a number is the size of a value, or that and more."""
        smallest = self._smallest.get(_terms(known))
        return smallest is not None and known.get(None, 0) >= smallest

    def __call__(self, value: object) -> Sum | None:
        if isinstance(value, fx.Node):
            return on_demand(value, self._known, self._deduce)
        return {None: value} if type(value) is int else None

    def size(self, value: fx.Node, dim: object) -> Sum | None:
        """One size of a value, None if it is not known."""
        rank = self.net.rank(value)
        if rank is None or not isinstance(dim, int) or not -rank <= dim < rank:
            return None
        dim %= rank
        known = sizes_of_every_call(value)
        if known is not None:
            return _of_expression(known[dim])
        law = sizes_of(self.net).law(value)
        if law is None or law.clips or law.agreed or dim < 2 or len(law.stride) != rank - 2:
            return None
        readers = [self.net.module(user) for user in law.source.users]
        if shape_of(value) is None and not any(type(m) in CONVS[1:] for m in readers):
            return None  # only a convolution wants a batch dimension
        growth, stride = law.growth[dim - 2], law.stride[dim - 2]
        return {(law.source, dim, stride, growth % stride): 1, None: growth // stride}

    def constant(self, value: object) -> int | None:
        """What a number is if it is the same at all sizes."""
        known = self(value)
        return None if known is None else _constant(known)

    def _deduce(self, node: fx.Node) -> Sum | None:
        value, dim = size_read(node)
        if value is not None:
            return self.size(value, dim)
        if isinstance(noted(node), torch.SymInt):
            return _of_expression(noted(node))
        terms = [self._known[a] if isinstance(a, fx.Node) else self(a) for a in node.args]
        known = [term for term in terms if term is not None]
        if not gives_number(node) or node.kwargs or len(known) != len(node.args):
            return None
        if node.target is operator.neg:
            return _sum({}, known[0], -1)
        if node.target in (operator.add, operator.sub):
            return _sum(known[0], known[1], 1 if node.target is operator.add else -1)
        numbers = [_constant(term) for term in known]
        if node.target is operator.floordiv and numbers[1] and numbers[0] is not None:
            return {None: numbers[0] // numbers[1]}
        return None


def _of_expression(size: int | torch.SymInt) -> Sum | None:
    """A size as they know it."""
    if isinstance(size, int):
        return {None: size}
    terms = size.node.expr.as_coefficients_dict()
    if not all(factor.is_Integer for factor in terms.values()):
        return None
    return {None if term == 1 else term: int(factor) for term, factor in terms.items()}


def _sum(a: Sum, b: Sum, factor: int) -> Sum:
    keys = {**a, **b}
    return {key: a.get(key, 0) + factor * b.get(key, 0) for key in keys}


def _terms(known: Sum) -> frozenset[tuple[object, int]]:
    return frozenset((key, count) for key, count in known.items() if count and key is not None)


def _constant(known: Sum) -> int | None:
    return None if _terms(known) else known.get(None, 0)


def _bounded(numbers: _Numbers, node: fx.Node) -> tuple[Any, Any]:
    """The arguments of a slice or a padding, with numbers where they are known."""
    if node.target is F.pad:

        def number(value: fx.Node) -> Any:
            found = numbers.constant(value) if gives_number(value) else None
            return value if found is None else found

        return fx.map_arg((node.args, node.kwargs), number)
    x: Any
    index: Any
    x, index = node.args
    rank = numbers.net.rank(x) if isinstance(x, fx.Node) else None
    index = index if isinstance(index, tuple) else (index,)
    slices = [i for i in index if isinstance(i, slice)]
    if rank is None or len(slices) + index.count(...) != len(index) or index.count(...) > 1:
        return node.args, node.kwargs
    whole = slice_by_slice(index, rank)
    bounded = [_slice(numbers, x, dim, s) for dim, s in enumerate(whole)]
    return (node.args, node.kwargs) if bounded == whole else ((x, tuple(bounded)), {})


def _slice(numbers: _Numbers, x: fx.Node, dim: int, s: slice) -> slice:
    """A slice that begins with a number from the front and ends with one from the back."""
    whole = numbers.size(x, dim)
    if dim < 2 or whole is None or not isinstance(s.step, int | None):
        return s
    size = _constant(whole)
    if size is None:
        start, stop = _bound(numbers, s.start, whole, 1), _bound(numbers, s.stop, whole, -1)
        return slice(start, stop, s.step)
    bounds = [numbers.constant(b) for b in (s.start, s.stop)]
    if any(b is not None and n is None for b, n in zip((s.start, s.stop), bounds, strict=True)):
        return s
    begin, end, _ = slice(*bounds).indices(size)
    return slice(begin or None, (end - size) or None, s.step) if begin < end else s


def _bound(numbers: _Numbers, bound: Any, whole: Sum, sign: int) -> Any:
    """A bound as a number: how much is cut off.

    Where a slice begins at -y.size(2), or ends at y.size(2), it is that by which y is smaller.

    Args:
        sign: 1 for where a slice begins, -1 for where it ends.
    """
    known = numbers(bound)
    if known is None:
        return bound
    cut = _constant(_sum(whole, known, sign))
    if cut is not None and numbers.is_size(_sum({}, known, -sign)):
        return sign * max(cut, 0) or None
    constant = _constant(known)
    return bound if constant is None else constant
