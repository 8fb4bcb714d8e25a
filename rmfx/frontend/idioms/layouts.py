"""Layouts: where the axes of one value stand in another one that holds the same numbers.

    flatten(2) of (n, c, h, w) is (n), (c), (h, w); transposed it is (n), (h, w), (c)
    unflatten(1, (g, c // g)) of it is (n), (c, outer), (c, inner), (h), (w)

A dimension is a row of axes, the outermost first; an axis may be divided into an outer and an inner
part. Every rearrangement is a law on these rows, whatever numbers the value holds, and where its
sizes are products of the same sizes it holds at all of them. A rearrangement that ends where
another began is none: what stood between acts on the axes, and so on the value itself.

Axes of one position stand nowhere: wherever they are put, it changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Size:
    """A product of a number and of sizes that vary, which are known by a symbol each."""

    number: int = 1
    powers: frozenset[tuple[Hashable, int]] = field(default_factory=frozenset)

    @classmethod
    def of(cls, symbol: Hashable) -> Size:
        """A size that varies."""
        return cls(1, frozenset([(symbol, 1)]))

    def __mul__(self, other: Size) -> Size:
        return Size(self.number * other.number, self._powers_with(other, 1))

    def over(self, other: Size) -> Size | None:
        """What times the other one gives this one, None if nothing does at all sizes."""
        powers = self._powers_with(other, -1)
        if other.number == 0 or self.number % other.number or any(n < 0 for _, n in powers):
            return None
        return Size(self.number // other.number, powers)

    def _powers_with(self, other: Size, sign: int) -> frozenset[tuple[Hashable, int]]:
        found = dict(self.powers)
        for symbol, count in other.powers:
            found[symbol] = found.get(symbol, 0) + sign * count
        return frozenset((symbol, count) for symbol, count in found.items() if count)

    @property
    def is_number(self) -> bool:
        """Whether it is the same at all sizes of the inputs."""
        return not self.powers


ONE = Size()


def product(sizes: Iterable[Size]) -> Size:
    """Of several sizes."""
    return math.prod(sizes, start=ONE)


@dataclass(frozen=True)
class Part:
    """An axis, or a part of one.

    Attributes:
        axis: of the value whose axes are meant.
        step: how far neighbours in this part are from one another along the axis.
        size: how many positions it has.
    """

    axis: int
    step: int
    size: Size


Row = tuple[Part, ...]
Rows = tuple[Row, ...]


def straight(sizes: Sequence[Size]) -> Rows:
    """Every axis in its own place."""
    return tuple(whole(axis, size) for axis, size in enumerate(sizes))


def whole(axis: int, size: Size) -> Row:
    """A dimension that is one axis."""
    return () if size == ONE else (Part(axis, 1, size),)


def size_of(row: Row) -> Size:
    """Of a dimension."""
    return product(part.size for part in row)


def reshaped(rows: Rows, sizes: Sequence[Size | None]) -> Rows | None:
    """The same values in dimensions of other sizes, None if a size does not end between parts.

    Args:
        sizes: at most one of them None, for what is left.
    """
    total, known = size_of(sum(rows, ())), product(size for size in sizes if size is not None)
    rest = total.over(known)
    if rest is None or (None not in sizes and rest != ONE) or sizes.count(None) > 1:
        return None
    left = [part for row in rows for part in row]
    found = []
    for size in sizes:
        row = _taken(left, rest if size is None else size)
        if row is None:
            return None
        found.append(_joined(row))
    return tuple(found)


def _taken(left: list[Part], size: Size) -> list[Part] | None:
    """The first parts of those that are left, which make up a size together."""
    found: list[Part] = []
    while size != ONE:
        if not left:
            return None
        part = left.pop(0)
        rest, inner = size.over(part.size), part.size.over(size)
        if rest is not None:
            found.append(part)
            size = rest
        elif inner is not None and part.size.is_number:
            found.append(Part(part.axis, part.step * inner.number, size))
            left.insert(0, Part(part.axis, part.step, inner))
            size = ONE
        else:
            return None
    return found


def _joined(row: Sequence[Part]) -> Row:
    """A dimension in which neighbouring parts of one axis are one."""
    found: list[Part] = []
    for part in row:
        last = found[-1] if found else None
        meets = last and last.axis == part.axis and part.size.is_number
        if last is not None and meets and last.step == part.step * part.size.number:
            found[-1] = Part(part.axis, part.step, last.size * part.size)
        else:
            found.append(part)
    return tuple(found)


def in_straight(value: Tensor, rows: Rows, sizes: Sequence[Size]) -> Tensor | None:
    """A constant that meets a value in some layout, as it meets the value's axes in order.

    Args:
        value: that is spread out over dimensions in which it has one position.
        rows: the layout.
        sizes: of all axes.
    """
    missing = len(rows) - value.dim()
    own = (1,) * missing + tuple(value.shape)
    if missing < 0:
        return None
    parts: list[Part] = []
    shape: list[int] = []
    for size, row in zip(own, rows, strict=True):
        if size != 1 and size_of(row) != Size(size):
            return None  # it would spread out the value, or meets sizes that vary
        parts += row
        shape += [part.size.number if size != 1 else 1 for part in row]
    touched = {part.axis for part, size in zip(parts, shape, strict=True) if size != 1}
    order = sorted(range(len(parts)), key=lambda i: (parts[i].axis, -parts[i].step))
    full = [parts[i].size.number if parts[i].axis in touched else 1 for i in order]
    if any(parts[i].axis in touched and not parts[i].size.is_number for i in order):
        return None
    spread = value.reshape(shape).permute(order).expand(full)
    axes = range(min(touched, default=len(sizes) - min(value.dim(), 1)), len(sizes))
    return spread.reshape([sizes[axis].number if axis in touched else 1 for axis in axes])
