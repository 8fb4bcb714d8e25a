"""Nodes that combine several chains, and nodes that save values and read them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .forms import JOINS
from .node import Around, Branching, Node, Nodes, Saved, Step, Store


@dataclass(frozen=True, repr=False)
class Save(Node):
    """Remembers the value under a name, for a `Recall` or for the network's output."""

    name: str

    def build(self, store: Store) -> nn.Module:
        return Step(self, store)

    def run(self, x: Tensor, saved: Saved, inside: Sequence[nn.Module]) -> Tensor:
        saved[self.name] = x
        return x


@dataclass(frozen=True, repr=False)
class Recall(Around):
    """Combines the value a with b: what `chain` makes of the value saved under `name`.

    The network's inputs after the first are saved as "input1", "input2".
    """

    name: str
    chain: Nodes = ()
    form: str = "a + b"
    scale: float = 0.5

    def run(self, x: Tensor, saved: Saved, inside: Sequence[nn.Module]) -> Tensor:
        return JOINS[self.form](x, inside[0](saved[self.name], saved), self.scale)


@dataclass(frozen=True, repr=False)
class Join(Branching):
    """Every operand is a chain that starts at the value; an empty chain is the value itself.

    `forms[i]` (a key of `JOINS`, where c is `scale`) combines a, the result so far, with b, the
    operand i + 1. Operands run in the order given, each right before it is combined.
    """

    operands: tuple[Nodes, ...]
    forms: tuple[str, ...] = ("a + b",)
    scale: float = 0.5

    def run(self, x: Tensor, saved: Saved, inside: Sequence[nn.Module]) -> Tensor:
        first, *others = inside
        value: Tensor = first(x, saved)
        for operand, form in zip(others, self.forms, strict=True):
            value = JOINS[form](value, operand(x, saved), self.scale)
        return value


@dataclass(frozen=True, repr=False)
class Split(Branching):
    """Channels in parts of `sizes`, each through a chain of its own, and joined again.

    `form` is "chunk" (for equal parts), "split", "slice" or "narrow"; `join` is "cat" or a key of
    `JOINS`, for two parts. `axis` is that of the channels: 1, or -1 for tokens.
    """

    operands: tuple[Nodes, ...]
    sizes: tuple[int, ...]
    form: str = "split"
    join: str = "cat"
    axis: int = 1

    def run(self, x: Tensor, saved: Saved, inside: Sequence[nn.Module]) -> Tensor:
        parts = self.parts(x)
        results = [chain(part, saved) for chain, part in zip(inside, parts, strict=True)]
        if self.join == "cat":
            return torch.cat(results, self.axis)
        return JOINS[self.join](results[0], results[1], 0.5)

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
class ChannelsLast(Around):
    """A chain that sees the channels as the last axis, as in ConvNeXt; `dims` counts the others."""

    chain: Nodes
    dims: int = 2

    def run(self, x: Tensor, saved: Saved, inside: Sequence[nn.Module]) -> Tensor:
        spatial = range(2, 2 + self.dims)
        inner: Tensor = inside[0](x.permute(0, *spatial, 1), saved)
        return inner.permute(0, self.dims + 1, *(axis - 1 for axis in spatial))
