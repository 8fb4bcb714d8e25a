"""What the sampler knows of a value while it draws, and how sizes follow from windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rmfx.testing.networks.node import Node

INPUT = 0  # the storage of everything that shares memory with the network's inputs


@dataclass(frozen=True)
class Value:
    """A value while drawing: its shape without the batch, and whose memory it is.

    `shape` is (channels, *spatial), (features,), or with `tokens` (length, features).
    """

    shape: tuple[int, ...]
    storage: int
    tokens: bool = False

    @property
    def is_map(self) -> bool:
        return len(self.shape) > 1 and not self.tokens

    @property
    def dims(self) -> int:
        return len(self.shape) - 1

    @property
    def channels(self) -> int:
        return self.shape[-1] if self.tokens else self.shape[0]

    @property
    def size(self) -> tuple[int, ...]:
        return self.shape[1:]

    @property
    def for_channels(self) -> tuple[int, ...]:
        """The shape of a tensor that has one number for every channel."""
        return (self.channels, *(1 for _ in self.size)) if self.is_map else (self.channels,)

    def suits(self, other: Value) -> bool:
        """Whether a chain of layers can bring this value to the other's shape."""
        if self.tokens or other.tokens:
            return self.tokens and other.tokens and self.shape[0] == other.shape[0]
        return len(self.shape) == len(other.shape)


@dataclass
class Path:
    """A chain under construction: the value at its end, and how deep joins may nest inside."""

    value: Value
    depth: int = 0
    nodes: list[Node] = field(default_factory=list)

    def operand(self) -> Path:
        """An empty chain that starts at this value, for a join."""
        return Path(self.value, self.depth - 1)


def out(size: int, kernel: int, stride: int, padding: int | str, dilation: int) -> int:
    """The size a convolution gives along one axis."""
    if padding == "same":
        return size
    pad = 0 if isinstance(padding, str) else padding
    return (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1


def collapse(values: Sequence[int]) -> int | tuple[int, ...]:
    """One number for all axes, where they are equal."""
    return values[0] if len(set(values)) == 1 else tuple(values)


def pooled(size: int, kernel: int, stride: int, padding: int, *, ceil_mode: bool) -> int:
    """The size a pooling layer gives along one axis."""
    rest = size + 2 * padding - kernel
    if not ceil_mode:
        return rest // stride + 1
    count = -(-rest // stride) + 1
    # A window that would begin in the padding behind the value is left out.
    return count - 1 if (count - 1) * stride >= size + padding else count
