"""Compares a network with what a pass made of it: at the example's size, and at others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Set
from typing import Any

from torch import Tensor, fx, nn

from rmfx.algebra.digits import AFFORDED, EXACTNESS, bits_of, is_half
from rmfx.errors import VerificationError
from rmfx.interval import Interval
from rmfx.oracle.equivalence import Equivalence, Traced, compared, default_tolerance, traced
from rmfx.oracle.pair import NO_NUMBERS
from rmfx.oracle.verification import verified
from rmfx.report import META_KEY, Report, SiteReport

CALIBRATED = EXACTNESS[-1]
SHIFTED = 1e-8  # the error that a shift may make: it costs digits
OTHER_BATCH = "compared at another batch"
OTHER_SIZE = "compared at other sizes"
COPRIME = "compared at a coprime size"
ONE = "compared at a size of 1"
SIZES = (OTHER_BATCH, OTHER_SIZE, COPRIME, ONE)  # what is counted of the sizes compared
Compared = tuple[Equivalence, frozenset[str]]


class NoNumbersError(AssertionError):
    """The original gives no finite values for these inputs: nothing is said about the pass."""


def compare(
    before: nn.Module,
    after: Any,
    inputs: tuple[Tensor, ...],
    *,
    input_range: Interval | None = None,
    source: Traced = traced,
) -> Compared:
    """Demand that both compute the same, at every size that the result takes.

    Args:
        before: the original.
        after: what a pass made of it.
        inputs: the example's.
        input_range: for which alone the result holds.
        source: tells the original's graph.

    Returns:
        What was measured at the example's size, and which of `SIZES` were compared.

    Raises:
        NoNumbersError: the original gives no finite values for the example.
        AssertionError: they differ on the example.
        VerificationError: they differ on other inputs, or the result fails where the original runs
            and no condition of the result says why.

    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).double().eval()
    >>> sorted(compare(net, net, (torch.ones(1, 1, 4, 4).double(),))[1])[:2]
    ['compared at a coprime size', 'compared at another batch']
    """
    found = _at_example(before, after, inputs, source)
    if any(row.exactness == CALIBRATED for row in rows_of(after)):
        return found, frozenset()  # it holds for the calibration's values alone
    shapes = verified(before, after, inputs, None, input_range, source).shapes
    return found, frozenset(_sizes(shapes, tuple(inputs[0].shape)))


def rows_of(after: Any) -> tuple[SiteReport, ...]:
    """What a pass did at every join, if it left a report."""
    found = getattr(after, "meta", {}).get(META_KEY)
    return found.rows if isinstance(found, Report) else ()


def allowed(before: nn.Module, after: Any, inputs: tuple[Tensor, ...]) -> float:
    """The relative error that is rounding, for the types and the ways past activations in use."""
    rows = rows_of(after)
    tolerance: float = default_tolerance(before, inputs)
    if not any(is_half(x.dtype) for x in inputs):  # the tolerance of half types is wide enough
        # A way that says it costs more than a type affords is not to be chosen at all.
        digits = min(bits_of(x.dtype) for x in inputs)
        lost = min(AFFORDED * digits, max((row.bits for row in rows), default=0.0))
        tolerance *= 2.0**lost
    if any(row.strategy == "shift" for row in rows):
        tolerance = max(tolerance, SHIFTED)
    return tolerance


class TracedOnce:
    """Tells the graph of one original, which is traced once for each set of joins."""

    def __init__(self) -> None:
        self._known: dict[Set[str], fx.GraphModule] = {}

    def __call__(
        self, before: nn.Module, inputs: tuple[Any, ...], names: Set[str]
    ) -> fx.GraphModule:
        key = frozenset(names)
        if key not in self._known:
            self._known[key] = traced(before, inputs, names)
        return self._known[key]


def _at_example(
    before: nn.Module, after: Any, inputs: tuple[Tensor, ...], source: Traced
) -> Equivalence:
    tolerance = allowed(before, after, inputs)
    try:
        return compared(before, after, inputs, tolerance, source)
    except AssertionError as error:
        # What cancels, as a map minus its own mean, may be nothing but rounding, and what is too
        # large for a half type tells nothing.
        try:
            found = verified(before, after, inputs, tolerance, None, source, [inputs])
        except VerificationError:
            raise error from None
        if found.reason == NO_NUMBERS:
            raise NoNumbersError(str(error)) from error
        if found.reason:
            raise
    return Equivalence(max(found.error, found.magnified), found.joins)


def _sizes(shapes: tuple[Any, ...], example: tuple[int, ...]) -> Iterator[str]:
    """Which of `SIZES` the shapes are, of which each holds one for every input."""
    for batch, _, *space in (tried[0] for tried in shapes):
        if batch != example[0]:
            yield OTHER_BATCH
        pairs = list(zip(space, example[2:], strict=True))
        if any(size != own for size, own in pairs):
            yield OTHER_SIZE
        if any(size != own and size > 1 and math.gcd(size, own) == 1 for size, own in pairs):
            yield COPRIME
        if space and set(space) == {1} != set(example[2:]):
            yield ONE
