"""Of which value a mask of positions has the last size, as code computes it of lengths.

(torch.arange(x.size(2)) < lengths[:, None]).unsqueeze(1)
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from .kinds import aten
from .net import Net
from .nodes import is_tensor_node
from .notes import gives_number
from .numbers import size_read
from .size_keeping import keeps_sizes, operator_name

DEEPEST = 12  # calls between a mask and what it is made of
RANGES = (torch.arange, aten.arange.default)
ONE = (None, 1)  # a size of 1
Place = tuple[fx.Node | None, int]


def last_size(net: Net, node: fx.Node, depth: int = DEEPEST) -> Place | None:
    """A value and the dimension in which it has as many places as a node in its last one.

    None where that is not known, (None, 1) where the node has one place.
    """
    if depth == 0:
        return None
    if node.target in RANGES and len(node.args) == 1 and isinstance(node.args[0], fx.Node):
        value, dim = size_read(node.args[0])
        return None if value is None or not isinstance(dim, int) else (value, dim)
    read = [n for n in node.all_input_nodes if not gives_number(n)]
    if operator_name(node) == "unsqueeze" or node.target is operator.getitem:
        added = _adds_last(net, node)
        return ONE if added else None if added is None else last_size(net, read[0], depth - 1)
    if not read or not all(map(is_tensor_node, read)):
        return None
    if len(read) > 1 or keeps_sizes(net, node):
        found = {last_size(net, one, depth - 1) for one in read}
        others = found - {ONE}
        return others.pop() if len(others) == 1 else None
    return None


def _adds_last(net: Net, node: fx.Node) -> bool | None:
    """Whether a node adds a last dimension of 1, None where it does more than add dimensions."""
    if node.target is not operator.getitem:
        rank, dim = net.rank(node), node.args[1] if len(node.args) == 2 else None
        return None if rank is None or not isinstance(dim, int) else dim in (-1, rank - 1)
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if not all(i is None or i is ... or i == slice(None) for i in index):
        return None
    return index[-1] is None and (... in index or len(index) == net.rank(node))
