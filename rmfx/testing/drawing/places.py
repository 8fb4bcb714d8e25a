"""Draws of nodes that move values along a dimension or mix all of space; see `networks.places`."""

from __future__ import annotations

import math
from dataclasses import replace

from rmfx.testing.networks.places import (
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

from .draws import Draws
from .joins import join
from .layers import affine, layer
from .things import Thing, on_maps
from .values import Path


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
        affine(sampler, path, channels, "point")
        return
    sampler.put(path, Take(axis, (sampler.pick((0, 1)), 2), "slice"), value.shape, alias=True)


def mean(sampler: Draws, path: Path) -> None:
    """The mean over all of space, or along one axis, subtracted or as a gate."""
    spatial = tuple(range(2, 2 + path.value.dims))
    axes = sampler.pick((spatial, spatial, spatial[:1], spatial[-1:]))
    forms = list(STATISTICS)
    if not sampler.spends_product():
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
        layer(sampler, branch) if sampler.one_in(2) else affine(sampler, branch)
    sampler.pick((flip, roll))(sampler, branch)
    shortcut = inner.operand()
    join(sampler, inner, [shortcut, branch], "a + b")
    sampler.put(path, Reshaped(tuple(inner.nodes), form))


def tokens(sampler: Draws, path: Path) -> None:
    """From here on the network sees tokens; the shape is another one then."""
    value = path.value
    shape = (math.prod(value.size), value.channels)
    path.nodes.append(Tokens(sampler.pick(("transpose", "permute"))))
    path.value = replace(value, shape=shape, tokens=True)


PLACES = (
    Thing(roll, times=2),
    *map(Thing, (flip, permute, repeat)),
    *(Thing(draw, on_maps) for draw in (roll, flip, permute)),
    Thing(mean, on_maps, times=2),
    Thing(focal, on_maps),
    Thing(reshaped, on_maps, times=2),
)


# Dimensions
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
