"""What attacks found and plain drawing does not: draws of the nodes for places and for memory.

As the constructs, every function appends to a path and leaves its shape as it is. One is drawn by
`unusual`; `FOR_MAPS` need spatial dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from .constructs import spends_product
from .digits import DIGIT_FEATURES, digit_features, scale_apart
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
from .values import INPUT, Draws, Path

Construct = Callable[[Draws, Path], None]
_WHOLE_WRITES = ("x.__setitem__",)  # choose the place themselves
_DEAF_WRITES = ("nn.init.constant_", "nn.init.constant_ keyword")  # forget what they write over


# Places
def roll(sampler: Draws, path: Path) -> None:
    """A roll along one or two dimensions, by less than the size, by it, by more, or backwards."""
    axes = [sampler.pick(_axes(path))]
    if sampler.one_in(4):
        axes.append(sampler.pick(_axes(path)))
    shifts = []
    for axis in axes:
        size = _size(sampler, path, axis)
        shifts.append(sampler.pick((1, 2, 3, 4, 6, size, size + 1, -1, -size, 12)))
    form = sampler.pick(tuple(ROLLS))
    sampler.put(path, Roll(tuple(shifts), tuple(axes), form))


def flip(sampler: Draws, path: Path) -> None:
    """Space the other way round, or the channels or the batch."""
    axis = sampler.pick(_axes(path))
    sampler.put(path, Flip((axis,), sampler.pick(("torch.flip", "x.flip"))))


def permute(sampler: Draws, path: Path) -> None:
    """Positions in another order, or in the one they have: what is the identity at one size."""
    axis = sampler.pick(_axes(path))
    size = _size(sampler, path, axis)
    orders = (
        tuple(range(size)),
        tuple(reversed(range(size))),
        tuple((i + 1) % size for i in range(size)),
        tuple(0 for _ in range(size)),
    )
    form = sampler.pick(INDICES[:-1])
    sampler.put(path, Take(axis, sampler.pick(orders), form))


def take_all(sampler: Draws, path: Path) -> None:
    """All rows by their number: the identity at this size, fewer of them at a larger one."""
    order = tuple(range(path.value.size[0]))
    sampler.put(path, Take(2, order, sampler.pick(INDICES[:-1])))


def repeat(sampler: Draws, path: Path) -> None:
    """Every position twice, and again half of them, or half first; or a layer on twice as many."""
    axis = sampler.pick(_axes(path, batch=False))
    channels, value = path.value.channels, path.value
    form = sampler.pick(("method", "function"))
    if value.shape[axis - 1] % 2 == 0 and sampler.one_in(2):
        half = (*value.shape[: axis - 1], value.shape[axis - 1] // 2, *value.shape[axis:])
        half_of_all = Take(axis, (sampler.pick((0, 1)), 2), "slice")
        sampler.put(path, half_of_all, half, alias=True)
        sampler.put(path, Repeat(axis, 2, form), value.shape)
        return
    sampler.put(path, Repeat(axis, 2, form), _resized(value.shape, axis, 2))
    if _kind(path, axis) == "channels" and sampler.one_in(2):
        sampler.affine(path, channels, "point")
        return
    sampler.put(path, Take(axis, (sampler.pick((0, 1)), 2), "slice"), value.shape, alias=True)


def mean(sampler: Draws, path: Path) -> None:
    """The mean over all of space, or along one axis, subtracted or as a gate."""
    spatial = tuple(range(2, 2 + path.value.dims))
    axes = sampler.pick((spatial, spatial, spatial[:1], spatial[-1:]))
    forms = list(STATISTICS)
    if not spends_product(sampler):
        forms.remove("x * m")
    how = sampler.pick(("x.mean", "x.mean", "torch.mean", "x.amax"))
    sampler.put(path, Mean(sampler.pick(forms), axes, how))


def focal(sampler: Draws, path: Path) -> None:
    """Focal modulation."""
    sampler.put(path, Focal(path.value.channels, path.value.dims, sampler.pick((2, 1, 3))))


def reshaped(sampler: Draws, path: Path) -> None:
    """A residual on tokens, or on a map as one row, that moves them in its branch."""
    value = path.value
    form = sampler.pick(("transpose", "permute", "flat"))
    length = math.prod(value.size)
    shape = (length * value.channels,) if form == "flat" else (length, value.channels)
    inner = Path(replace(value, shape=shape, tokens=form != "flat"))
    branch = inner.operand()
    if form != "flat" and sampler.one_in(2):
        sampler.layer(branch) if sampler.one_in(2) else sampler.affine(branch)
    sampler.pick((flip, roll))(sampler, branch)
    shortcut = inner.operand()
    sampler.join(inner, [shortcut, branch], "a + b")
    sampler.put(path, Reshaped(tuple(inner.nodes), form))


def tokens(sampler: Draws, path: Path) -> None:
    """From here on the network sees tokens; the shape is another one then."""
    value = path.value
    shape = (math.prod(value.size), value.channels)
    path.nodes.append(Tokens(sampler.pick(("transpose", "permute"))))
    path.value = replace(value, shape=shape, tokens=True)


# Memory
def write(sampler: Draws, path: Path) -> None:
    """A write into the value, which may be the fork; into what a layer gives if it is an input."""
    if path.value.storage == INPUT:
        sampler.affine(path, style="preserve")
    sampler.put(path, _write(sampler, path), alias=True)


def write_between(sampler: Draws, path: Path) -> None:
    """A join of what is read before a write and of what was written."""
    if path.value.storage == INPUT:
        sampler.affine(path, style="preserve")
    early, late = path.operand(), path.operand()
    for _ in range(sampler.pick((1, 2))):
        sampler.layer(early, style="preserve")
    sampler.fit(early, path.value.shape)
    late.nodes.append(_write(sampler, path))
    sampler.join(path, [late, early] if sampler.one_in(2) else [early, late], "a + b")


def _write(sampler: Draws, path: Path) -> Write:
    kind = sampler.pick(tuple(WRITES))
    views = list(VIEWS)
    if kind in _DEAF_WRITES and path.value.shape[0] > 1:
        views.remove("")
        views.remove("x.transpose")
        views.remove("x.detach")
    if kind in _WHOLE_WRITES:
        views = [""]
    elif not path.value.is_map:
        views.remove("later rows")
    return Write(kind, sampler.pick(views), sampler.pick((0.5, 1.5, -0.5)))


def gain(sampler: Draws, path: Path) -> None:
    """A factor in a buffer that shares memory."""
    sampler.put(path, Gain(path.value.shape[0], len(path.value.shape) - 1, sampler.pick(GAINS)))


def shared_norm(sampler: Draws, path: Path) -> None:
    """Batch norm whose statistics share memory."""
    value = path.value
    sampler.put(path, SharedNorm(value.shape[0], value.dims, sampler.one_in(3)))


# Choices
def _axes(path: Path, *, batch: bool = True) -> list[int]:
    """The dimensions of a value with its batch, the spatial ones first."""
    rank = len(path.value.shape) + 1
    return [*range(2, rank), 1, *([0] if batch else [])]


def _kind(path: Path, axis: int) -> str:
    if axis == 0:
        return "batch"
    channels = len(path.value.shape) if path.value.tokens else 1
    return "channels" if axis == channels else "space"


def _size(sampler: Draws, path: Path, axis: int) -> int:
    return path.value.shape[axis - 1] if axis else sampler.batch


def _resized(shape: tuple[int, ...], axis: int, times: int) -> tuple[int, ...]:
    return (*shape[: axis - 1], shape[axis - 1] * times, *shape[axis:])


ANYWHERE: tuple[Construct, ...] = (
    *(roll, roll, flip, permute, repeat, write, write, write_between, write_between),
    *(gain, shared_norm),
)
FOR_MAPS: tuple[Construct, ...] = (roll, flip, permute, mean, mean, focal, reshaped, reshaped)


def unusual(sampler: Draws, path: Path) -> None:
    """One of these that suits the value."""
    suiting = [*ANYWHERE, *(FOR_MAPS if path.value.is_map else ())]
    if sampler.is_awkward:
        suiting += [scale_apart] * 4
    sampler.pick(suiting)(sampler, path)


# Features
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
