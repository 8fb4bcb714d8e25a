"""Draws of what works on space by windows: pools, blurs, padding, transposed convolutions.

Those of `WINDOWS` leave the shape as it is.
"""

from __future__ import annotations

from rmfx.testing.networks.further import Blur, Deconv
from rmfx.testing.networks.layers import Conv
from rmfx.testing.networks.operations import Pad, Pool

from .draws import Draws
from .layers import act, affine
from .things import Thing, on_maps
from .values import Path, collapse, out, pooled


# Pools
def pool(sampler: Draws, path: Path) -> None:
    """A pool of stride 2, or one that shrinks by one, rounding down or up."""
    value = path.value
    windows = ((2, 2, 0), (3, 2, 1), (2, 1, 0), (3, 2, 0))
    fits = [window for window in windows if min(value.size) >= window[0]]
    if not fits:
        return
    kernel, stride, padding = sampler.pick(fits)
    kind = sampler.pick(("avg", "max"))
    ceil_mode = sampler.one_in(2)
    counts = not sampler.one_in(4)
    size = [pooled(n, kernel, stride, padding, ceil_mode=ceil_mode) for n in value.size]
    node = Pool(kind, value.dims, kernel, stride, padding, ceil_mode, counts, sampler.form)
    sampler.put(path, node, (value.channels, *size))


def small_pool(sampler: Draws, path: Path) -> None:
    """A pool of stride 1 that keeps the size; in three dimensions torch asks for as much to see."""
    if min(path.value.size) < 3:
        affine(sampler, path, style="preserve")
        return
    form = sampler.pick(("module", "functional"))
    kind, counts = sampler.pick((("avg", True), ("max", True), ("avg", False)))
    ceil_mode = sampler.one_in(3)
    sampler.put(path, Pool(kind, path.value.dims, 3, 1, 1, ceil_mode, counts, form))


def pool_all(sampler: Draws, path: Path) -> None:
    """A pool over all positions."""
    value = path.value
    kind = sampler.pick(("global avg", "mean", "global max"))
    node = Pool(kind, value.dims, form=sampler.form)
    sampler.put(path, node, (value.channels, *(1 for _ in value.size)))


def blur(sampler: Draws, path: Path) -> None:
    """A blur pool of stride 1; the strided ones are between the blocks."""
    _blur(sampler, path, 1)


def strided_blur(sampler: Draws, path: Path) -> None:
    """A blur pool that halves the size."""
    _blur(sampler, path, 2)


def _blur(sampler: Draws, path: Path, stride: int) -> None:
    value = path.value
    kernel = sampler.pick((3, 4, 5))
    if min(value.size) <= kernel // 2:
        kernel = 1
    mode = sampler.pick(("reflect", "zeros", "replicate"))
    size = [out(n + kernel - 1, kernel, stride, 0, 1) for n in value.size]
    node = Blur(value.channels, value.dims, kernel, stride, mode)
    sampler.put(path, node, (value.channels, *size))


# Padding
def pad(sampler: Draws, path: Path) -> None:
    """Padding as a layer of its own, before a convolution without."""
    value = path.value
    amounts = tuple(sampler.pick(((1, 1), (0, 1), (1, 0))) for _ in value.size)
    _pad(sampler, path, Pad(amounts, sampler.pick((0.0, 1.0))))
    affine(sampler, path, style="valid")


def pad_any(sampler: Draws, path: Path) -> None:
    """Padding of any kind."""
    value = path.value
    pair = sampler.pick(((1, 1), (0, 1), (1, 0)))
    mode = sampler.pick(("constant", "replicate", "reflect", "circular"))
    if min(value.size) <= max(pair):
        mode = "constant"
    _pad(sampler, path, Pad((pair,) * value.dims, sampler.pick((1.0, -0.5)), mode))


def _pad(sampler: Draws, path: Path, node: Pad) -> None:
    size = [n + sum(pair) for n, pair in zip(path.value.size, node.amounts, strict=True)]
    sampler.put(path, node, (path.value.channels, *size))


def padded(sampler: Draws, path: Path) -> None:
    """A convolution behind padding of its own, the same at both ends or more behind."""
    value = path.value
    kernel, pair = sampler.pick(((3, (1, 1)), (2, (0, 1)), (3, (0, 2)), (4, (1, 2))))
    modes = ["constant", "replicate"]
    if min(value.size) > max(pair):
        modes += ["reflect", "circular"]
    _padded(sampler, path, Pad((pair,) * value.dims, 0.0, sampler.pick(modes)), kernel, 1)


def padded_as_same(sampler: Draws, path: Path) -> None:
    """A strided convolution padded as TensorFlow does: the odd one comes behind."""
    kernel = sampler.pick((3, 2, 5))
    amounts = []
    for n in path.value.size:
        total = max(0, (-(-n // 2) - 1) * 2 + kernel - n)
        amounts.append((total // 2, total - total // 2))
    _padded(sampler, path, Pad(tuple(amounts)), kernel, 2)


def _padded(sampler: Draws, path: Path, node: Pad, kernel: int, stride: int) -> None:
    """Padding, and a layer behind it that does not pad."""
    _pad(sampler, path, node)
    channels, dims = path.value.channels, path.value.dims
    size = [out(n, kernel, stride, 0, 1) for n in path.value.size]
    conv = Conv(channels, channels, (kernel,) * dims, stride, bias=sampler.one_in(2))
    sampler.put(path, conv, (channels, *size))


def pool_or_pad_alike(sampler: Draws, paths: list[Path]) -> None:
    """The same pool or padding at the end of several values of one shape."""
    scratch = Path(paths[0].value)
    sampler.pick((pool, pad_any))(sampler, scratch)
    for path in paths:
        for node in scratch.nodes:
            sampler.put(path, node, scratch.value.shape)


# Transposed convolutions
def transposed(sampler: Draws, path: Path) -> None:
    """A transposed convolution, sometimes behind a strided one whose size it gives back."""
    value = path.value
    form = sampler.pick(("module", "functional"))
    bias = not sampler.one_in(3)
    channels = value.channels
    groups = channels if sampler.one_in(3) else 1
    kernel = (3,) * value.dims
    if sampler.one_in(2):
        sampler.put(path, Deconv(channels, channels, kernel, 1, 1, 0, groups, bias, form))
        return
    half = [out(n, 3, 2, 1, 1) for n in value.size]
    sampler.put(path, Conv(channels, channels, kernel, 2, 1, bias=bias), (channels, *half))
    if sampler.one_in(2):
        act(sampler, path)
    lacks = collapse([n - 2 * h + 1 for n, h in zip(value.size, half, strict=True)])
    up = Deconv(channels, channels, kernel, 2, 1, lacks, groups, bias, form)
    sampler.put(path, up, value.shape)


WINDOWS = tuple(Thing(draw, on_maps) for draw in (blur, small_pool, padded, transposed))
