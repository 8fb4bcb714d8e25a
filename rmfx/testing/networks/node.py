"""Nodes of a random network: data that says what to build."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
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
    """One step of a chain. Subclasses override `build`, or `apply` when they hold no state.

    Those that read or write saved values, or have chains inside, override `run`.
    """

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

    def run(self, x: Tensor, saved: Saved, inside: Sequence[nn.Module]) -> Tensor:
        """What a `Step` computes, which has the chains inside as modules."""
        raise NotImplementedError

    @property
    def chains(self) -> tuple[Nodes, ...]:
        """The chains inside it."""
        return ()

    def with_chains(self, inside: tuple[Nodes, ...]) -> Node:
        """The same with other chains inside."""
        return self


Nodes = tuple[Node, ...]


class Branching(Node):
    """A node whose operands are chains."""

    operands: tuple[Nodes, ...]

    @property
    def chains(self) -> tuple[Nodes, ...]:
        return self.operands

    def with_chains(self, inside: tuple[Nodes, ...]) -> Node:
        return replace(self, operands=inside)  # type: ignore[call-arg]

    def build(self, store: Store) -> nn.Module:
        return Step(self, store)


class Around(Node):
    """A node with one chain inside."""

    chain: Nodes

    @property
    def chains(self) -> tuple[Nodes, ...]:
        return (self.chain,)

    def with_chains(self, inside: tuple[Nodes, ...]) -> Node:
        return replace(self, chain=inside[0])  # type: ignore[call-arg]

    def build(self, store: Store) -> nn.Module:
        return Step(self, store)


class Step(nn.Module):
    """A node that also reads or writes the saved values, alone or by chains inside."""

    def __init__(self, node: Node, store: Store) -> None:
        super().__init__()
        self.node = node
        self.operands = nn.ModuleList(Chain(nodes, store) for nodes in node.chains)

    def forward(self, x: Tensor, saved: Saved) -> Tensor:
        return self.node.run(x, saved, list(self.operands))


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
