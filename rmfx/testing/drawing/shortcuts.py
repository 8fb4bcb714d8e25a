"""Draws of shortcuts: the ways to bring a value to a shape without an activation."""

from __future__ import annotations

import functools

from rmfx.testing.networks.layers import Conv
from rmfx.testing.networks.operations import Channels, PadChannels, Pool, Slice

from .draws import Draws
from .layers import affine, count_groups, perhaps_norm
from .things import Thing, draw_one
from .values import Path, Value, collapse, out, pooled

Shape = tuple[int, ...]
_Window = tuple[int, int, int, bool]  # kernel, stride, padding, ceil_mode
_POOLS: tuple[_Window, ...] = (
    *((2, 2, 0, True), (2, 2, 0, False), (1, 2, 0, False), (3, 2, 1, False)),
)


def fit(sampler: Draws, path: Path, shape: Shape) -> None:
    """Bring the value to the shape without an activation; nothing where it already fits."""
    value = path.value
    if value.shape == shape and not sampler.one_in(6):
        return
    if not value.is_map:
        _fit_features(sampler, path, shape)
        return
    draw_one(sampler, path, _WAYS, shape)
    if path.nodes and isinstance(path.nodes[-1], Conv):
        perhaps_norm(sampler, path)


def _fit_features(sampler: Draws, path: Path, shape: Shape) -> None:
    value = path.value
    if shape[-1] < value.channels and sampler.one_in(3):
        sampler.put(path, Channels(0, shape[-1], -1), shape, alias=True)
    elif shape[-1] > value.channels and sampler.one_in(3):
        sampler.put(path, PadChannels(0, shape[-1] - value.channels, 0), shape)
    else:
        affine(sampler, path, shape[-1])


def _fit_channels(sampler: Draws, path: Path, channels: int) -> None:
    """Zero channels where some lack (option A), the first ones where there are too many."""
    value = path.value
    lack = channels - value.channels
    shape = (channels, *value.size)
    if lack > 0 and sampler.one_in(3):
        affine(sampler, path, channels, "point")
    elif lack == value.channels and sampler.one_in(3):
        sampler.put(path, PadChannels(0, lack, value.dims, "cat"), shape)
    elif lack > 0:
        before = sampler.pick((0, lack // 2))
        sampler.put(path, PadChannels(before, lack - before, value.dims), shape)
    elif lack < 0:
        sampler.put(path, Channels(0, channels), shape, alias=True)


# By a convolution
def _project(sampler: Draws, path: Path, shape: Shape) -> None:
    """A convolution with any kernel that fits."""
    value = path.value
    options = [_windows(n, m) for n, m in zip(value.size, shape[1:], strict=True)]
    common = [option for option in options[0] if all(option in other for other in options)]
    if common:
        chosen = [sampler.pick(common)] * value.dims
    else:
        chosen = [sampler.pick(option) for option in options]
    kernel, stride, padding = zip(*chosen, strict=True)
    grouping = sampler.pick(("one", "one", "grouped"))
    node = Conv(
        value.channels,
        shape[0],
        kernel,
        collapse(stride),
        collapse(padding),
        groups=count_groups(sampler, value.channels, shape[0], grouping),
        bias=sampler.one_in(2),
        form=sampler.form,
    )
    sampler.put(path, node, shape)


@functools.cache
def _windows(size: int, target: int) -> tuple[tuple[int, int, int], ...]:
    """Every small (kernel, stride, padding) that brings one axis from size to target."""
    found = [
        (kernel, stride, padding)
        for stride in (1, 2, 3)
        for kernel in (1, 2, 3, 4)
        for padding in (0, 1, 2)
        if padding < max(kernel, 2) and out(size, kernel, stride, padding, 1) == target
    ]
    padding = max(0, (target - size + 1) // 2)
    general = (size + 2 * padding - target + 1, 1, padding)
    return tuple(found) or (general,)


# By leaving positions out
def _crops(sampler: Draws, path: Path, shape: Shape) -> bool:
    """Whether the value has what is wanted, or more."""
    pairs = zip(path.value.size, shape[1:], strict=True)
    return all(target <= n for n, target in pairs)


def _crops_some(sampler: Draws, path: Path, shape: Shape) -> bool:
    return path.value.size != shape[1:] and _crops(sampler, path, shape)


def _crop(sampler: Draws, path: Path, shape: Shape) -> None:
    """Leave out what is too much: the same at both ends, or mostly so."""
    surplus = [n - target for n, target in zip(path.value.size, shape[1:], strict=True)]
    starts = tuple(n // 2 for n in surplus)
    if sampler.one_in(4):
        starts = tuple(sampler.random.randrange(n + 1) for n in surplus)
    if any(surplus):
        ends = tuple(n - start for n, start in zip(surplus, starts, strict=True))
        form = sampler.pick(("index", "pad"))
        node = Slice(starts, ends, 1, form)
        sampler.put(path, node, (path.value.channels, *shape[1:]), alias=form == "index")
    _fit_channels(sampler, path, shape[0])


def _steps(step: int, sampler: Draws, path: Path, shape: Shape) -> bool:
    """Whether every `step`-th position is wanted."""
    pairs = zip(path.value.size, shape[1:], strict=True)
    return all(-(-n // step) == target for n, target in pairs)


def _take_steps(step: int, sampler: Draws, path: Path, shape: Shape) -> None:
    """Every `step`-th position, by a slice or by a pool that sees one at a time."""
    value = path.value
    wanted = (value.channels, *shape[1:])
    if sampler.one_in(5):
        node = Pool("max", value.dims, 1, step, ceil_mode=sampler.one_in(2))
        sampler.put(path, node, wanted)
    else:
        none = (0,) * value.dims
        sampler.put(path, Slice(none, none, step), wanted, alias=True)
    _fit_channels(sampler, path, shape[0])


# By an average
def _pools(value: Value, shape: Shape) -> list[_Window]:
    """The windows by which an average pool gives the size."""
    sizes = list(zip(value.size, shape[1:], strict=True))
    return [window for window in _POOLS if all(_pools_to(n, m, window) for n, m in sizes)]


def _pools_to(size: int, target: int, window: _Window) -> bool:
    *numbers, ceil_mode = window
    return size >= numbers[0] and pooled(size, *numbers, ceil_mode=ceil_mode) == target


def _averages(sampler: Draws, path: Path, shape: Shape) -> bool:
    return bool(_pools(path.value, shape))


def _average(sampler: Draws, path: Path, shape: Shape) -> None:
    """An average pool, and a pointwise convolution."""
    value = path.value
    window: _Window = sampler.pick(_pools(value, shape))
    node = Pool("avg", value.dims, *window, not sampler.one_in(2), sampler.form)
    sampler.put(path, node, (value.channels, *shape[1:]))
    affine(sampler, path, shape[0], "point")


_WAYS = (
    Thing(_project, times=2),
    Thing(_crop, _crops),
    Thing(_crop, _crops_some),
    *(
        Thing(functools.partial(_take_steps, step), functools.partial(_steps, step), times=3)
        for step in (2, 3)
    ),
    Thing(_average, _averages, times=2),
)
