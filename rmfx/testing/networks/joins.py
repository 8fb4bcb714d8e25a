"""Nodes that combine several chains, and nodes that save values and read them again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .forms import JOINS
from .node import Chain, Node, Nodes, Saved, Step, Store


@dataclass(frozen=True, repr=False)
class Save(Node):
    """Remembers the value under a name, for a `Recall` or for the network's output."""

    name: str

    def build(self, store: Store) -> nn.Module:
        return _Save(self.name)


@dataclass(frozen=True, repr=False)
class Recall(Node):
    """Combines the value a with b: what `chain` makes of the value saved under `name`.

    The network's inputs after the first are saved as "input1", "input2".
    """

    name: str
    chain: Nodes = ()
    form: str = "a + b"
    scale: float = 0.5

    def build(self, store: Store) -> nn.Module:
        return _Recall(self, store)


@dataclass(frozen=True, repr=False)
class Join(Node):
    """Every operand is a chain that starts at the value; an empty chain is the value itself.

    `forms[i]` (a key of `JOINS`, where c is `scale`) combines a, the result so far, with b, the
    operand i + 1. Operands run in the order given, each right before it is combined.
    """

    operands: tuple[Nodes, ...]
    forms: tuple[str, ...] = ("a + b",)
    scale: float = 0.5

    def build(self, store: Store) -> nn.Module:
        return _Join(self, store)


class _Join(Step):
    def __init__(self, node: Join, store: Store) -> None:
        super().__init__()
        self.node = node
        self.operands = nn.ModuleList(Chain(nodes, store) for nodes in node.operands)

    def forward(self, x: Tensor, saved: Saved) -> Tensor:
        first, *others = self.operands
        value: Tensor = first(x, saved)
        for operand, form in zip(others, self.node.forms, strict=True):
            value = JOINS[form](value, operand(x, saved), self.node.scale)
        return value


class _Recall(Step):
    def __init__(self, node: Recall, store: Store) -> None:
        super().__init__()
        self.node = node
        self.chain = Chain(node.chain, store)

    def forward(self, x: Tensor, saved: Saved) -> Tensor:
        other = self.chain(saved[self.node.name], saved)
        return JOINS[self.node.form](x, other, self.node.scale)


class _Save(Step):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor, saved: Saved) -> Tensor:
        saved[self.name] = x
        return x


@dataclass(frozen=True, repr=False)
class Split(Node):
    """Channels in parts of `sizes`, each through a chain of its own, and joined again.

    `form` is "chunk" (for equal parts), "split", "slice" or "narrow"; `join` is "cat" or a key of
    `JOINS`, for two parts. `axis` is that of the channels: 1, or -1 for tokens.
    """

    operands: tuple[Nodes, ...]
    sizes: tuple[int, ...]
    form: str = "split"
    join: str = "cat"
    axis: int = 1

    def build(self, store: Store) -> nn.Module:
        return _Split(self, store)

    def parts(self, x: Tensor) -> list[Tensor]:
        """The parts, by index: a proxy of `torch.fx` cannot be iterated over."""
        count = range(len(self.sizes))
        if self.form == "chunk":
            chunks = torch.chunk(x, len(self.sizes), self.axis)
            return [chunks[i] for i in count]
        if self.form == "split":
            pieces = torch.split(x, list(self.sizes), self.axis)
            return [pieces[i] for i in count]
        starts = [sum(self.sizes[:i]) for i in count]
        if self.form == "narrow":
            return [x.narrow(self.axis, starts[i], self.sizes[i]) for i in count]
        whole = (...,) if self.axis == -1 else (slice(None),)
        return [x[(*whole, slice(starts[i], starts[i] + self.sizes[i]))] for i in count]


@dataclass(frozen=True, repr=False)
class ChannelsLast(Node):
    """A chain that sees the channels as the last axis, as in ConvNeXt; `dims` counts the others."""

    chain: Nodes
    dims: int = 2

    def build(self, store: Store) -> nn.Module:
        return _ChannelsLast(self, store)


class _Split(Step):
    def __init__(self, node: Split, store: Store) -> None:
        super().__init__()
        self.node = node
        self.operands = nn.ModuleList(Chain(nodes, store) for nodes in node.operands)

    def forward(self, x: Tensor, saved: Saved) -> Tensor:
        parts = self.node.parts(x)
        results = [chain(part, saved) for chain, part in zip(self.operands, parts, strict=True)]
        if self.node.join == "cat":
            return torch.cat(results, self.node.axis)
        return JOINS[self.node.join](results[0], results[1], 0.5)


class _ChannelsLast(Step):
    def __init__(self, node: ChannelsLast, store: Store) -> None:
        super().__init__()
        self.dims = node.dims
        self.chain = Chain(node.chain, store)

    def forward(self, x: Tensor, saved: Saved) -> Tensor:
        spatial = range(2, 2 + self.dims)
        inner: Tensor = self.chain(x.permute(0, *spatial, 1), saved)
        return inner.permute(0, self.dims + 1, *(axis - 1 for axis in spatial))
