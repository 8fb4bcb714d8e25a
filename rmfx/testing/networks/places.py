"""Nodes that move values along a dimension, or mix all of space: rolls, indices, tokens, means.

What such a node does often depends on a size: a roll by 9 leaves 9 rows as they are and no other
number of rows, an index of 9 positions takes all of 9 and some of 11.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .node import Around, Node, Nodes, Operation, Saved, Store

ROLLS: dict[str, Callable[[Tensor, Any, Any], Tensor]] = {
    "torch.roll": torch.roll,
    "x.roll": lambda x, shifts, dims: x.roll(shifts, dims),
    "torch.roll keyword": lambda x, shifts, dims: torch.roll(x, shifts=shifts, dims=dims),
    "aten.roll": lambda x, shifts, dims: torch.ops.aten.roll.default(x, shifts, dims),
}
INDICES = ("list", "buffer", "index_select", "slice")
STATISTICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x - m": lambda x, m: x - m,
    "m - x": lambda x, m: m - x,
    "x + m": lambda x, m: x + m,
    "x * sigmoid(m)": lambda x, m: x * torch.sigmoid(m),
    "x / (1 + m * m)": lambda x, m: x / (1 + m * m),
    "x * m": lambda x, m: x * m,
}


@dataclass(frozen=True, repr=False)
class Roll(Node):
    """Values move along dimensions, of which 0 is the batch, and come back at the other end.

    `form` is a key of `ROLLS`.
    """

    shifts: tuple[int, ...]
    dims: tuple[int, ...]
    form: str = "torch.roll"

    def apply(self, x: Tensor) -> Tensor:
        return ROLLS[self.form](x, list(self.shifts), list(self.dims))


@dataclass(frozen=True, repr=False)
class Flip(Node):
    """Dimensions the other way round: "torch.flip" or "x.flip"."""

    dims: tuple[int, ...]
    form: str = "torch.flip"

    def apply(self, x: Tensor) -> Tensor:
        return torch.flip(x, self.dims) if self.form == "torch.flip" else x.flip(*self.dims)


@dataclass(frozen=True, repr=False)
class Take(Node):
    """Some positions along a dimension: `indices`, or from the first of them on for "slice".

    `form` is "list" (`x[:, :, [2, 0]]`), "buffer" (the same with a buffer), "index_select", or
    "slice" (`x[:, :, a::b]` for indices (a, b)).
    """

    axis: int
    indices: tuple[int, ...]
    form: str = "list"

    def build(self, store: Store) -> nn.Module:
        return Operation(self) if self.form in ("list", "slice") else _Take(self)

    def apply(self, x: Tensor) -> Tensor:
        if self.form == "slice":
            start, step = self.indices
            return x[_behind(self.axis, slice(start, None, step))]
        return x[_behind(self.axis, list(self.indices))]


@dataclass(frozen=True, repr=False)
class Repeat(Node):
    """Every position along a dimension several times: "method" or "function"."""

    axis: int
    repeats: int = 2
    form: str = "method"

    def apply(self, x: Tensor) -> Tensor:
        if self.form == "method":
            return x.repeat_interleave(self.repeats, self.axis)
        return torch.repeat_interleave(x, self.repeats, dim=self.axis)


@dataclass(frozen=True, repr=False)
class Mean(Node):
    """A value x joined with m, its mean over some axes; `form` is a key of `STATISTICS`.

    `how` is "x.mean", "torch.mean" or "x.amax".
    """

    form: str
    axes: tuple[int, ...]
    how: str = "x.mean"

    def apply(self, x: Tensor) -> Tensor:
        if self.how == "torch.mean":
            m = torch.mean(x, self.axes, keepdim=True)
        else:
            m = getattr(x, self.how[2:])(self.axes, keepdim=True)
        return STATISTICS[self.form](x, m)


@dataclass(frozen=True, repr=False)
class Focal(Node):
    """Focal modulation: gated terms are summed up, of which the last one has a single position."""

    channels: int
    dims: int = 2
    levels: int = 2

    def build(self, store: Store) -> nn.Module:
        return _Focal(self)


@dataclass(frozen=True, repr=False)
class Tokens(Node):
    """Positions as tokens behind the batch: `x.flatten(2).transpose(1, 2)`, or with permute."""

    form: str = "transpose"

    def apply(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        return flat.transpose(1, 2) if self.form == "transpose" else flat.permute(0, 2, 1)


@dataclass(frozen=True, repr=False)
class Reshaped(Around):
    """A chain that sees a map as tokens ("transpose", "permute") or as one row ("flat")."""

    chain: Nodes
    form: str = "transpose"

    def run(self, x: Tensor, saved: Saved, inside: Sequence[nn.Module]) -> Tensor:
        if self.form == "flat":
            return inside[0](x.flatten(1), saved).reshape(x.shape)  # type: ignore[no-any-return]
        inner: Tensor = inside[0](Tokens(self.form).apply(x), saved)
        return inner.transpose(1, 2).reshape(x.shape)


def _behind(axis: int, part: Any) -> tuple[Any, ...]:
    """An index that takes all of the dimensions before the axis."""
    return (*(slice(None),) * axis, part)


class _Take(nn.Module):
    """Positions that a buffer holds."""

    indices: Tensor

    def __init__(self, node: Take) -> None:
        super().__init__()
        self.node = node
        self.register_buffer("indices", torch.tensor(node.indices))

    def forward(self, x: Tensor) -> Tensor:
        if self.node.form == "index_select":
            return torch.index_select(x, self.node.axis, self.indices)
        return x[_behind(self.node.axis, self.indices)]


class _Focal(nn.Module):
    """Yang et al., Focal Modulation Networks, 2022, with sigmoids that bound the gates."""

    def __init__(self, node: Focal) -> None:
        super().__init__()
        self.node = node
        channels, window = node.channels, (3,) * node.dims
        conv: Any = getattr(nn, f"Conv{node.dims}d")
        self.gates = conv(channels, node.levels + 1, 1)
        self.query, self.mix = conv(channels, channels, 1), conv(channels, channels, 1)
        self.contexts = nn.ModuleList(
            conv(channels, channels, window, padding=1, groups=channels) for _ in range(node.levels)
        )

    def forward(self, x: Tensor) -> Tensor:
        gates = torch.sigmoid(self.gates(x))
        context, whole = x, 0.0 * x
        for level, layer in enumerate(self.contexts):
            context = F.gelu(layer(context))
            whole = whole + context * gates[:, level : level + 1]
        spatial = tuple(range(2, 2 + self.node.dims))
        last = F.gelu(context.mean(spatial, keepdim=True))
        whole = whole + last * gates[:, self.node.levels :]
        result: Tensor = self.query(x) * torch.tanh(self.mix(whole))
        return result
