"""Labels of channels, what holds them, and what becomes of them where dimensions move."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rmfx.algebra.affine import TRANSPOSED
from rmfx.ir.functions import torch_name
from rmfx.ir.nodes import slice_by_slice

FIXED = 0
PAD_ARGUMENTS = ("pad", "mode", "value")


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels of a value's channels.

    Attributes:
        ids: (channels,) integers.
        axis: the dimension that holds the channels, counted from the front.
    """

    ids: Tensor
    axis: int


@dataclass(frozen=True, eq=False)
class Labelled:
    """A linear layer; `ins` and `outs` are the labels of what it reads and gives.

    Attributes:
        node: that calls it.
        module: what it calls.
        ins: (in_channels,) labels.
        outs: (out_channels,) labels.
        carries: (groups,) which groups work channel by channel, with `ins` as `outs`.
        by_place: whether the other groups, if there are several, lose places instead of going.
    """

    node: fx.Node
    module: nn.Module
    ins: Tensor
    outs: Tensor
    carries: Tensor
    by_place: bool

    @property
    def mixes(self) -> Tensor:
        """Which inputs it mixes with others, so that they can go and it stays: (in,) booleans."""
        mixed = ~self.carries
        if int(mixed.sum()) > 1 and not self.by_place:
            mixed = torch.zeros_like(mixed)
        return mixed.repeat_interleave(self.ins.numel() // mixed.numel())


def carries_of(module: Any) -> Tensor:
    """Which groups of a convolution work channel by channel: (groups,) booleans."""
    weight = module.weight.detach()
    groups, n_out = module.groups, weight.shape[0] // module.groups
    n_in = weight.shape[1]
    if isinstance(module, TRANSPOSED) or n_in != n_out or n_in == 1:
        return torch.zeros(groups, dtype=torch.bool)
    reads = (weight != 0).reshape(groups, n_out, n_in, -1).any(3)
    others = reads & ~torch.eye(n_in, dtype=torch.bool, device=weight.device)
    mixed: Tensor = others.flatten(1).any(1).cpu()
    return ~mixed


@dataclass(frozen=True, eq=False)
class Table:
    """Numbers per channel: the parameters of a channelwise module, or a constant (axis, name)."""

    node: fx.Node
    ids: Tensor
    axis: int = 0


@dataclass(frozen=True, eq=False)
class Edges:
    """A node that names places of channels: a slice, a list of them, or a padding of channels.

    Attributes:
        node: the node.
        ids: labels of the value that it reads.
        axis: that holds the channels.
        parts: labels of what a slice leaves out before, takes and leaves out behind, or of what a
            padding adds before and behind; of an index nothing, what it takes, and nothing.
        rows: which channels an index takes, in order; None of a slice or a padding.
    """

    node: fx.Node
    ids: Tensor
    axis: int
    parts: tuple[Tensor, ...]
    rows: tuple[int, ...] | None = None

    @property
    def adds(self) -> bool:
        """Whether it pads."""
        return self.node.target is F.pad

    @property
    def behind(self) -> Labels:
        """The labels of its own value."""
        first, second, *_ = self.parts
        ids = torch.cat((first, self.ids, second)) if self.adds else second
        return Labels(ids, self.axis)


class Union:
    """Labels that have been joined."""

    def __init__(self) -> None:
        self._parents = [FIXED]

    def new(self, count: int) -> Tensor:
        """So many further ones."""
        start = len(self._parents)
        self._parents.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def find(self, label: int) -> int:
        """The one that stands for all that it was joined with."""
        parents = self._parents
        while parents[label] != label:
            parents[label] = parents[parents[label]]
            label = parents[label]
        return label

    def join(self, first: Tensor, second: Tensor) -> None:
        """Join labels one by one."""
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            low, high = sorted((self.find(a), self.find(b)))
            self._parents[high] = low  # FIXED stays its own root

    def fix(self, labels: Tensor) -> None:
        """Join labels with those that cannot go."""
        self.join(labels, torch.full_like(labels, FIXED))

    def roots(self) -> Tensor:
        """What each label was joined to."""
        return torch.tensor([self.find(i) for i in range(len(self._parents))])


# ---- behind nodes that move dimensions ----------------------------------------------------------
def flattened(value: Labels, module: nn.Flatten, shape: Sequence[int | None]) -> Labels | None:
    """Behind a flattening of a value of a shape, whose sizes that vary are None."""
    start, end = module.start_dim % len(shape), module.end_dim % len(shape)
    if value.axis < start:
        return value
    if value.axis > end:
        return Labels(value.ids, value.axis - (end - start))
    inner = [size for size in shape[start + 1 : end + 1] if size is not None]
    if value.axis != start or len(inner) < end - start:
        return None
    return Labels(value.ids.repeat_interleave(math.prod(inner)), start)


def reduced(node: fx.Node, value: Labels, rank: int) -> Labels | None:
    """Behind a mean, a sum or a maximum over other dimensions."""
    if set(node.kwargs) - {"dim", "keepdim"} or len(node.args) > 3:
        return None
    axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    axes = (axes,) if isinstance(axes, int) else axes
    kept = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    if not isinstance(axes, (list, tuple)) or not axes or kept not in (True, False):
        return None
    gone = {int(i) % rank for i in axes if isinstance(i, int)}
    if len(gone) != len(axes) or value.axis in gone:
        return None
    return value if kept else Labels(value.ids, value.axis - sum(i < value.axis for i in gone))


def permuted(node: fx.Node, name: str, value: Labels, rank: int) -> Labels | None:
    """Behind a permutation of dimensions."""
    dims: Any = node.args[1:]
    dims = dims[0] if len(dims) == 1 else dims
    if node.kwargs or not isinstance(dims, (list, tuple)):
        return None
    if not all(isinstance(i, int) for i in dims):
        return None
    order = [i % rank for i in dims]
    if name == "transpose":
        a, b = order
        order = list(range(rank))
        order[a], order[b] = b, a
    return Labels(value.ids, order.index(value.axis))


def sliced(node: fx.Node, value: Labels, rank: int) -> Edges | Labels | None:
    """Behind a slice: the same labels, or a cut through the channels."""
    index = node.args[1]
    parts = index if isinstance(index, tuple) else (index,)
    lists = [i for i in parts if isinstance(i, list)]
    is_known = all(isinstance(i, (slice, type(...), list)) for i in parts)
    if not is_known or sum(i is ... for i in parts) > 1 or len(lists) > 1:
        return None
    if any(type(place) is not int for places in lists for place in places):
        return None
    own: Any = slice_by_slice(parts, rank)[value.axis]
    if isinstance(own, list):
        return _chosen(node, value, own)
    if own == slice(None):
        return value
    bounds = (own.start, own.stop, own.step)
    if not all(isinstance(i, int | None) for i in bounds) or own.step not in (None, 1):
        return None
    start, stop, _ = own.indices(value.ids.numel())
    if stop <= start:
        return None
    return Edges(node, value.ids, value.axis, value.ids.tensor_split((start, stop)))


def _chosen(node: fx.Node, value: Labels, places: list[Any]) -> Edges | None:
    """Behind a list of channels."""
    total = value.ids.numel()
    if not places or not all(-total <= i < total for i in places):
        return None
    rows = tuple(i % total for i in places)
    taken, nothing = value.ids[list(rows)], value.ids[:0]
    return Edges(node, value.ids, value.axis, (nothing, taken, nothing), rows)


def padded(node: fx.Node, value: Labels, rank: int, union: Union) -> Edges | Labels | None:
    """Behind a padding: the same labels, or some more of the channels."""
    given = dict(zip(PAD_ARGUMENTS, node.args[1:], strict=False)) | node.kwargs
    amounts = given.get("pad")
    if not isinstance(amounts, (list, tuple)):
        return None
    place = 2 * (rank - 1 - value.axis)
    before, after = (*amounts, *[0] * 2 * rank)[place : place + 2]
    if not isinstance(before, int) or not isinstance(after, int) or min(before, after) < 0:
        return None
    if before == after == 0:
        return value
    if given.get("mode", "constant") != "constant":
        return None
    return Edges(node, value.ids, value.axis, (union.new(before), union.new(after)))


# ---- what reads sizes ----------------------------------------------------------------------------
def leaves_alone(node: fx.Node, axis: int, rank: int) -> bool:
    """Whether a node that reads sizes leaves one dimension's size alone."""
    if node.op == "call_method" and node.target in ("dim", "ndimension"):
        return True
    if node.target is getattr and node.args[1] in ("ndim", "dtype", "device"):
        return True
    by_name = torch_name(node)
    if by_name.startswith(("size", "sym_size")) and len(node.args) == 2:
        return _is_other(node.args[1], axis, rank)
    whole = by_name == "size" or bool(node.target is getattr and node.args[1] == "shape")
    return whole and all(
        user.target is operator.getitem and _is_other(user.args[1], axis, rank)
        for user in node.users
    )


def _is_other(place: Any, axis: int, rank: int) -> bool:
    """Whether an index is known to be that of another dimension."""
    return isinstance(place, int) and place % rank != axis
