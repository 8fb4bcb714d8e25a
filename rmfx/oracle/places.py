"""Values of two networks at one place, and how far apart they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .equivalence import largest, numbers_of
from .runs import Run

ROUNDINGS = 10  # times the effect of rounding is allowed for


@dataclass(frozen=True, eq=False)
class Place:
    """A value before and after.

    Attributes:
        text: where it is, and what was done there.
        key: the name of the join, or the number of the output.
        expected, actual: the value before and after.
        scale: the largest number from which it is computed.
        module: the path of the module that adds.
        least: the largest number of the smallest operand, which a dropped skip would leave out.
    """

    text: str
    key: str | int
    expected: Any
    actual: Any
    scale: float
    module: str = ""
    least: float = 0.0

    def error(self) -> float:
        """The largest difference."""
        return difference(self.expected, self.actual)

    def moved(self, other: Run) -> float:
        """How far another run of the original is from the first; 0 where it did not get here."""
        return difference(self.expected, self._in(other), unknown=0.0)

    def where_finite(self, others: Sequence[Run]) -> Place:
        """The same without the places where rounding decides whether a number is finite.

        It decides where other runs of the original differ in about as many.
        """
        differ = _not_finite_alike(self.expected, self.actual)
        if differ is None or not bool(differ.any()):
            return self
        found = (_not_finite_alike(self.expected, self._in(other)) for other in others)
        most = max((int(one.sum()) for one in found if one is not None), default=0)
        if int(differ.sum()) > ROUNDINGS * most:
            return self
        kept = [x.masked_fill(differ, 0) for x in (self.expected, self.actual)]
        return replace(self, expected=kept[0], actual=kept[1])

    def _in(self, other: Run) -> Any:
        """The value of another run, in the type of this one."""
        if isinstance(self.key, str):
            found = other.values.get(self.key)
        else:
            leaves = pytree.tree_leaves(other.output)
            found = leaves[self.key] if self.key < len(leaves) else None
        if isinstance(found, Tensor) and isinstance(self.expected, Tensor):
            return found.to(self.expected.dtype)
        return found


def _not_finite_alike(a: Any, b: Any) -> Tensor | None:
    """Where one value is finite and the other is not, or another infinity."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
        return None
    if not a.is_floating_point() or a.layout is not torch.strided:
        return None
    one, two = (torch.where(x.isfinite(), 0, x) for x in (numbers_of(a), numbers_of(b)))
    alike: Tensor = one.eq(two) | (one.isnan() & two.isnan())
    return ~alike


def told(place: Place, allowed: float) -> str:
    """How far two values are apart, in words."""
    scale = place.scale or 1.0
    return (
        f"{place.text} differs by {place.error() / scale:.2g}, relative to the largest number it "
        f"is computed from, where {allowed / scale:.2g} would be rounding"
    )


def difference(expected: Any, actual: Any, unknown: float = math.inf) -> float:
    """The largest difference; `unknown` where there is no such number.

    Of whole numbers and truth values it is the share of those that differ. What is not finite, such
    as the mask of an attention, has to be so on both sides.
    """
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        return 0.0 if expected is actual or expected == actual else unknown
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return unknown
    is_discrete = not (expected.is_floating_point() or expected.is_complex())
    expected, actual = numbers_of(expected), numbers_of(actual)
    if torch.equal(expected, actual):
        return 0.0
    if is_discrete:
        return float((expected != actual).double().mean())
    finite = expected.isfinite()
    if not bool(finite.all()):
        same = torch.equal(expected.nan_to_num()[~finite], actual.nan_to_num()[~finite])
        nans = torch.equal(expected.isnan(), actual.isnan())
        if not (same and nans):
            return unknown
        expected, actual = expected[finite], actual[finite]
    found = largest(expected - actual)
    return found if math.isfinite(found) else unknown


def scale_of(x: Any) -> float:
    """The largest finite number, 0 of values that are no numbers or whole ones."""
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
        return 0.0
    x = numbers_of(x)
    return largest(x[x.isfinite()])


def has_numbers(output: Any) -> bool:
    """Whether some value is finite, or there is none."""
    tensors = [numbers_of(x) for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]
    filled = [x for x in tensors if x.numel()]
    return not filled or any(bool(x.isfinite().any()) for x in filled)
