"""Compares a network with what a pass made of it: at the example's size, and at others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ._activation import Interval
from ._digits import AFFORDED, EXACTNESS, bits_of
from ._equivalence import (
    Equivalence,
    assert_equivalent,
    default_tolerance,
    noise_floor,
)
from ._verification import MOVES, verify
from .report import META_KEY, Report, SiteReport

CALIBRATED = EXACTNESS[-1]
HALF = 12  # more bits than a half type has
ROUNDINGS = 5  # of the inputs, whose effect is allowed for
SHIFTED = 1e-8  # the error that a shift may make: it costs digits
OTHER_BATCH = "compared at another batch"
OTHER_SIZE = "compared at other sizes"
COPRIME = "compared at a coprime size"
ONE = "compared at a size of 1"
SIZES = (OTHER_BATCH, OTHER_SIZE, COPRIME, ONE)  # what is counted of the sizes compared

Compared = tuple[Equivalence, frozenset[str]]


def compare(
    before: nn.Module,
    after: Any,
    inputs: tuple[Tensor, ...],
    *,
    input_range: Interval | None = None,
) -> Compared:
    """Demand that both compute the same, at every size that the result takes.

    Args:
        before: the original.
        after: what a pass made of it.
        inputs: the example's.
        input_range: for which alone the result holds.

    Returns:
        What was measured at the example's size, and which of `SIZES` were compared.

    Raises:
        AssertionError: they differ on the example.
        VerificationError: they differ on other inputs, or the result fails where the original runs
            and no condition of the result says why.

    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).double().eval()
    >>> sorted(compare(net, net, (torch.ones(1, 1, 4, 4).double(),))[1])[:2]
    ['compared at a coprime size', 'compared at another batch']
    """
    found = _at_example(before, after, inputs)
    if any(row.exactness == CALIBRATED for row in rows_of(after)):
        return found, frozenset()  # it holds for the calibration's values alone
    shapes = verify(before, after, inputs, input_range=input_range).shapes
    return found, frozenset(_sizes(shapes, tuple(inputs[0].shape)))


def rows_of(after: Any) -> tuple[SiteReport, ...]:
    """What a pass did at every join, if it left a report."""
    found = getattr(after, "meta", {}).get(META_KEY)
    return found.rows if isinstance(found, Report) else ()


def allowed(before: nn.Module, after: Any, inputs: tuple[Tensor, ...]) -> float:
    """The relative error that is rounding, for the types and the ways past activations in use."""
    rows = rows_of(after)
    tolerance: float = default_tolerance(before, inputs)
    digits = min(bits_of(x.dtype) for x in inputs)
    if digits > HALF:  # the tolerance of half types is wide enough
        # A way that says it costs more than a type affords is not to be chosen at all.
        lost = min(AFFORDED * digits, max((row.bits for row in rows), default=0.0))
        tolerance *= 2.0**lost
    if any(row.strategy == "shift" for row in rows):
        tolerance = max(tolerance, SHIFTED)
    return tolerance


def _at_example(before: nn.Module, after: Any, inputs: tuple[Tensor, ...]) -> Equivalence:
    tolerance = allowed(before, after, inputs)
    try:
        return assert_equivalent(before, after, inputs, tolerance=tolerance)
    except AssertionError:
        # What cancels, as a map minus its own mean, may be nothing but rounding.
        noise = max(noise_floor(before, after, inputs, seed=seed) for seed in range(MOVES))
        if not ROUNDINGS * noise > tolerance:
            raise
    return assert_equivalent(before, after, inputs, tolerance=ROUNDINGS * noise)


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
