"""What is counted of the nodes of a network: names that may be said of a kind of node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .node import Node


@dataclass(frozen=True)
class Place:
    """Where a node stands: between which others, and inside how many joins."""

    previous: Node | None
    following: Node | None
    depth: int


Says = Callable[[Any, Place], Iterator[str]]  # which names hold for a node at its place


class Counted:
    """The names of features, each beside the function that says it of a kind of node.

    Attributes:
        names: all that may be said.
        says: for each kind, the function that says which hold.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.says: dict[type[Node], Says] = {}

    def of(self, *kinds: type[Node], names: Iterable[str]) -> Callable[[Says], Says]:
        """Register a function that says which of the names hold for a node of these kinds."""
        self.names.update(names)

        def register(says: Says) -> Says:
            self.says.update(dict.fromkeys(kinds, says))
            return says

        return register
