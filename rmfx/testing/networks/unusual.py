"""The features of the nodes for places and for memory, and of what costs digits."""

from __future__ import annotations

from collections.abc import Iterator

from .digits import DIGIT_FEATURES, digit_features
from .joins import Join
from .memory import GAINS, VIEWS, WRITES, Gain, SharedNorm, Write
from .node import Node
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


def unusual_features(node: Node, depth: int) -> Iterator[str]:
    """The features of these nodes; `depth` counts the joins around."""
    yield from digit_features(node)
    if isinstance(node, (Roll, Flip, Take, Repeat)):
        yield from _place_features(node)
    elif isinstance(node, Mean):
        yield f"mean over {'space' if len(node.axes) > 1 else 'one dimension'}"
        yield f"joined with its mean: {node.form}"
        if depth:
            yield "spatial mean inside a branch"
    elif isinstance(node, Focal):
        yield "focal modulation"
    elif isinstance(node, Tokens):
        yield "map seen as tokens"
    elif isinstance(node, Reshaped):
        yield "residual on one row" if node.form == "flat" else "residual on tokens of a map"
    elif isinstance(node, Write):
        yield f"write by {node.kind}"
        if node.view:
            yield f"write through {node.view}"
    elif isinstance(node, Gain):
        yield f"factor in a buffer: {node.form}"
    elif isinstance(node, SharedNorm):
        yield "statistics written by forward" if node.writes else "statistics that are views"
    elif isinstance(node, Join) and len(node.operands) == 2:
        begins = [isinstance(chain[0], Write) for chain in node.operands if chain]
        if sorted(begins) == [False, True]:
            yield "write between two reads"


def _place_features(node: Roll | Flip | Take | Repeat) -> Iterator[str]:
    name = {Roll: "roll", Flip: "flip", Take: "index", Repeat: "repeat_interleave"}[type(node)]
    axes = node.dims if isinstance(node, (Roll, Flip)) else (node.axis,)
    for axis in axes:
        yield f"{name} along {('batch', 'channels', 'space')[min(axis, 2)]}"
    if isinstance(node, Roll):
        yield f"roll as {node.form}"
        if len(node.dims) > 1:
            yield "roll along several dimensions"
        if min(node.shifts) < 0:
            yield "roll backwards"
    if isinstance(node, Take):
        yield f"index as {node.form}"
        if len(node.indices) > 1 and node.indices == tuple(range(len(node.indices))):
            yield "index of all there is at one size"


_PLACES = ("space", "channels", "batch")
UNUSUAL_FEATURES = (
    *DIGIT_FEATURES,
    *(f"{name} along {kind}" for name in ("roll", "index") for kind in _PLACES),
    *("flip along space", "flip along batch", "flip along channels"),
    *("repeat_interleave along space", "repeat_interleave along channels"),
    *(f"roll as {form}" for form in ROLLS),
    *("roll along several dimensions", "roll backwards"),
    *(f"index as {form}" for form in INDICES),
    "index of all there is at one size",
    *("mean over space", "mean over one dimension"),
    *(f"joined with its mean: {form}" for form in STATISTICS),
    *("spatial mean inside a branch", "focal modulation"),
    *("map seen as tokens", "residual on tokens of a map", "residual on one row"),
    *(f"write by {kind}" for kind in WRITES),
    *(f"write through {view}" for view in VIEWS if view),
    "write between two reads",
    *(f"factor in a buffer: {form}" for form in GAINS),
    *("statistics that are views", "statistics written by forward"),
    "floor pool beside a strided layer",
)
