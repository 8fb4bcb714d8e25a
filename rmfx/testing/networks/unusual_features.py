"""The features of what attacks found: nodes for places and for memory, and what costs digits."""

from __future__ import annotations

from collections.abc import Iterator

from .counted import Counted, Place
from .digits import BOUNDS, SCALES, SLOPES
from .joins import Join
from .layers import Act
from .memory import GAINS, VIEWS, WRITES, Gain, SharedNorm, Write
from .operations import Arithmetic
from .places import (
    INDICES,
    ROLLS,
    STATISTICS,
    Flip,
    Focal,
    Mean,
    Repeat,
    Reshaped,
    Roll,
    Take,
    Tokens,
)

UNUSUAL = Counted()
_AXES = ("batch", "channels", "space")


# Places
def _along(name: str, *axes: int) -> Iterator[str]:
    return (f"{name} along {_AXES[min(axis, 2)]}" for axis in axes)


@UNUSUAL.of(
    Roll,
    names=(
        *_along("roll", 0, 1, 2),
        *(f"roll as {form}" for form in ROLLS),
        *("roll along several dimensions", "roll backwards"),
    ),
)
def _(node: Roll, place: Place) -> Iterator[str]:
    yield from _along("roll", *node.dims)
    yield f"roll as {node.form}"
    if len(node.dims) > 1:
        yield "roll along several dimensions"
    if min(node.shifts) < 0:
        yield "roll backwards"


@UNUSUAL.of(Flip, names=_along("flip", 0, 1, 2))
def _(node: Flip, place: Place) -> Iterator[str]:
    yield from _along("flip", *node.dims)


@UNUSUAL.of(
    Take,
    names=(
        *_along("index", 0, 1, 2),
        *(f"index as {form}" for form in INDICES),
        "index of all there is at one size",
    ),
)
def _(node: Take, place: Place) -> Iterator[str]:
    yield from _along("index", node.axis)
    yield f"index as {node.form}"
    if len(node.indices) > 1 and node.indices == tuple(range(len(node.indices))):
        yield "index of all there is at one size"


@UNUSUAL.of(Repeat, names=_along("repeat_interleave", 1, 2))
def _(node: Repeat, place: Place) -> Iterator[str]:
    yield from _along("repeat_interleave", node.axis)


@UNUSUAL.of(
    Mean,
    names=(
        *("mean over space", "mean over one dimension", "spatial mean inside a branch"),
        *(f"joined with its mean: {form}" for form in STATISTICS),
    ),
)
def _(node: Mean, place: Place) -> Iterator[str]:
    yield f"mean over {'space' if len(node.axes) > 1 else 'one dimension'}"
    yield f"joined with its mean: {node.form}"
    if place.depth:
        yield "spatial mean inside a branch"


@UNUSUAL.of(Focal, names=("focal modulation",))
def _(node: Focal, place: Place) -> Iterator[str]:
    yield "focal modulation"


@UNUSUAL.of(Tokens, names=("map seen as tokens",))
def _(node: Tokens, place: Place) -> Iterator[str]:
    yield "map seen as tokens"


@UNUSUAL.of(Reshaped, names=("residual on one row", "residual on tokens of a map"))
def _(node: Reshaped, place: Place) -> Iterator[str]:
    yield "residual on one row" if node.form == "flat" else "residual on tokens of a map"


# Memory
@UNUSUAL.of(
    Write,
    names=(
        *(f"write by {kind}" for kind in WRITES),
        *(f"write through {view}" for view in VIEWS if view),
    ),
)
def _(node: Write, place: Place) -> Iterator[str]:
    yield f"write by {node.kind}"
    if node.view:
        yield f"write through {node.view}"


@UNUSUAL.of(Gain, names=(f"factor in a buffer: {form}" for form in GAINS))
def _(node: Gain, place: Place) -> Iterator[str]:
    yield f"factor in a buffer: {node.form}"


@UNUSUAL.of(SharedNorm, names=("statistics written by forward", "statistics that are views"))
def _(node: SharedNorm, place: Place) -> Iterator[str]:
    yield "statistics written by forward" if node.writes else "statistics that are views"


@UNUSUAL.of(Join, names=("write between two reads",))
def _(node: Join, place: Place) -> Iterator[str]:
    begins = [isinstance(chain[0], Write) for chain in node.operands if chain]
    if len(node.operands) == 2 and sorted(begins) == [False, True]:
        yield "write between two reads"


# Digits
@UNUSUAL.of(Arithmetic, names=("values of very different scale",))
def _(node: Arithmetic, place: Place) -> Iterator[str]:
    if abs(node.value) in SCALES:
        yield "values of very different scale"


@UNUSUAL.of(
    Act,
    names=(
        *("huge bounds", "tiny bounds"),
        *("slope near -1", "slope near 0", "slope near 1"),
    ),
)
def _(node: Act, place: Place) -> Iterator[str]:
    if node.kind == "hardtanh" and node.args in BOUNDS:
        yield "huge bounds" if max(map(abs, node.args)) > 1e4 else "tiny bounds"
    slopes = node.args if node.kind == "leaky_relu" else node.args[1:]
    if node.kind in ("leaky_relu", "prelu") and slopes and slopes[0] in SLOPES:
        yield f"slope near {round(slopes[0])}"
