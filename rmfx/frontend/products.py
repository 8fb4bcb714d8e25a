"""A product with a constant tensor, however it is written, becomes the layer that it is.

As a sum over labelled dimensions (`contractions.py`) a product of one tensor x of the network and
constants is a linear layer over one dimension of x where

    the labels of x that the result has not follow one another: they are the layer's inputs;
    those of the result that x has not are its outputs, any number of them;
    x and the constants share no other label.

    x @ W    F.linear(x, Wᵀ)                       the last dimension
    W @ x    F.conv1d(x, W[:, :, None])            the second one, and some behind it
    einsum("bchw,oc->bhwo", x, W)                  a convolution, then a permutation
    einsum("btc,chd->bthd", x, W)                  F.linear, then `unflatten`

Several constants are one: their own product. A constant that is spread out over the batch, as bmm
wants it, is spread out by the layer. Where nothing is summed it is a product place by place.

Not read: constants that share a dimension with the result, as where each sample has a weight of
its own; sums over dimensions that stand apart; integers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rmfx.ir.callees import is_touched
from rmfx.ir.facts import facts_of
from rmfx.ir.kinds import is_a
from rmfx.ir.notes import shape_of
from rmfx.ir.numbers import size_read

from .constants import constants_without_values
from .contractions import CONTRACTIONS, SUMMED, Contraction, Labels
from .labelled import Weights, Writer

EXPANSIONS = ("expand", torch.ops.aten.expand.default)
MANY = 100  # dimensions, more than a tensor can have: what is counted from the first is not last


def products_as_layers(gm: fx.GraphModule) -> bool:
    """Let every product of a value and constants that is a linear layer be called as one.

    Returns:
        Whether that holds for the numbers of dimensions only that the values have now.
    """
    for node in gm.graph.find_nodes(op="call_module"):
        _open_bilinear(gm, node)
    found = [node for node in gm.graph.nodes if node.target in CONTRACTIONS]
    if not found:
        return False
    constants = constants_without_values(gm)
    rank = facts_of(gm).rank  # of a value that stays what it is, however it is written
    left = [node for node in found if node not in constants]
    by_rank = [_Product(gm, node, constants, rank).rewrite() for node in left]
    return any(by_rank)


def _open_bilinear(gm: fx.GraphModule, node: fx.Node) -> None:
    """Let nn.Bilinear be F.bilinear, of which one side may be a constant."""
    module: Any = gm.get_submodule(str(node.target))
    if not is_a(module, nn.Bilinear) or is_touched(module) or len(node.args) != 2 or node.kwargs:
        return
    names = ("weight",) if module.bias is None else ("weight", "bias")
    with gm.graph.inserting_before(node):
        tensors = [gm.graph.get_attr(f"{node.target}.{name}") for name in names]
    node.op, node.target, node.args = "call_function", F.bilinear, (*node.args, *tensors)


class _UnknownRankError(Exception):
    """The number of dimensions of a value is asked for, and not known."""


class _Product:
    """A product that may be rewritten.

    Args:
        gm: the graph.
        node: the product.
        constants: what depends on the model's tensors alone, as tensors without values.
        rank_of: the number of dimensions of a value, None if it is not known.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        node: fx.Node,
        constants: Mapping[fx.Node, Tensor],
        rank_of: Callable[[fx.Node], int | None],
    ) -> None:
        self._gm = gm
        self._graph = gm.graph
        self._node = node
        self._constants = constants
        self._rank_of = rank_of
        self._is_open = False  # whether it is read for any number of dimensions
        self._sizes: dict[str, int | None] = {}  # by labels

    def rewrite(self) -> bool:
        """Do it, if it can be done; gives whether that holds for one number of dimensions only."""
        return not self._is_rewritten(is_open=True) and self._is_rewritten(is_open=False)

    def _is_rewritten(self, *, is_open: bool) -> bool:
        self._is_open = is_open
        try:
            found = CONTRACTIONS[self._node.target](self._node, self._rank)
        except _UnknownRankError:
            return False
        if found is None:
            return False
        data, weights = self._split(found)
        if len(data) != 1 or not weights or len({*data[0][1]}) < len(data[0][1]):
            return False
        x, labels = data[0]
        sizes = shape_of(x, ())[::-1]
        if not is_open and self._rank_of(x) not in (None, len(labels)):
            return False
        self._sizes = {**dict.fromkeys(labels), **dict(zip(labels[::-1], sizes, strict=False))}
        fitted = [self._fitted(one, own, found) for one, own in weights]
        if None in fitted:
            return False
        with self._graph.inserting_before(self._node):
            return self._rewrite(found, x, labels, [one for one in fitted if one is not None])

    # ---- its operands -----------------------------------------------------------------------

    def _rank(self, node: fx.Node) -> int:
        if node in self._constants:
            return self._constants[node].dim()
        if node.target in EXPANSIONS:
            return len(_sizes_of(node))
        rank = MANY if self._is_open else self._rank_of(node)
        if rank is None:
            raise _UnknownRankError
        return rank

    def _split(self, found: Contraction) -> tuple[Weights, Weights]:
        """The operands that depend on the network's inputs, and the constants."""
        data: Weights = []
        weights: Weights = []
        for node, labels in found.operands:
            constant = self._constant(node, labels, found)
            (data if constant is None else weights).append(constant or (node, labels))
        return data, weights

    def _constant(
        self, node: fx.Node, labels: Labels, found: Contraction
    ) -> tuple[fx.Node, Labels] | None:
        """A constant operand, or the constant that is spread out to be one over the batch."""
        itself = (node, labels) if node in self._constants else None
        source: Any = node.args[0] if node.target in EXPANSIONS and not node.kwargs else None
        sizes = _sizes_of(node) if source in self._constants else ()
        if not sizes or len(sizes) != len(labels):
            return itself
        new = len(sizes) - self._constants[source].dim()
        shape = (*[1] * new, *self._constants[source].shape)
        for own, size, label in zip(shape, sizes, labels, strict=True):
            is_kept = isinstance(size, int) and size in (-1, own)
            if not is_kept and not (own == 1 and self._is_size(size, label, found)):
                return itself
        return source, labels[new:]

    def _is_size(self, size: Any, label: str, found: Contraction) -> bool:
        """Whether a number is the size of the dimension of that label in the other operands."""
        if found.even and label in found.result:
            return True
        value, dim = size_read(size) if isinstance(size, fx.Node) else (None, None)
        for node, labels in found.operands:
            if label not in labels or label not in found.result:
                continue
            place, rank = labels.index(label) - len(labels), len(shape_of(node, ()))
            if node is value and isinstance(dim, int) and labels[dim] == label:
                return True
            known = facts_of(self._gm).size(node, rank + place) if -place <= rank else None
            if known is not None and known == size:
                return True
        return False

    def _fitted(
        self, weight: fx.Node, labels: Labels, found: Contraction
    ) -> tuple[fx.Node, Labels] | None:
        """A constant with labels of its own where it is spread out; None if x may be, too."""
        value = self._constants[weight]
        if not value.is_floating_point() or len(labels) != value.dim():
            return None
        fitted = []
        for label, size in zip(labels, value.shape, strict=True):
            in_x = label in self._sizes
            own = self._sizes.setdefault(label, size)
            is_spread = in_x and size == 1 and label in found.result
            if is_spread and self._is_open and not found.even:
                return None  # it may have more dimensions than x
            if not is_spread and own not in (None, size):
                return None  # x is spread out
            if in_x and not is_spread and size == 1 and not found.even and label != SUMMED:
                return None  # x is summed over it, whatever its size
            fitted.append(f"{label} of {weight.name}" if is_spread else label)
            if not is_spread:
                self._sizes[label] = size
        return weight, tuple(fitted)

    # ---- the layer --------------------------------------------------------------------------

    def _rewrite(self, found: Contraction, x: fx.Node, labels: Labels, weights: Weights) -> bool:
        of_weights = {label for _, own in weights for label in own}
        summed = tuple(label for label in labels if label not in found.result)
        made = tuple(label for label in found.result if label not in labels)
        shared = tuple(label for label in labels if label in found.result and label in of_weights)
        write = Writer(self._graph, self._node, self._constants, self._sizes)
        if shared and not summed and not made:
            is_plain = found.result == labels and labels[-len(shared) :] == shared
            if self._is_open and not is_plain:
                return False
            weight = write.weight(weights, (shared, ()), found.alpha)
            return self._replace(write, found, write.scaled(x, labels, weight, shared), labels)
        start = labels.index(summed[0]) if summed else 0
        is_run = summed != () and labels[start : start + len(summed)] == summed
        if shared or not is_run or not of_weights.issuperset((*summed, *made)):
            return False
        before, after = labels[:start], labels[start + len(summed) :]
        is_plain = not after and found.result == (*before, *made)
        if self._is_open and not is_plain:
            return False
        weight = write.weight(weights, (made, summed), found.alpha)
        bias = None
        if found.result == (*before, *made, *after):
            bias = self._bias(write, found, made)
        rest = found if bias is None else replace(found, added=None)
        y, behind = write.layer(x, (before, summed, after), made, weight, bias)
        return self._replace(write, rest, y, behind)

    def _bias(self, write: Writer, found: Contraction, made: Labels) -> fx.Node | None:
        """What is added to a product as the bias of its layer, if it is one."""
        value = self._constants.get(found.added) if isinstance(found.added, fx.Node) else None
        if value is None or len(made) != 1 or found.beta != 1:
            return None
        place = found.result.index(made[0]) - len(found.result)
        size = self._sizes[made[0]]
        if value.dim() < -place or value.numel() != size or value.shape[place] != size:
            return None
        return write.reshaped(found.added, (made[0],)) if value.dim() > 1 else found.added

    def _replace(self, write: Writer, found: Contraction, y: fx.Node, labels: Labels) -> bool:
        """Let what a layer gives be the result of the product; gives that it is."""
        y = write.permuted(y, labels, found.result)
        if found.added is not None and found.beta != 0:
            added = found.added
            if found.beta != 1:
                added = write.call(torch.mul, added, found.beta)
            y = write.call(torch.add, added, write.noted(y, found.result))
        y.meta = dict(self._node.meta)
        self._node.replace_all_uses_with(y)
        self._graph.erase_node(self._node)
        return True


def _sizes_of(expansion: fx.Node) -> tuple[Any, ...]:
    """What sizes a value is spread out to."""
    sizes: Any = expansion.args[1:]
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (list, tuple)) else sizes
