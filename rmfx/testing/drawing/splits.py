"""Draws of splits and concatenations of channels. They leave the shape as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rmfx.testing.networks.forms import PRODUCTS
from rmfx.testing.networks.further import Shuffle
from rmfx.testing.networks.joins import Join, Recall, Split
from rmfx.testing.networks.layers import Act
from rmfx.testing.networks.node import Node
from rmfx.testing.networks.operations import Channels

from .draws import Draws
from .gates import BOUNDED
from .layers import act, affine, layer
from .shortcuts import fit
from .things import Thing, on_maps
from .values import INPUT, Path, Value


# Concatenations
def ghost(sampler: Draws, path: Path) -> None:
    """Half of the channels by a convolution, the others by a cheap one of those."""
    channels = path.value.channels
    half = -(-channels // 2)
    layer(sampler, path, half, "preserve")
    cheap = path.operand()
    affine(sampler, cheap, half, "preserve", "depthwise")
    if sampler.one_in(2):
        act(sampler, cheap)
    shape = (2 * half, *path.value.size)
    sampler.put(path, Join(((), tuple(cheap.nodes)), ("torch.cat([a, b], 1)",)), shape)
    if channels % 2:
        sampler.put(path, Channels(0, channels), (channels, *path.value.size), alias=True)


def concatenate_two(sampler: Draws, path: Path) -> None:
    """Two layers side by side, and one that mixes them, as in Inception."""
    left, right = path.operand(), path.operand()
    layer(sampler, left, sampler.pick((2, 1, 3)), "preserve")
    layer(sampler, right, sampler.pick((2, 1, 3)), "point")
    operands = (tuple(left.nodes), tuple(right.nodes))
    channels = path.value.channels
    shape = (left.value.channels + right.value.channels, *path.value.size)
    sampler.put(path, Join(operands, ("torch.cat([a, b], 1)",)), shape)
    affine(sampler, path, channels, "point")


# Splits
def split(sampler: Draws, path: Path) -> None:
    """Channels in two parts, of which one or both go through layers, and together again."""
    value = path.value
    if value.channels < 2:
        affine(sampler, path, style="preserve")
        return
    operands, sizes, form = _parts(sampler, path)
    for operand in operands[: 1 + sampler.one_in(3)]:
        if operand.depth > 0 and not sampler.is_large and sampler.one_in(3):
            shape = operand.value.shape
            sampler.residual(operand)
            fit(sampler, operand, shape)
        else:
            affine(sampler, operand, operand.value.channels, "preserve")
            act(sampler, operand)
    if sampler.one_in(2):
        operands.reverse()
        sizes = sizes[::-1]
    _put_split(sampler, path, operands, sizes, form)


def halves(sampler: Draws, path: Path) -> None:
    """Twice the channels, of which one half gates the other (GLU), or is added to it."""
    shape = path.value.shape
    affine(sampler, path, 2 * path.value.channels, "preserve")
    operands, sizes, form = _parts(sampler, path, halves=True)
    join = sampler.pick((*PRODUCTS, "a + b"))
    if join in PRODUCTS and (not sampler.spends_product() or not sampler.one_in(3)):
        sampler.put(operands[1], Act(sampler.pick(BOUNDED), "functional"))
    _put_split(sampler, path, operands, sizes, form, join, shape)


def partial(sampler: Draws, path: Path) -> None:
    """A residual over the first channels only: `cat([y[:, :k] + x, y[:, k:]])`."""
    shape = path.value.shape
    name = sampler.save(path)
    widened = shape[0] + sampler.pick((1, 0, 2))
    layer(sampler, path, widened, "preserve")
    affine(sampler, path, widened, "preserve")
    width = min(shape[0], widened - 1)
    if width < 1:
        return
    sizes = (width, widened - width)
    chain: tuple[Node, ...] = () if width == shape[0] else (Channels(0, width),)
    recall = Recall(name, chain, sampler.pick(("a + b", "b + a", "a - b")))
    form = sampler.pick(("slice", "split", "narrow"))
    sampler.put(path, Split(((recall,), ()), sizes, form), (widened, *shape[1:]))
    if widened != shape[0]:
        affine(sampler, path, shape[0], "point")


def _parts(
    sampler: Draws, path: Path, *, halves: bool = False
) -> tuple[list[Path], tuple[int, ...], str]:
    """The beginnings of two chains, how many channels each has, and how they are cut."""
    value = path.value
    half, rest = divmod(value.channels, 2)
    width = half if halves else sampler.pick((half, 1, value.channels - 1))
    sizes = (width, value.channels - width)
    equal = ("chunk",) if not rest and width == half else ()
    form: str = sampler.pick((*equal, "split", "slice", "narrow"))
    # torch forbids in-place operations on what chunk and split give.
    storage = INPUT if form in ("chunk", "split") else value.storage
    operands = [Path(_part(value, size, storage), path.depth - 1) for size in sizes]
    return operands, sizes, form


def _part(value: Value, channels: int, storage: int) -> Value:
    shape = (*value.shape[:-1], channels) if value.tokens else (channels, *value.size)
    return replace(value, shape=shape, storage=storage)


def _put_split(
    sampler: Draws,
    path: Path,
    operands: Sequence[Path],
    sizes: tuple[int, ...],
    form: str,
    join: str = "cat",
    shape: tuple[int, ...] | None = None,
) -> None:
    chains = tuple(tuple(operand.nodes) for operand in operands)
    axis = -1 if path.value.tokens else 1
    sampler.put(path, Split(chains, sizes, form, join, axis), shape)


# Channels that change places
def shuffle(sampler: Draws, path: Path) -> None:
    """Grouped point convolutions around a channel shuffle."""
    channels = path.value.channels
    width = channels if channels % 2 == 0 else 2 * channels
    groups = sampler.pick([g for g in range(2, width + 1) if width % g == 0])
    affine(sampler, path, width, "point", "grouped")
    form = sampler.pick(("reshape", "flatten", "function", "module"))
    if groups == width:  # where the shuffle would be the identity
        groups = 2
    sampler.put(path, Shuffle(groups, path.value.dims, form))
    affine(sampler, path, channels, "point", "grouped")


SPLITS = (
    *map(Thing, (split, halves)),
    *(Thing(draw, on_maps) for draw in (ghost, concatenate_two, partial, shuffle)),
)
