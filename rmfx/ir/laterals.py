"""Reading nodes that combine a value with others: products, sums, choices, concatenations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from rmfx.algebra.layer import Layer
from rmfx.errors import Refusal

from .elements import Deferred
from .kinds import ADDITIVE, NEUTRAL, is_a
from .net import Net
from .nodes import is_tensor_node
from .notes import shape_of, why_frozen
from .reading import read_selection

LIMITS = (torch.maximum, torch.minimum)


@dataclass(frozen=True, eq=False)
class Lateral(Layer):
    """A value combined with other tensors, channel by channel.

    Attributes:
        net: in which that happens.
        node: the product, sum, choice or concatenation.
        operands: what it combines; nodes, and numbers in a choice.
        place: which of them is on the path that is followed.
    """

    net: Net
    node: fx.Node
    operands: tuple[Any, ...]
    place: int
    keeps_channels: ClassVar[bool] = False

    @property
    def value(self) -> fx.Node:
        """The operand on the path."""
        return self.operands[self.place]  # type: ignore[no-any-return]

    @property
    def others(self) -> tuple[fx.Node, ...]:
        """The other tensors."""
        rest = (*self.operands[: self.place], *self.operands[self.place + 1 :])
        return tuple(x for x in rest if isinstance(x, fx.Node))

    @property
    def neutral(self) -> tuple[float | None, ...]:
        """What each of the others must hold for the value to come out unchanged."""
        return NEUTRAL[self.node.target][self.place]

    def reading(self, places: Mapping[fx.Node, fx.Node]) -> Lateral:
        """The same with some of the other tensors read elsewhere."""
        operands = (
            places.get(x, x) if i != self.place and isinstance(x, fx.Node) else x
            for i, x in enumerate(self.operands)
        )
        return replace(self, operands=tuple(operands))

    @property
    def is_concatenation(self) -> bool:
        return self.node.target is torch.cat

    @property
    def spread_dims(self) -> set[int]:
        """The dimensions of the result in which the value is spread out, for the example."""
        value, whole = (shape_of(n) for n in (self.value, self.node))
        if value is None or whole is None or self.is_concatenation:
            return set()
        missing = len(whole) - len(value)
        own = (None,) * missing + value
        return {dim for dim, size in enumerate(whole) if size != own[dim]}

    def channels_behind(self, channels: int, dims: int) -> int:
        if not self.is_concatenation:
            return channels
        return channels + sum(self.net.channels(other, dims) or 0 for other in self.others)

    def unfit(self, channels: int, dims: int, rank: int | None) -> Refusal | None:
        """Why the channels of the other tensors are not known to meet those of the value."""
        refusals = (self._unfit_beside(other, channels, dims) for other in self.others)
        refusal = next(filter(None, refusals), None)
        if refusal or not self.is_concatenation:
            return refusal
        axis: Any = self.node.args[1]
        rank = dims + 2 if dims else self.net.rank(self.value)
        along = axis - rank if rank and axis >= 0 else axis
        if along != (-dims - 1 if dims else -1):
            return Refusal("a concatenation along another dimension than the channels")
        return None

    def _unfit_beside(self, other: fx.Node, channels: int, dims: int) -> Refusal | None:
        rank, own = self.net.rank(other), self.net.channels(other, dims)
        if rank is not None and own is None and shape_of(other) is not None:
            return self.net.without_channels(other)
        if rank is None or own is None:
            return Refusal(
                "it reads a second tensor whose shape is unknown; pass example_inputs",
                (other.name,),
            )
        if dims and rank != dims + 2:
            return Refusal(f"a {rank}-D tensor among layers of {dims} dimensions", (other.name,))
        if not self.is_concatenation and own not in (1, channels):
            return Refusal(
                f"a tensor of {channels} channel meets one of {own}: it broadcasts", (other.name,)
            )
        kind = self.net.dtype(other)
        if self.node.target in LIMITS and (kind is None or not kind[0].is_floating_point):
            return Refusal("a limit that is not known to be floating point", (other.name,))
        return None


def laterals(net: Net, node: fx.Node) -> list[Lateral]:
    """A node as a combination of each of its operands with the others, the likeliest path first.

    A gate is seldom the path: it has another size than the product, or comes out of a sigmoid.
    """
    if why_frozen(node) or node.op != "call_function":
        return []
    operands = _concatenated(net, node) if node.target is torch.cat else node.args
    if node.target is torch.cat and len(set(operands)) == 1 and _selects(net, node):
        return []  # the same channels several times
    places = _open_places(net, node, operands)
    found = [Lateral(net, node, tuple(operands), place) for place in places]

    def is_gate(one: Lateral) -> bool:
        return bool(one.spread_dims) or is_a(net.module(one.value), (nn.Sigmoid, nn.Hardsigmoid))

    return sorted(found, key=is_gate)


def _selects(net: Net, node: fx.Node) -> bool:
    return isinstance(read_selection(net, node, Refusal("")), Deferred)


def _open_places(net: Net, node: fx.Node, operands: Sequence[Any]) -> list[int]:
    """The operands that come out unchanged if the others hold the right numbers."""
    if node.target is torch.cat:
        return [*range(len(operands))]
    is_sum = node.target in ADDITIVE
    tensors = [is_tensor_node(x) for x in operands]
    count = 3 if node.target is torch.where else 2
    # Only a choice does not care what number it does not choose.
    numbers = [isinstance(x, (int, float)) and node.target is torch.where for x in operands]
    held = [_is_wide_constant(net, node, x) for x in operands]
    known = [any(kinds) for kinds in zip(tensors, numbers, held, strict=True)]
    if len(operands) != count or not all(known) or isinstance(operands[0], (int, float)):
        return []
    if set(node.kwargs) - ({"alpha"} if is_sum else set()):
        return []
    places = [i for i in NEUTRAL.get(node.target, ()) if tensors[i]]
    return places[:1] if node.kwargs else places  # a factor belongs to the second operand


def _is_wide_constant(net: Net, node: fx.Node, value: object) -> bool:
    """Whether an operand is a constant that differs from place to place, or chooses.

    Others are factors and summands of a linear layer.
    """
    if not isinstance(value, fx.Node) or value.op != "get_attr" or why_frozen(value):
        return False
    held = net.attribute(value)
    if not isinstance(held, Tensor) or held.dim() != net.rank(node):
        return False
    axis = -1 if net.facts(node).last else 1  # of the channels
    return node.target is torch.where or held.numel() > held.shape[axis]


def _concatenated(net: Net, node: fx.Node) -> list[fx.Node]:
    tensors = node.args[0] if len(node.args) == 2 and not node.kwargs else ()
    if not isinstance(tensors, (list, tuple)) or not isinstance(node.args[1], int):
        return []
    parts = [x for x in tensors if isinstance(x, fx.Node) and is_tensor_node(x)]
    return parts if len(parts) == len(tensors) else []
