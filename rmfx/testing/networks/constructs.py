"""What the sampler puts between the layers of a branch: gates, pools, splits, shuffles and more.

Every function appends to a path and leaves its shape as it is, so each may stand anywhere. Those of
`FOR_MAPS` need spatial dimensions, those of `FOR_TOKENS` tokens; `ANYWHERE` asks for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from .forms import PRODUCTS
from .further import Blur, Deconv, Shuffle, Transpose
from .joins import ChannelsLast, Join, Recall, Split
from .layers import Act, Arithmetic, Channels, Conv, Linear, Pad, Pool
from .node import Node
from .values import INPUT, Draws, Path, Value, collapse, out, pooled

Construct = Callable[[Draws, Path], None]
CHOICES = (
    *("torch.maximum(a, b)", "torch.minimum(a, b)"),
    *("torch.where(a > 0.1, a, b)", "a / (1 + b * b)"),
)
_BOUNDED = ("sigmoid", "hardsigmoid", "tanh")
_MOST_PRODUCTS = 2  # of two values without bounds: each squares what passes


# Gates
def squeeze(sampler: Draws, path: Path) -> None:
    """Squeeze and excite: each channel by a factor that all of the value decides."""
    gate = path.operand()
    sampler.pool_all(gate)
    sampler.affine(gate, sampler.pick((2, 1, 4)), "point")
    form = sampler.pick(("module", "functional"))
    sampler.put(gate, Act(sampler.pick(("relu", "silu", "hardswish")), form))
    sampler.affine(gate, path.value.channels, "point")
    sampler.put(gate, Act(sampler.pick(("sigmoid", "hardsigmoid")), form))
    _multiply(sampler, path, Path(path.value), gate)


def spatial_gate(sampler: Draws, path: Path) -> None:
    """Each position by a factor: one channel, broadcast."""
    gate = path.operand()
    sampler.affine(gate, 1, "preserve")
    sampler.put(gate, Act(sampler.pick(_BOUNDED), "functional"))
    _multiply(sampler, path, Path(path.value), gate)


def gate_of_two(sampler: Draws, path: Path) -> None:
    """Two branches multiplied element by element; one of them mostly ends in a bounded function."""
    main, gate = path.operand(), path.operand()
    sampler.affine(main, style="preserve")
    sampler.affine(gate, style="preserve")
    if not spends_product(sampler) or not sampler.one_in(3):
        sampler.put(gate, Act(sampler.pick(_BOUNDED), "functional"))
    _multiply(sampler, path, main, gate)


def choice(sampler: Draws, path: Path) -> None:
    """Two branches of which one is chosen at each place, or one divided by the other."""
    main, other = path.operand(), path.operand()
    sampler.affine(main, style="preserve")
    sampler.affine(other, style="preserve")
    operands = (tuple(main.nodes), tuple(other.nodes))
    sampler.put(path, Join(operands, (sampler.pick(CHOICES),)), main.value.shape)


def spends_product(sampler: Draws) -> bool:
    """Whether the network may multiply two values without bounds once more."""
    sampler.products += 1
    return sampler.products <= _MOST_PRODUCTS


def _multiply(sampler: Draws, path: Path, main: Path, gate: Path) -> None:
    operands = (tuple(main.nodes), tuple(gate.nodes))
    sampler.put(path, Join(operands, (sampler.pick(PRODUCTS),)), main.value.shape)


def layer_scale(sampler: Draws, path: Path) -> None:
    """A learned factor for every channel, small as a rule."""
    value = path.value
    shape = (value.channels, *(1 for _ in value.size)) if value.is_map else value.shape[-1:]
    sampler.put(path, Arithmetic("x * p", sampler.pick((0.5, 0.1, 0.01)), shape))


# Splits and concatenations
def ghost(sampler: Draws, path: Path) -> None:
    """Half of the channels by a convolution, the others by a cheap one of those."""
    channels = path.value.channels
    half = -(-channels // 2)
    sampler.layer(path, half, "preserve")
    cheap = path.operand()
    sampler.affine(cheap, half, "preserve", "depthwise")
    if sampler.one_in(2):
        sampler.act(cheap)
    shape = (2 * half, *path.value.size)
    sampler.put(path, Join(((), tuple(cheap.nodes)), ("torch.cat([a, b], 1)",)), shape)
    if channels % 2:
        sampler.put(path, Channels(0, channels), (channels, *path.value.size), alias=True)


def concatenate_two(sampler: Draws, path: Path) -> None:
    """Two layers side by side, and one that mixes them, as in Inception."""
    left, right = path.operand(), path.operand()
    sampler.layer(left, sampler.pick((2, 1, 3)), "preserve")
    sampler.layer(right, sampler.pick((2, 1, 3)), "point")
    operands = (tuple(left.nodes), tuple(right.nodes))
    channels = path.value.channels
    shape = (left.value.channels + right.value.channels, *path.value.size)
    sampler.put(path, Join(operands, ("torch.cat([a, b], 1)",)), shape)
    sampler.affine(path, channels, "point")


def split(sampler: Draws, path: Path) -> None:
    """Channels in two parts, of which one or both go through layers, and together again."""
    value = path.value
    if value.channels < 2:
        sampler.affine(path, style="preserve")
        return
    operands, sizes, form = _parts(sampler, path)
    for operand in operands[: 1 + sampler.one_in(3)]:
        if operand.depth > 0 and not sampler.is_large and sampler.one_in(3):
            shape = operand.value.shape
            sampler.residual(operand)
            sampler.fit(operand, shape)
        else:
            channels = operand.value.channels
            sampler.affine(operand, channels, "preserve")
            sampler.act(operand)
    if sampler.one_in(2):
        operands.reverse()
        sizes = sizes[::-1]
    _put_split(sampler, path, operands, sizes, form, "cat")


def halves(sampler: Draws, path: Path) -> None:
    """Twice the channels, of which one half gates the other (GLU), or is added to it."""
    shape = path.value.shape
    sampler.affine(path, 2 * path.value.channels, "preserve")
    operands, sizes, form = _parts(sampler, path, halves=True)
    join = sampler.pick((*PRODUCTS, "a + b"))
    if join in PRODUCTS and (not spends_product(sampler) or not sampler.one_in(3)):
        sampler.put(operands[1], Act(sampler.pick(_BOUNDED), "functional"))
    _put_split(sampler, path, operands, sizes, form, join, shape)


def partial(sampler: Draws, path: Path) -> None:
    """A residual over the first channels only: `cat([y[:, :k] + x, y[:, k:]])`."""
    shape = path.value.shape
    name = sampler.save(path)
    widened = shape[0] + sampler.pick((1, 0, 2))
    sampler.layer(path, widened, "preserve")
    sampler.affine(path, widened, "preserve")
    width = min(shape[0], widened - 1)
    if width < 1:
        return
    sizes = (width, widened - width)
    chain: tuple[Node, ...] = () if width == shape[0] else (Channels(0, width),)
    recall = Recall(name, chain, sampler.pick(("a + b", "b + a", "a - b")))
    form = sampler.pick(("slice", "split", "narrow"))
    sampler.put(path, Split(((recall,), ()), sizes, form), (widened, *shape[1:]))
    if widened != shape[0]:
        sampler.affine(path, shape[0], "point")


def shuffle(sampler: Draws, path: Path) -> None:
    """Grouped point convolutions around a channel shuffle."""
    channels = path.value.channels
    width = channels if channels % 2 == 0 else 2 * channels
    groups = sampler.pick([g for g in range(2, width + 1) if width % g == 0])
    sampler.affine(path, width, "point", "grouped")
    form = sampler.pick(("reshape", "flatten", "function", "module"))
    if groups == width:  # where the shuffle would be the identity
        groups = 2
    sampler.put(path, Shuffle(groups, path.value.dims, form))
    sampler.affine(path, channels, "point", "grouped")


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
    join: str,
    shape: tuple[int, ...] | None = None,
) -> None:
    chains = tuple(tuple(operand.nodes) for operand in operands)
    axis = -1 if path.value.tokens else 1
    sampler.put(path, Split(chains, sizes, form, join, axis), shape)


# Windows
def blur(sampler: Draws, path: Path) -> None:
    """A blur pool of stride 1; the strided ones are between the blocks."""
    put_blur(sampler, path, 1)


def put_blur(sampler: Draws, path: Path, stride: int) -> None:
    """Add a blur."""
    value = path.value
    kernel = sampler.pick((3, 4, 5))
    if min(value.size) <= kernel // 2:
        kernel = 1
    mode = sampler.pick(("reflect", "zeros", "replicate"))
    size = [out(n + kernel - 1, kernel, stride, 0, 1) for n in value.size]
    node = Blur(value.channels, value.dims, kernel, stride, mode)
    sampler.put(path, node, (value.channels, *size))


def small_pool(sampler: Draws, path: Path) -> None:
    """A pool of stride 1 that keeps the size; in three dimensions torch asks for as much to see."""
    if min(path.value.size) < 3:
        sampler.affine(path, style="preserve")
        return
    form = sampler.pick(("module", "functional"))
    kind, counts = sampler.pick((("avg", True), ("max", True), ("avg", False)))
    ceil_mode = sampler.one_in(3)
    node = Pool(kind, path.value.dims, 3, 1, 1, ceil_mode, counts, form)
    sampler.put(path, node)


def put_pool(sampler: Draws, path: Path) -> None:
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
    form = "functional" if sampler.functional else "module"
    size = [pooled(n, kernel, stride, padding, ceil_mode=ceil_mode) for n in value.size]
    node = Pool(kind, value.dims, kernel, stride, padding, ceil_mode, counts, form)
    sampler.put(path, node, (value.channels, *size))


def put_alike(sampler: Draws, paths: list[Path]) -> None:
    """The same pool or padding at the end of several values of one shape."""
    scratch = Path(paths[0].value)
    sampler.pick((put_pool, put_pad))(sampler, scratch)
    for path in paths:
        for node in scratch.nodes:
            sampler.put(path, node, scratch.value.shape)


def put_pad(sampler: Draws, path: Path) -> None:
    """Padding of any kind."""
    value = path.value
    pair = sampler.pick(((1, 1), (0, 1), (1, 0)))
    mode = sampler.pick(("constant", "replicate", "reflect", "circular"))
    if min(value.size) <= max(pair):
        mode = "constant"
    size = [n + sum(pair) for n in value.size]
    filling = sampler.pick((1.0, -0.5))
    sampler.put(path, Pad((pair,) * value.dims, filling, mode), (value.channels, *size))


def padded(sampler: Draws, path: Path) -> None:
    """A convolution behind padding of its own, the same at both ends or more behind."""
    value = path.value
    kernel, pair = sampler.pick(((3, (1, 1)), (2, (0, 1)), (3, (0, 2)), (4, (1, 2))))
    modes = ["constant", "replicate"]
    if min(value.size) > max(pair):
        modes += ["reflect", "circular"]
    put_padded(sampler, path, (pair,) * value.dims, kernel, 1, sampler.pick(modes))


def put_padded(
    sampler: Draws,
    path: Path,
    amounts: tuple[tuple[int, int], ...],
    kernel: int,
    stride: int,
    mode: str,
) -> None:
    """Add padding, and a layer behind it that does not pad."""
    value = path.value
    wide = [n + sum(pair) for n, pair in zip(value.size, amounts, strict=True)]
    sampler.put(path, Pad(amounts, 0.0, mode), (value.channels, *wide))
    size = [out(n, kernel, stride, 0, 1) for n in wide]
    channels = value.channels
    node = Conv(channels, channels, (kernel,) * value.dims, stride, bias=sampler.one_in(2))
    sampler.put(path, node, (channels, *size))


def put_same(sampler: Draws, path: Path) -> None:
    """A strided convolution padded as TensorFlow does: the odd one comes behind."""
    kernel = sampler.pick((3, 2, 5))
    amounts = []
    for n in path.value.size:
        total = max(0, (-(-n // 2) - 1) * 2 + kernel - n)
        amounts.append((total // 2, total - total // 2))
    put_padded(sampler, path, tuple(amounts), kernel, 2, "constant")


def transposed(sampler: Draws, path: Path) -> None:
    """A transposed convolution, sometimes behind a strided one whose size it gives back."""
    value = path.value
    form = sampler.pick(("module", "functional"))
    bias = not sampler.one_in(3)
    channels = value.channels
    groups = channels if sampler.one_in(3) else 1
    if sampler.one_in(2):
        node = Deconv(channels, channels, (3,) * value.dims, 1, 1, 0, groups, bias, form)
        sampler.put(path, node)
        return
    half = [out(n, 3, 2, 1, 1) for n in value.size]
    down = Conv(channels, channels, (3,) * value.dims, 2, 1, bias=bias)
    sampler.put(path, down, (channels, *half))
    if sampler.one_in(2):
        sampler.act(path)
    lacks = collapse([n - 2 * h + 1 for n, h in zip(value.size, half, strict=True)])
    up = Deconv(channels, channels, (3,) * value.dims, 2, 1, lacks, groups, bias, form)
    sampler.put(path, up, value.shape)


def channels_last(sampler: Draws, path: Path) -> None:
    """Linear layers on the channels as the last axis, as in ConvNeXt."""
    value = path.value
    inner = 2 * value.channels
    act = Act(sampler.pick(("relu", "gelu", "silu", "hardswish")), "module")
    chain = (Linear(value.channels, inner), act, Linear(inner, value.channels))
    sampler.put(path, ChannelsLast(chain, value.dims))


def mix_tokens(sampler: Draws, path: Path) -> None:
    """Linear layers along the tokens, as in MLP-Mixer."""
    length, features = path.value.shape
    form = sampler.pick(("transpose", "permute"))
    sampler.put(path, Transpose(form), (features, length), alias=True)
    sampler.affine(path, sampler.pick((4, 2)))
    sampler.act(path)
    sampler.affine(path, length)
    sampler.put(path, Transpose(form), (length, features), alias=True)


ANYWHERE: tuple[Construct, ...] = (layer_scale, gate_of_two, choice, split, halves)
FOR_TOKENS: tuple[Construct, ...] = (mix_tokens, mix_tokens)
FOR_MAPS: tuple[Construct, ...] = (
    *(squeeze, squeeze, squeeze, spatial_gate, ghost, concatenate_two, partial, shuffle),
    *(blur, small_pool, padded, transposed, channels_last),
)


def construct(sampler: Draws, path: Path) -> None:
    """One of the constructs that suit the value."""
    suiting = list(ANYWHERE)
    if path.value.is_map:
        suiting += FOR_MAPS
    elif path.value.tokens:
        suiting += FOR_TOKENS
    sampler.pick(suiting)(sampler, path)


def built_of_parts(sampler: Draws, path: Path) -> None:
    """A branch of one to three constructs with layers around them."""
    sampler.layer(path, sampler.width(path.value), sampler.style())
    for _ in range(sampler.pick((1, 1, 2, 3))):
        construct(sampler, path)
        if sampler.one_in(2):
            sampler.layer(path, style="preserve")
    if sampler.one_in(3):
        layer_scale(sampler, path)


def shrinking(sampler: Draws, path: Path) -> None:
    """A branch that halves the size by a pool, a blur pool or padding as TensorFlow has it."""
    if not path.value.is_map:
        sampler.layer(path)
        return
    if sampler.one_in(2):
        sampler.layer(path)
    what = sampler.pick(("pool", "blur", "same"))
    if what == "pool":
        put_pool(sampler, path)
    elif what == "blur":
        put_blur(sampler, path, 2)
    else:
        put_same(sampler, path)
    sampler.layer(path, sampler.width(path.value), "preserve")


def stacked(sampler: Draws, path: Path) -> None:
    """A branch of several residual blocks: a skip over all of them."""
    for _ in range(sampler.pick((2, 2, 3))):
        if path.depth <= 0 or sampler.is_large:
            sampler.layer(path)
            continue
        sampler.residual(path)
        if not sampler.one_in(3):
            sampler.act(path)
