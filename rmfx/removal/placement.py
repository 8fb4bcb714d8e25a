"""Where a carry can travel: shortcuts beside a chain of linear layers.

A shortcut s runs beside the linear layers f₁ … f_k of the main branch, one layer beside each:
identities (Dirac taps) before position j, the shortcut's own map at j, identities after it.

Offsets, per dimension. A Dirac tap at offset o makes y[n] = x[n·stride + o]. Behind layer i, output
n of the chain reads index n·S + O, where S and O follow from the layers after i:
    S ← s·S,   O ← o + s·O,   growth A ← a + s·A        (going back over one layer)
The index lies inside a map of any size H, for every n below ⌊(H + A)/S⌋, exactly when
    O ≥ 0   and   A + O < S.
So the carry is exact if that holds at every layer's input on the way, and O meets the shortcut's
own offset at the start. Border zeros are then never read.

A shortcut whose kernel may read zero padding is itself exact only where the carry still equals x
everywhere: at position 1, or after layers that keep size and place.

A shortcut of several layers need not become one: beside a layer of the branch with its own stride
and size it gives, everywhere, the very value that its next layer reads. So the layers may stand one
by one, depthwise beside depthwise, and a wide 1x1 where the branch is narrow or has one too: made
one, a depthwise 5x5 and a 1x1 would be a dense 5x5.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

from rmfx.algebra.affine import AffineConv, Ints, Pads
from rmfx.algebra.laws import reads_inside
from rmfx.algebra.products import unmerged
from rmfx.errors import Refusal

# A layer of the carry beside each of the branch, and how many of the shortcut's stand up to it.
Beside = list[tuple[AffineConv, int]]
Fit = Callable[[Sequence[AffineConv], AffineConv], AffineConv]  # see `fitted`
UNEQUAL_SIZES = "the output sizes of branch and shortcut agree for some input sizes only"


def placements(
    layers: Sequence[AffineConv],
    factors: Sequence[AffineConv],
    rigid: Collection[int] = (),
    fit: Fit | None = None,
) -> Iterator[Beside] | Refusal:
    """Every exact way to run a shortcut beside `layers`.

    Refused if branch and shortcut differ in stride or output size.

    Args:
        factors: the shortcut's own layers, one at least.
        rigid: positions of layers (paddings) that the carry must pass in the same way.
        fit: gives a shortcut the output size of layers that begin at the fork, where they agree.
    """
    fit = fit or _as_it_is
    stride, growth = _chain_law(factors, factors[0].dims)
    pads = tuple((0, a + 1 - s) for a, s in zip(growth, stride, strict=True))
    alike = AffineConv.identity(1, len(stride), stride=stride, padding=pads)
    return _unequal(layers, fit(layers, alike)) or _ways(layers, factors, rigid, fit)


def _as_it_is(layers: Sequence[AffineConv], shortcut: AffineConv) -> AffineConv:
    return shortcut


def _ways(
    layers: Sequence[AffineConv],
    factors: Sequence[AffineConv],
    rigid: Collection[int],
    fit: Fit,
) -> Iterator[Beside]:
    whole = unmerged(factors)
    if not isinstance(whole, Refusal) and not _unequal(layers, whole := fit(layers, whole)):
        for j, beside in _as_one(layers, whole, rigid):
            yield [(g, len(factors) * (i >= j)) for i, g in enumerate(beside)]
    for i, f in enumerate(layers[:-1]):
        before = [(dirac(factors[0].in_channels, g, (0,) * g.dims), 0) for g in layers[:i]]
        behind = [position - i - 1 for position in rigid if position > i]
        for count in range(1, len(factors)):
            own, rest = unmerged(factors[:count]), factors[count:]
            if i in rigid or isinstance(own, Refusal):
                continue
            if all(g.preserves_size for g in (*layers[i + 1 :], *rest)):
                own = fit([f], own)
            if (own.stride, own.growth) != (f.stride, f.growth):
                continue
            for way in _ways(layers[i + 1 :], rest, behind, _as_it_is):
                yield [*before, (own, count), *((g, n + count) for g, n in way)]
        if i in rigid or not f.preserves_size:
            return


def _as_one(
    layers: Sequence[AffineConv], shortcut: AffineConv, rigid: Collection[int]
) -> Iterator[tuple[int, list[AffineConv]]]:
    """A shortcut of one layer, of the branch's stride and size: (position j, one beside each)."""
    if reads_inside(shortcut):
        targets = tuple(-left for left, _ in shortcut.padding)
        offsets = _all_offsets(layers, targets, rigid, start_inside=False)
        if offsets is not None:
            return _pointwise(layers, shortcut, offsets, rigid)
    return _anywhere_exact(layers, shortcut, rigid)


def fitted(layers: Sequence[AffineConv], shortcut: AffineConv, size: Ints) -> AffineConv:
    """The shortcut with the branch's output size, if the two sizes agree for inputs of `size`.

    Sizes at which they differ are refused by a condition: the sum is an error there, or spreads
    out the one that is 1.
    """
    stride, growth = _chain_law(layers, shortcut.dims)
    if stride != shortcut.stride:
        return shortcut
    agrees = all(
        (n + a) // s == (n + b) // s
        for n, a, b, s in zip(size, growth, shortcut.growth, stride, strict=True)
    )
    if not agrees:
        return shortcut
    padding = tuple(
        (left, right + a - b)
        for (left, right), a, b in zip(shortcut.padding, growth, shortcut.growth, strict=True)
    )
    return replace(shortcut, padding=padding)


def _chain_law(layers: Sequence[AffineConv], dims: int) -> tuple[Ints, Ints]:
    """Stride and growth of a chain, per dimension."""
    strides, growths = [], []
    for i in range(dims):
        stride, growth = 1, 0
        for f in layers:
            growth += stride * f.growth[i]
            stride *= f.stride[i]
        strides.append(stride)
        growths.append(growth)
    return tuple(strides), tuple(growths)


def _unequal(layers: Sequence[AffineConv], shortcut: AffineConv) -> Refusal | None:
    stride, growth = _chain_law(layers, shortcut.dims)
    if stride != shortcut.stride:
        ours, theirs = _shown(stride), _shown(shortcut.stride)
        return Refusal(f"the branch has stride {ours} and the shortcut {theirs}")
    return Refusal(UNEQUAL_SIZES) if growth != shortcut.growth else None


def _shown(stride: Ints) -> str:
    return str(stride[0] if len(set(stride)) == 1 else stride)


def _pointwise(
    layers: Sequence[AffineConv],
    shortcut: AffineConv,
    offsets: Sequence[Ints],
    rigid: Collection[int],
) -> Iterator[tuple[int, list[AffineConv]]]:
    """A shortcut of one tap fits at every position."""
    for j in range(len(layers)):
        if j in rigid:
            continue
        beside = []
        for i, (f, o) in enumerate(zip(layers, offsets, strict=True)):
            channels = shortcut.in_channels if i < j else shortcut.out_channels
            if i == j:
                beside.append(replace(shortcut, stride=f.stride, padding=_pads(f, o)))
            else:
                beside.append(dirac(channels, f, o))
        yield j, beside


def _anywhere_exact(
    layers: Sequence[AffineConv], shortcut: AffineConv, rigid: Collection[int]
) -> Iterator[tuple[int, list[AffineConv]]]:
    """A shortcut that may read padding fits while the carry still equals x everywhere."""
    for j, f in enumerate(layers):
        behind = [i - j - 1 for i in rigid if i > j]
        after = _all_offsets(layers[j + 1 :], None, behind, start_inside=True)
        if after is not None and j not in rigid:
            shift = [0] * shortcut.dims
            for g, o in zip(reversed(layers[j + 1 :]), reversed(after), strict=True):
                shift = [a + s * b for a, s, b in zip(o, g.stride, shift, strict=True)]
            own = _own_place(shortcut, f, tuple(shift))
            before = [dirac(shortcut.in_channels, g, (0,) * g.dims) for g in layers[:j]]
            rest = [
                dirac(shortcut.out_channels, g, o)
                for g, o in zip(layers[j + 1 :], after, strict=True)
            ]
            yield j, [*before, own, *rest]
        if not f.preserves_size:
            return


def _own_place(shortcut: AffineConv, f: AffineConv, shift: Ints) -> AffineConv:
    """The shortcut at f's stride and output size; `shift` is the offset of the layers after it."""
    padding = []
    for (left, _), a, span, s, o in zip(
        shortcut.padding, f.growth, shortcut.span, f.stride, shift, strict=True
    ):
        begin = left + o * s
        padding.append((begin, a - begin + span + 1 - s))
    return replace(shortcut, stride=f.stride, padding=tuple(padding))


def dirac(channels: int, f: AffineConv, offset: Ints) -> AffineConv:
    """The identity beside layer f: y[n] = x[n·stride + offset], with f's output size."""
    return AffineConv.identity(
        channels, f.dims, stride=f.stride, padding=_pads(f, offset), device=f.weight.device
    )


def _pads(f: AffineConv, offset: Ints) -> Pads:
    return tuple((-o, a + o + 1 - s) for o, a, s in zip(offset, f.growth, f.stride, strict=True))


def _all_offsets(
    layers: Sequence[AffineConv],
    targets: Ints | None,
    rigid: Collection[int],
    *,
    start_inside: bool,
) -> list[Ints] | None:
    """One tap offset per layer and dimension, so that the carry is exact; None if impossible."""
    if not layers:
        return []
    per_dim = [
        _offsets(layers, i, None if targets is None else targets[i], rigid, start_inside)
        for i in range(layers[0].dims)
    ]
    if any(found is None for found in per_dim):
        return None
    return [tuple(found[i] for found in per_dim if found) for i in range(len(layers))]


def _offsets(
    layers: Sequence[AffineConv],
    i: int,
    target: int | None,
    rigid: Collection[int],
    start_inside: bool,
) -> Ints | None:
    """Offsets in one dimension: a search from the last layer back over the offsets reached."""
    reached: dict[int, Ints] = {0: ()}
    stride, growth = 1, 0
    for index, f in reversed(list(enumerate(layers))):
        s, a = f.stride[i], f.growth[i]
        stride, growth = s * stride, a + s * growth
        checked = index > 0 or start_inside
        step: dict[int, Ints] = {}
        for total, path in reached.items():
            own = [-f.padding[i][0]] if index in rigid else _candidates(f, i)
            for o in own:
                here = o + s * total
                if not checked or (here >= 0 and growth + here < stride):
                    step.setdefault(here, (o, *path))
        reached = step
    if target is None:
        return min(reached.items(), key=lambda item: abs(item[0]))[1] if reached else None
    return reached.get(target)


def _candidates(f: AffineConv, i: int) -> list[int]:
    """Tap offsets to try in dimension i: the kernel's own, nearest to 0 first, then 0 itself."""
    left, step = f.padding[i][0], f.dilation[i]
    own = sorted((t * step - left for t in range(f.kernel[i])), key=lambda o: (abs(o), o))
    return own if 0 in own else [*own, 0]
