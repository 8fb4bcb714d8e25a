"""Layers side by side: the laws that say where channels and taps come to stand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from rmfx.algebra.affine import AffineConv
from rmfx.algebra.laws import (
    common_block,
    direct_sum,
    groups_side_by_side,
    in_turn,
    plus,
    reads_inside,
    spread,
    stack,
    window_of,
)
from rmfx.algebra.products import compose
from rmfx.errors import Refusal

F64 = torch.float64


@st.composite
def windows(draw: st.DrawFn, *, alike: AffineConv | None = None) -> AffineConv:
    """A layer of two inputs and outputs in two dimensions; alike: of its stride and sizes."""
    kernel, dilation, stride = (
        (draw(st.integers(1, most)), draw(st.integers(1, most))) for most in (3, 2, 2)
    )
    pads = [(draw(st.integers(-1, 2)), draw(st.integers(-1, 2))) for _ in range(2)]
    weight = torch.randn(2, 2, *kernel, dtype=F64)
    layer = AffineConv(weight, torch.randn(2, dtype=F64), stride, tuple(pads), dilation)
    if alike is None:
        return layer
    layer = replace(layer, stride=alike.stride)
    own, wanted = layer.growth, alike.growth
    pads = [(left, right + b - a) for (left, right), a, b in zip(pads, own, wanted, strict=True)]
    return replace(layer, padding=tuple(pads))


@st.composite
def siblings(draw: st.DrawFn) -> list[AffineConv]:
    """Layers that give maps of equal size."""
    first = draw(windows())
    return [first, draw(windows(alike=first)), draw(windows(alike=first))]


# ---- order --------------------------------------------------------------------------------------
@given(st.integers(1, 4), st.lists(st.integers(0, 3), min_size=1, max_size=3))
def test_a_run_is_a_share_of_each(runs: int, shares: list[int]) -> None:
    parts = [torch.arange(n * runs) + 100 * i for i, n in enumerate(shares)]
    expected: list[int] = []
    for run in range(runs):
        for part, n in zip(parts, shares, strict=True):
            expected += part.tolist()[run * n : (run + 1) * n]
    assert in_turn(parts, runs).tolist() == expected


def test_a_layer_of_some_groups_keeps_each_share_to_its_group() -> None:
    layers = [AffineConv.identity(n, 2) for n in (4, 8)]
    made = spread(*layers, groups=4, runs=(4, 4))
    assert isinstance(made, AffineConv)
    assert (made.groups, made.block) == (4, (3, 3))
    x = torch.randn(1, 12, 3, 3, dtype=F64)
    torch.testing.assert_close(made(x), x)


# ---- windows ------------------------------------------------------------------------------------
def places(layer: AffineConv, dim: int) -> list[int]:
    """Where the taps of a layer lie, beside the place of its output."""
    first, step = -layer.left[dim], layer.dilation[dim]
    return [first + step * tap for tap in range(layer.kernel[dim])]


@given(siblings())
def test_the_window_of_layers_is_the_smallest_that_holds_their_taps(
    layers: list[AffineConv],
) -> None:
    window = window_of(layers)
    assert not isinstance(window, Refusal)
    for dim in range(2):
        taps = sorted({tap for f in layers for tap in places(f, dim)})
        first, step, size = window.left[dim], window.dilation[dim], window.kernel[dim]
        grid = [-first + step * i for i in range(size)]
        assert {*taps} <= {*grid}
        assert (grid[0], grid[-1]) == (taps[0], taps[-1])
        assert size == 1 or step == math.gcd(*(tap - taps[0] for tap in taps))
    for f in layers:
        assert window.around(f).stride == f.stride
        whole = torch.zeros(2, 2, *window.kernel, dtype=F64)
        whole[window.taps_of(f)] = f.weight
        placed = replace(window.around(f), weight=whole)
        assert placed.growth == f.growth
        x = torch.randn(1, 2, 9, 8, dtype=F64)
        torch.testing.assert_close(placed(x), f(x))


@given(windows(), st.sampled_from(["stride", "size", "dims"]))
def test_layers_of_other_strides_sizes_or_dimensions_have_no_window(
    f: AffineConv, fault: str
) -> None:
    right = tuple((left, right + 1) for left, right in f.padding)
    others = {
        "stride": replace(f, stride=tuple(s + 1 for s in f.stride)),
        "size": replace(f, padding=right),
        "dims": AffineConv.identity(2, 1),
    }
    for law in (window_of, lambda pair: stack(*pair), lambda pair: plus(*pair)):
        assert isinstance(law([f, others[fault]]), Refusal)


@given(
    st.integers(1, 3), st.integers(-3, 2), st.integers(-3, 2), st.integers(1, 2), st.integers(0, 1)
)
def test_what_reads_inside_never_meets_a_border(
    stride: int, left: int, right: int, kernel: int, taps: int
) -> None:
    weight = torch.ones(1, 1, 1 + taps * (kernel - 1), dtype=F64)
    layer = AffineConv(weight, torch.zeros(1, dtype=F64), (stride,), ((left, right),), (1,))
    sizes = [
        size
        for size in range(1, 25)
        if layer.output_size((size,))[0] > 0 and min(left, 0) + min(right, 0) + size > 0
    ]
    seen = [layer(torch.ones(1, 1, size, dtype=F64)).flatten() for size in sizes]
    assume(seen)
    full = bool((torch.cat(seen) == weight.numel()).all())
    if layer.is_pointwise:
        assert reads_inside(layer) == full
    else:
        assert not reads_inside(layer)  # it is said of layers of one tap


# ---- groups -------------------------------------------------------------------------------------
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3))
def test_the_common_block_is_the_smallest(blocks: list[tuple[int, int]]) -> None:
    def fits(n_in: int, n_out: int) -> bool:
        return all(n_in % a == 0 and n_out == b * (n_in // a) for a, b in blocks)

    every = [pair for pair in itertools.product(range(1, 65), repeat=2) if fits(*pair)]
    assert common_block(blocks) == min(every, default=None)


@pytest.mark.parametrize(
    ("groups", "blocks", "counts"),
    [
        ((4, 8), [(1, 1), (1, 1)], [4, 8]),
        ((2, 4), [(2, 2), (1, 1)], [2, 2]),
        ((1, 4), [(4, 2), (1, 1)], None),  # one shape has more outputs than the other
        ((1, 3), [(2, 2), (1, 1)], None),  # three channels are no whole groups of two
    ],
)
def test_groups_stand_side_by_side_where_they_are_of_one_shape(
    groups: Sequence[int], blocks: Sequence[tuple[int, int]], counts: list[int] | None
) -> None:
    layers = [
        AffineConv.pointwise(torch.randn(n * b[1], b[0], dtype=F64), dims=2, groups=n)
        for n, b in zip(groups, blocks, strict=True)
    ]
    assert groups_side_by_side(layers) == counts
    together = direct_sum(*layers)
    assert isinstance(together, AffineConv)
    assert together.groups == (sum(counts) if counts else 1)


@given(st.data())
def test_direct_sums_in_a_row_are_direct_sums_of_products(data: st.DataObject) -> None:
    inner = data.draw(siblings())[:2]
    outer = [AffineConv.pointwise(torch.randn(3, 2, dtype=F64), dims=2) for _ in inner]
    sums = [direct_sum(*inner), direct_sum(*outer)]
    assert all(isinstance(one, AffineConv) for one in sums)
    xs = [torch.randn(1, 2, 9, 8, dtype=F64) for _ in inner]
    product = compose(sums[1], sums[0])  # type: ignore[arg-type]
    products = [compose(f, g) for f, g in zip(outer, inner, strict=True)]
    assert isinstance(product, AffineConv)
    found = product(torch.cat(xs, 1)).split(3, 1)
    for part, own, x in zip(found, products, xs, strict=True):
        assert isinstance(own, AffineConv)
        torch.testing.assert_close(part, own(x), rtol=1e-11, atol=1e-11)
