"""The choices behind a network, and what is known of it while it is drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from random import Random
from typing import Any

from rmfx.testing.networks.digits import SLOPES, STEEP
from rmfx.testing.networks.joins import Save
from rmfx.testing.networks.layers import Conv, Linear
from rmfx.testing.networks.node import Node

from .values import INPUT, Path, Value

# 2 instead of 1.75 would let whole networks cancel to nothing but rounding.
CONSTANTS = (0.5, -0.5, 1.75, -1.0, 0.1)
_SMALL = 40  # values with memory of their own: small networks run fast and read well
_MOST_PRODUCTS = 2  # of two values without bounds: each squares what passes


class Draws(ABC):
    """The choices of `random`, and what is known of the network drawn so far.

    With the `Random` of `hypothesis.strategies.randoms` the draws shrink: every list of options
    has its simplest option first, and rare things are off at the smallest choice.
    """

    def __init__(self, random: Random) -> None:
        self.random = random
        self.batch = 1
        self.shapes: list[tuple[int, ...]] = []  # of the inputs, with the batch
        self.saved: dict[str, Value] = {}
        self.layers: list[Conv | Linear] = []  # those that may be called again
        self.is_scaled = False  # whether values of very different scale are in it
        self._names = 0
        self._storages = INPUT
        self._products = 0  # of two values without bounds
        # What the layers of one network have in common.
        self.activation = self.pick(
            ("relu", "relu", "relu", "relu6", "leaky_relu", "prelu", "silu")
        )
        self.slopes: tuple[float, ...] = ()
        if self.one_in(5):  # with slopes, bounds and scales that cost digits
            self.activation = self.pick(("leaky_relu", "prelu", "hardtanh"))
            self.slopes = self.pick((STEEP, SLOPES))
        self.norms = not self.one_in(4)
        self.functional = self.one_in(5)
        self.shares_activations = self.one_in(4)

    # Sites: what stands inside of one may ask for another.

    @abstractmethod
    def residual(self, path: Path) -> None:
        """Add a residual site."""

    @abstractmethod
    def any_block(self, path: Path) -> None:
        """Add a residual site, or something that only looks like one."""

    # Choices

    def pick(self, options: Sequence[Any]) -> Any:
        """One of several options."""
        return options[self.random.randrange(len(options))]

    def one_in(self, n: int) -> bool:
        """Whether something happens that does once in n times."""
        return self.random.randrange(n) == n - 1

    # The network so far

    @property
    def is_awkward(self) -> bool:
        """Whether the network has slopes, bounds and scales that cost digits."""
        return bool(self.slopes)

    @property
    def is_large(self) -> bool:
        """Whether the network has had its share of nesting."""
        return self._storages > _SMALL

    @property
    def form(self) -> str:
        """How layers are written that have a module and a function."""
        return "functional" if self.functional else "module"

    def spends_product(self) -> bool:
        """Whether the network may multiply two values without bounds once more."""
        self._products += 1
        return self._products <= _MOST_PRODUCTS

    def name(self, prefix: str) -> str:
        """A name that nothing else in the network has."""
        self._names += 1
        return f"{prefix}{self._names}"

    def new_storage(self) -> int:
        """The memory of a value that shares it with no other."""
        self._storages += 1
        return self._storages

    # Single steps

    def put(
        self, path: Path, node: Node, shape: tuple[int, ...] | None = None, *, alias: bool = False
    ) -> None:
        """Append a node that gives `shape` (None: the same), in the old memory or in new one."""
        storage = path.value.storage if alias else self.new_storage()
        shape = path.value.shape if shape is None else shape
        tokens = path.value.tokens and len(shape) == 2
        path.nodes.append(node)
        path.value = Value(shape, storage, tokens)

    def save(self, path: Path) -> str:
        """Keep the value for a later `recall` or for the output; the name it gets."""
        name = self.name("s")
        path.nodes.append(Save(name))
        self.saved[name] = path.value
        return name
