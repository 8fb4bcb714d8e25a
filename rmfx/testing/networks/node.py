"""Nodes of a random network: data that says what to build."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

Saved = dict[str, Tensor]
Store = dict[str, Any]  # what several layers of one network share, by the name in their spec


def arguments(node: Any) -> list[tuple[str, Any]]:
    """The arguments of a dataclass that differ from their defaults; "" names a positional one."""
    shown: list[tuple[str, Any]] = []
    for position, item in enumerate(fields(node)):
        value = getattr(node, item.name)
        if value == item.default and type(value) is type(item.default):
            continue
        named = position >= 3 or len(shown) < position
        shown.append((item.name if named else "", value))
    return shown


@dataclass(frozen=True, repr=False)
class Node:
    """One step of a chain. Subclasses override `build`, or `apply` when they hold no state."""

    def __repr__(self) -> str:
        """The constructor call, without the arguments that have their default value."""
        shown = [f"{name}={value!r}" if name else repr(value) for name, value in arguments(self)]
        return f"{type(self).__name__}({', '.join(shown)})"

    def build(self, store: Store) -> nn.Module:
        """The module that computes this node."""
        return Operation(self)

    def apply(self, x: Tensor) -> Tensor:
        """What a node without state computes."""
        raise NotImplementedError


Nodes = tuple[Node, ...]


class Step(nn.Module):
    """A module that also reads or writes the saved values."""


class Chain(nn.ModuleList):
    """Nodes in a row, as modules."""

    def __init__(self, nodes: Nodes, store: Store) -> None:
        super().__init__(node.build(store) for node in nodes)

    def forward(self, x: Tensor, saved: Saved) -> Tensor:
        for layer in self:
            x = layer(x, saved) if isinstance(layer, Step) else layer(x)
        return x


class Tied(nn.Module):
    """Has buffers that share memory, which they do after `tie` only.

    Moving a module to another type gives every buffer memory of its own.
    """

    def tie(self) -> None:
        """Let the buffers share memory."""
        raise NotImplementedError


class Operation(nn.Module):
    """A node without state."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.node = node

    def forward(self, x: Tensor) -> Tensor:
        return self.node.apply(x)
