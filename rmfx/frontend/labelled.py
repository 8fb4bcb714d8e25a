"""Linear layers over labelled dimensions, as the nodes of a graph that compute them.

    dimensions that follow one another become one, by `flatten`;
    the last one goes through F.linear, the second one of up to five through a convolution of one
    place, any other through F.linear once it is the last;
    several outputs become dimensions of their own, by `unflatten`; where there is none, one goes.

Weights are computed from the model's tensors by nodes, too, so that gradients find their way.
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from rmfx.ir.notes import ORIGIN, OWN_GRADIENT, notes_of, set_shape, set_type, shape_of, type_of

from .contractions import Labels
from .memory import storage_of

CONVS = (F.conv1d, F.conv2d, F.conv3d)
Weights = list[tuple[fx.Node, Labels]]  # tensors, with a label for each dimension


class Writer:
    """Writes nodes before a product that is to be one or more others.

    Args:
        graph: in which they are inserted where it inserts now.
        product: whose type, origin and knowledge of shapes they have.
        constants: what depends on the model's tensors alone, as tensors without values.
        sizes: of the dimensions, by labels; those that constants have are known.
    """

    def __init__(
        self,
        graph: fx.Graph,
        product: fx.Node,
        constants: Mapping[fx.Node, Tensor],
        sizes: dict[str, int | None],
    ) -> None:
        self._graph = graph
        self._product = product
        self._constants = constants
        self._sizes = sizes

    def call(self, function: Any, *args: Any) -> fx.Node:
        """A call of a function."""
        made = self._graph.call_function(function, args)
        made.meta = notes_of(self._product, *ORIGIN, OWN_GRADIENT)
        set_type(made, type_of(self._product))
        return made

    def noted(self, node: fx.Node, labels: Sequence[str]) -> fx.Node:
        """A node with its shape noted, where shapes are."""
        if shape_of(self._product) is not None:
            set_shape(node, tuple(map(self._sizes.get, labels)))
        return node

    def permuted(self, node: fx.Node, labels: Labels, wanted: Labels) -> fx.Node:
        """A value with its dimensions in another order."""
        if labels == wanted:
            return node
        order = [labels.index(label) for label in wanted]
        return self.noted(self.call(torch.permute, self.noted(node, labels), order), wanted)

    def reshaped(self, node: fx.Node, labels: Labels) -> fx.Node:
        """A constant with dimensions of some labels."""
        return self.noted(self.call(torch.reshape, node, self._shape(labels)), labels)

    # ---- layers -----------------------------------------------------------------------------

    def layer(
        self,
        x: fx.Node,
        labels: tuple[Labels, Labels, Labels],
        made: Labels,
        weight: fx.Node,
        bias: fx.Node | None,
    ) -> tuple[fx.Node, Labels]:
        """A linear layer, and the labels of what it gives.

        Args:
            x: what it reads.
            labels: of the dimensions before its inputs, of its inputs, and of those behind.
            made: the labels of its outputs.
            weight: a matrix.
            bias: a vector, or nothing.
        """
        before, summed, after = labels
        if len(summed) > 1:
            end = -1 - len(after)
            x = self.call(torch.flatten, x, end - len(summed) + 1, end)
            summed = (self._joined(summed),)
            self.noted(x, (*before, *summed, *after))
        outputs = self._joined(made)
        if len(before) == 1 and 0 < len(after) <= len(CONVS):
            kernel = (outputs, *summed, *[self._joined(())] * len(after))
            y = self.call(CONVS[len(after) - 1], x, self.reshaped(weight, kernel), bias)
        else:
            x = self.permuted(x, (*before, *summed, *after), (*before, *after, *summed))
            before, after = (*before, *after), ()
            y = self.call(F.linear, x, weight, bias)
        self.noted(y, (*before, outputs, *after))
        if not made:
            y = self.call(torch.squeeze, y, -1 - len(after))
        elif len(made) > 1:
            y = self.call(torch.unflatten, y, -1 - len(after), self._shape(made))
        return y, (*before, *made, *after)

    def scaled(self, x: fx.Node, labels: Labels, weight: fx.Node, shared: Labels) -> fx.Node:
        """A product place by place with a constant that has some of the dimensions."""
        one = self._joined(())
        own = labels[labels.index(shared[0]) :]
        spread = tuple(label if label in shared else one for label in own)
        return self.call(torch.mul, x, self.reshaped(weight, spread))

    # ---- weights ----------------------------------------------------------------------------

    def weight(self, parts: Weights, groups: tuple[Labels, Labels], alpha: float) -> fx.Node:
        """The product of constants as a matrix: of outputs and inputs, some labels each.

        Without inputs it keeps the dimensions that the outputs have.
        """
        wanted = (*groups[0], *groups[1])
        (first, own), *others = parts
        if not others and sorted(own) == sorted(wanted):
            made = self._reordered(first, [own.index(label) for label in wanted])
        else:
            made = self._product_of(parts, wanted)
        if groups[1]:
            wanted = (self._joined(groups[0]), self._joined(groups[1]))
            made = made if (*groups[0], *groups[1]) == wanted else self.reshaped(made, wanted)
        if alpha != 1:
            made = self.call(torch.mul, made, alpha)
        return made if made in self._constants else self.noted(made, wanted)

    def _product_of(self, parts: Weights, wanted: Labels) -> fx.Node:
        labels = dict.fromkeys(label for _, own in parts for label in own)
        letters = dict(zip(labels, string.ascii_letters, strict=False))
        terms = ("".join(map(letters.__getitem__, own)) for own in (*(o for _, o in parts), wanted))
        *operands, result = terms
        equation = f"{','.join(operands)}->{result}"
        return self.call(torch.einsum, equation, *(part for part, _ in parts))

    def _reordered(self, node: fx.Node, order: list[int]) -> fx.Node:
        """A constant with its dimensions in another order; maybe the model's own tensor has it."""
        while (found := self._transposed(node)) is not None:
            node, of_source = found
            order = [of_source[place] for place in order]
        return node if order == [*range(len(order))] else self.call(torch.permute, node, order)

    def _transposed(self, node: fx.Node) -> tuple[fx.Node, list[int]] | None:
        """What a constant is the same memory of, its dimensions in another order, and that."""
        sources = [n for n in node.all_input_nodes if n in self._constants]
        if len(sources) != 1 or node not in self._constants:
            return None
        value, source = self._constants[node], self._constants[sources[0]]
        same = storage_of(value) == storage_of(source) and value.dtype == source.dtype
        if not same or value.storage_offset() != source.storage_offset():
            return None
        steps = [*zip(source.shape, source.stride(), strict=True)]
        order = []
        for step in zip(value.shape, value.stride(), strict=True):
            free = [i for i, one in enumerate(steps) if one == step and i not in order]
            if not free:
                return None
            order.append(free[0])
        return (sources[0], order) if len(order) == len(steps) else None

    # ---- sizes ------------------------------------------------------------------------------

    def _shape(self, labels: Labels) -> tuple[int, ...]:
        """The sizes of labels that constants have."""
        return tuple(int(self._sizes[label] or 0) for label in labels)

    def _joined(self, labels: Labels) -> str:
        """A label for several dimensions as one."""
        name = " and ".join(labels)
        self._sizes.setdefault(name, math.prod(self._shape(labels)))
        return name
