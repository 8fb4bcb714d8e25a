"""Sizes of a graph's values as products of sizes that vary with the inputs.

Two sizes are the same if both are the same number at all sizes of the inputs, or the layers between
make both ⌊(H + a)/s⌋ of one size H. Batches are the same where the layers between keep them.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from rmfx.algebra.activation import is_activation
from rmfx.ir.fillings import COPIES
from rmfx.ir.kinds import ELEMENTWISE, KEEPING_BATCH, is_a
from rmfx.ir.memo import on_demand
from rmfx.ir.net import Net
from rmfx.ir.nodes import averaged_dims, is_tensor_node
from rmfx.ir.notes import gives_number, noted, shape_of, sizes_of_every_call
from rmfx.ir.numbers import size_read

from .layouts import ONE, Size
from .sums_of_sizes import law_of


class AxisSizes:
    """The sizes of values, and numbers that are computed of them.

    Args:
        net: whose values they are.
    """

    def __init__(self, net: Net) -> None:
        self._net = net
        self._given: dict[fx.Node, tuple[Size, ...]] = {}
        self._batches: dict[fx.Node, Hashable] = {}
        self._examples: dict[Hashable, int] = {}

    def note(self, node: fx.Node, sizes: tuple[Size, ...]) -> None:
        """Take note of the sizes of a value, which nobody else could tell."""
        self._given[node] = sizes

    def all_of(self, node: fx.Node) -> tuple[Size, ...] | None:
        """Every size of a value, None if its number of dimensions is unknown."""
        if node in self._given:
            return self._given[node]
        rank = self._net.rank(node)
        return None if rank is None else tuple(self._size(node, dim) for dim in range(rank))

    def number(self, value: object) -> Size | None:
        """A number that the graph computes, None if it is not known to be such a product."""
        if type(value) is int:
            return Size(value) if value > 0 else None
        if not isinstance(value, fx.Node) or not gives_number(value):
            return None
        if isinstance(noted(value), (int, torch.SymInt)):
            return _of_expression(noted(value))
        source, dim = size_read(value)
        if source is not None:
            sizes = self.all_of(source)
            fits = sizes is not None and type(dim) is int and -len(sizes) <= dim < len(sizes)
            return sizes[dim] if fits else None  # type: ignore[index]
        terms = [self.number(a) for a in value.args]
        if len(terms) != 2 or None in terms or value.kwargs:
            return None
        first: Any
        second: Any
        first, second = terms
        if value.target is operator.mul:
            return first * second  # type: ignore[no-any-return]
        return first.over(second) if value.target is operator.floordiv else None

    def example(self, size: Size) -> int | None:
        """What a size is for the example, None if nobody knows."""
        found = size.number
        for symbol, power in size.powers:
            if symbol not in self._examples:
                return None
            found *= self._examples[symbol] ** power
        return found

    # ---- one size -----------------------------------------------------------------------------

    def _size(self, node: fx.Node, dim: int) -> Size:
        known, shape = sizes_of_every_call(node), shape_of(node)
        if known is not None:
            return _of_expression(known[dim]) or Size.of((node, dim))
        if shape is not None and shape[dim] is not None and self._net.is_sure(node, dim):
            return Size(shape[dim]) if shape[dim] else Size.of((node, dim))
        facts, rank = self._net.facts(node), self._net.rank(node)
        is_last = facts.last and rank is not None and dim == rank - 1
        if facts.channels is not None and (is_last or facts.has_channels_in(dim)):
            return Size(facts.channels)
        symbol = self.batch(node) if dim == 0 else law_of(self._net, node, dim) or (node, dim)
        if shape is not None and shape[dim] is not None:
            self._examples.setdefault(symbol, shape[dim])
        return Size.of(symbol)

    def batch(self, node: fx.Node) -> Hashable:
        """Equal for values of equally many samples."""

        def deduce(node: fx.Node) -> Hashable:
            found = {self._batch_of_source(n) for n in self._of_equal_batch(node)}
            return found.pop() if len(found) == 1 else (node, 0)

        def unknown(node: fx.Node) -> list[fx.Node]:
            return [n for n in self._of_equal_batch(node) if n not in self._given]

        return on_demand(node, self._batches, deduce, unknown)

    def _batch_of_source(self, node: fx.Node) -> Hashable:
        sizes = self._given.get(node)
        if sizes is None:
            return self._batches[node]
        powers = sorted(sizes[0].powers, key=str) if sizes else []
        is_plain = len(powers) == 1 and sizes[0] == Size.of(powers[0][0])
        return powers[0][0] if is_plain else (node, 0)

    def _of_equal_batch(self, node: fx.Node) -> list[fx.Node]:
        """The values that a node reads and that have as many samples as its own, if any do."""
        if node.op == "placeholder":
            return []
        sources = [n for n in node.all_input_nodes if is_tensor_node(n)]
        rank = self._net.rank(node)
        if rank is None or rank < 2:
            return []
        module = self._net.module(node)
        if module is not None:
            keeps = is_activation(module) or is_a(module, KEEPING_BATCH)
            return sources if keeps and len(sources) == 1 else []
        if node.target in ELEMENTWISE.values():
            return [n for n in sources if not self._is_spread(n, rank)]
        if node.target is torch.cat:
            return sources if isinstance(node.args[1], int) and node.args[1] > 0 else []
        before = self._net.rank(sources[0]) if sources else None
        if averaged_dims(node, (before or 0) - 2) is not None or node.target in COPIES:
            return sources
        if node.target is operator.getitem:
            index: Any = node.args[1]
            first = index[0] if isinstance(index, tuple) and index else index
            return sources if first == slice(None) else []
        pads = node.args[1] if node.target is F.pad and len(node.args) > 1 else ()
        return sources if isinstance(pads, (list, tuple)) and 0 < len(pads) < 2 * rank else []

    def _is_spread(self, node: fx.Node, rank: int) -> bool:
        """Whether a value has one sample at all sizes, so that it is spread out over others."""
        own, shape = self._net.rank(node), shape_of(node)
        if own is None or own < rank:
            return own is not None
        return shape is not None and shape[0] == 1 and self._net.is_sure(node, 0)


def _of_expression(size: int | torch.SymInt) -> Size | None:
    """A size as they know it."""
    if isinstance(size, int):
        return Size(size) if size > 0 else None
    found = ONE
    for base, power in size.node.expr.as_powers_dict().items():
        if not power.is_Integer or power < 0:
            return None
        one = Size(int(base)) if base.is_Integer else Size.of(base)
        for _ in range(int(power)):
            found = found * one
    return found
