"""Slices and paddings by sizes become slices and paddings by numbers.

    x[:, :, -y.size(2):]    F.pad(x, (0, x.size(3) - y.size(3)))    x[..., 2:30] of a fixed size

Networks without padding cut a shortcut to the size of its branch. How much that is follows from the
layers between, whatever the size of the input: sizes are ⌊(H + a)/s⌋ of it, and where two of them
differ by a constant, that is the number.
"""

from __future__ import annotations

import operator
from typing import Any

import torch.nn.functional as F
from torch import fx

from rmfx.ir.net import Net
from rmfx.ir.nodes import must_stay, slice_by_slice
from rmfx.ir.notes import GUARDED, gives_number, why_frozen

from .sums_of_sizes import Numbers, Sum, added, constant_of


def crop_by_numbers(gm: fx.GraphModule) -> None:
    """Rewrite slices of space, and paddings, whose bounds are known for all sizes."""
    if not any(_is_candidate(node) for node in gm.graph.nodes):
        return
    numbers = Numbers(Net(gm))
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


def _bounded(numbers: Numbers, node: fx.Node) -> tuple[Any, Any]:
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


def _slice(numbers: Numbers, x: fx.Node, dim: int, s: slice) -> slice:
    """A slice that begins with a number from the front and ends with one from the back."""
    whole = numbers.size(x, dim, clipped=True)  # a bound that is a size is none of less than 0
    if dim < 2 or whole is None or not isinstance(s.step, int | None):
        return s
    size = constant_of(whole)
    if size is None:
        start, stop = _bound(numbers, s.start, whole, 1), _bound(numbers, s.stop, whole, -1)
        return slice(start, stop, s.step)
    bounds = [numbers.constant(b) for b in (s.start, s.stop)]
    if any(b is not None and n is None for b, n in zip((s.start, s.stop), bounds, strict=True)):
        return s
    begin, end, _ = slice(*bounds).indices(size)
    return slice(begin or None, (end - size) or None, s.step) if begin < end else s


def _bound(numbers: Numbers, bound: Any, whole: Sum, sign: int) -> Any:
    """A bound as a number: how much is cut off.

    Where a slice begins at -y.size(2), or ends at y.size(2), it is that by which y is smaller.

    Args:
        sign: 1 for where a slice begins, -1 for where it ends.
    """
    known = numbers(bound)
    if known is None:
        return bound
    cut = constant_of(added(whole, known, sign))
    if cut is not None and numbers.is_size(added({}, known, -sign)):
        return sign * max(cut, 0) or None
    constant = constant_of(known)
    return bound if constant is None else constant
