"""Placements of a shortcut beside a chain: each carries exactly the shortcut's value."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from rmfx.algebra.affine import AffineConv
from rmfx.algebra.laws import direct_sum, join, plus, reads_inside, stack
from rmfx.algebra.products import Unmerged
from rmfx.errors import Refusal
from rmfx.removal.placement import dirac, placements

F64 = torch.float64
CONVS = (None, F.conv1d, F.conv2d, F.conv3d)


def conv(
    *,
    kernel: int = 3,
    stride: int = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int = 1,
    dims: int = 1,
    ins: int = 2,
    outs: int = 2,
    bias: bool = True,
) -> AffineConv:
    """A layer with the same geometry in every dimension."""
    pair = (padding, padding) if isinstance(padding, int) else padding
    return AffineConv(
        torch.randn(outs, ins, *[kernel] * dims, dtype=F64),
        torch.randn(outs, dtype=F64) * bias,
        (stride,) * dims,
        (pair,) * dims,
        (dilation,) * dims,
    )


def apply(layer: AffineConv, x: Tensor) -> Tensor:
    """The layer's definition in terms of PyTorch's own operations."""
    flat = [p for pair in reversed(layer.padding) for p in pair]
    convolve: Any = CONVS[layer.dims]
    options = (layer.stride, 0, layer.dilation, layer.groups)
    result: Tensor = convolve(F.pad(x, flat), layer.weight.to(x), layer.bias.to(x), *options)
    return result


def ways(layers: list[AffineConv], *factors: AffineConv) -> list[list[tuple[AffineConv, int]]]:
    result = placements(layers, factors)
    assert not isinstance(result, Refusal), result
    return list(result)


def found(layers: list[AffineConv], shortcut: AffineConv) -> list[tuple[int, list[AffineConv]]]:
    """Where a shortcut of one layer stands, and the layers beside those of the branch."""
    places = ways(layers, shortcut)
    return [([n for _, n in way].index(1), [g for g, _ in way]) for way in places]


def whole(layer: AffineConv) -> AffineConv:
    made = layer.merged() if isinstance(layer, Unmerged) else layer
    assert isinstance(made, AffineConv), made
    assert (made.kernel, made.groups, made.block) == (layer.kernel, layer.groups, layer.block)
    assert (made.stride, made.padding, made.dilation) == (
        layer.stride, layer.padding, layer.dilation,
    )  # fmt: skip
    return made


def law_of(i: int, count: int) -> Any:
    last = count - 1
    return plus if i == 0 == last else stack if i == 0 else join if i == last else direct_sum


def check(layers: list[AffineConv], sizes: tuple[int, ...], *factors: AffineConv) -> int:
    """Demand that each placement adds the shortcut's value; gives how many sizes were run."""
    places, runs = ways(layers, *factors), 0
    for h in sizes:
        x = torch.randn(1, factors[0].in_channels, *[h] * factors[0].dims, dtype=F64)
        try:
            main = x
            for f in layers:
                main = apply(f, main)
            expected = x
            for f in factors:
                expected = apply(f, expected)
        except RuntimeError:  # the map is too small for a kernel, before anything was rewritten
            continue
        runs += 1
        for way in places:
            carry, plain = x, x
            for i, (f, (g, _)) in enumerate(zip(layers, way, strict=True)):
                g = whole(g)
                carry = apply(g, carry)
                layer = law_of(i, len(layers))(f, g)
                assert isinstance(layer, AffineConv), layer
                plain = apply(layer, plain)
            torch.testing.assert_close(carry, expected, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(plain, main + expected, rtol=1e-10, atol=1e-10)
    return runs


@st.composite
def chains(draw: st.DrawFn, *, dims: int) -> list[AffineConv]:
    """One to four layers of 2 channels, each with a geometry of its own."""
    torch.manual_seed(draw(st.integers(0, 99)))
    return [
        conv(
            kernel=draw(st.integers(1, 3)),
            stride=draw(st.sampled_from((1, 1, 2, 3))),
            padding=draw(st.one_of(st.integers(0, 2), st.tuples(*[st.integers(-1, 3)] * 2))),
            dilation=draw(st.sampled_from((1, 1, 2))),
            dims=dims,
        )
        for _ in range(draw(st.integers(1, 4)))
    ]


def total(layers: list[AffineConv]) -> tuple[int, int]:
    """Stride and growth of a chain, in its first dimension."""
    stride, growth = 1, 0
    for f in layers:
        growth += stride * f.growth[0]
        stride *= f.stride[0]
    return stride, growth


@st.composite
def shortcuts_of(draw: st.DrawFn, layers: list[AffineConv]) -> AffineConv:
    """A shortcut of the chain's stride and growth, with any kernel and place."""
    stride, growth = total(layers)
    kernel, dilation = draw(st.sampled_from((1, 1, 1, 2, 3))), draw(st.integers(1, 2))
    left = draw(st.integers(-3, 3))
    right = growth - left + dilation * (kernel - 1) + 1 - stride
    return conv(
        kernel=kernel,
        stride=stride,
        padding=(left, right),
        dilation=dilation,
        dims=layers[0].dims,
        bias=draw(st.booleans()),
    )


@given(st.data())
def test_every_placement_is_exact(data: st.DataObject) -> None:
    layers = data.draw(chains(dims=data.draw(st.sampled_from((1, 1, 2)))))
    check(layers, (5, 12, 25, 31, 48), data.draw(shortcuts_of(layers)))


@st.composite
def factors_of(draw: st.DrawFn, layers: list[AffineConv]) -> list[AffineConv]:
    """A shortcut of two or three layers, of the chain's stride and growth as one."""
    first = [draw(own_geometry(layers[0].dims)) for _ in range(draw(st.integers(1, 2)))]
    stride, growth = total(layers)
    own_stride, own_growth = total(first)
    assume(stride % own_stride == 0 and (growth - own_growth) % own_stride == 0)
    last, growth = stride // own_stride, (growth - own_growth) // own_stride
    kernel, left = draw(st.sampled_from((1, 1, 3))), draw(st.integers(-1, 1))
    right = growth - left + kernel - last
    dims = layers[0].dims
    return [*first, conv(kernel=kernel, stride=last, padding=(left, right), dims=dims)]


@st.composite
def own_geometry(draw: st.DrawFn, dims: int) -> AffineConv:
    kernel, stride = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from((1, 1, 2)))
    padding = draw(st.sampled_from((0, kernel // 2, (0, kernel - 1))))
    made = conv(kernel=kernel, stride=stride, padding=padding, dims=dims, bias=draw(st.booleans()))
    if draw(st.booleans()):
        return replace(made, weight=made.weight[:, :1], groups=2)
    return made


@given(st.data())
def test_the_layers_of_a_shortcut_may_stand_one_by_one(data: st.DataObject) -> None:
    layers = data.draw(chains(dims=data.draw(st.sampled_from((1, 1, 2)))))
    factors = data.draw(factors_of(layers))
    if not isinstance(placements(layers, factors), Refusal):
        check(layers, (5, 12, 25, 31), *factors)


@given(st.data())
def test_layers_of_the_branchs_own_geometry_stand_beside_it(data: st.DataObject) -> None:
    """Whatever the branch does to sizes, a shortcut that does it layer for layer fits."""
    layers = data.draw(chains(dims=1))
    assume(len(layers) > 1)
    factors = [
        replace(
            f, weight=torch.randn_like(f.weight[:, :1]), groups=2, bias=torch.randn(2, dtype=F64)
        )
        for f in layers
    ]
    counts = [[n for _, n in way] for way in ways(layers, *factors)]
    if all(f.preserves_size for f in layers[:-1]):
        assert [*range(1, len(layers) + 1)] in counts
    check(layers, (9, 16, 31), *factors)


def test_depthwise_stands_beside_depthwise() -> None:
    """A shortcut of GhostNet: a strided 5x5 and a 1x1, which would be a dense 5x5 as one."""
    narrow = {"kernel": 5, "stride": 2, "padding": 2, "dims": 2, "bias": False}
    depthwise = replace(conv(**narrow), weight=torch.randn(2, 1, 5, 5, dtype=F64), groups=2)
    layers = [conv(kernel=1, dims=2), depthwise, conv(kernel=1, dims=2)]
    shortcut = replace(depthwise, weight=torch.randn(2, 1, 5, 5, dtype=F64))
    found = ways(layers, shortcut, conv(kernel=1, dims=2))
    best = min(found, key=lambda way: sum(g.weight.numel() for g, _ in way))
    assert [n for _, n in best] == [0, 1, 2]
    assert best[1][0].is_depthwise
    assert check(layers, (8, 9, 14), shortcut, conv(kernel=1, dims=2)) == 3


@given(st.data())
def test_same_size_chains_take_an_identity_at_every_position(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    kernels = data.draw(st.lists(st.sampled_from((1, 3, 5)), min_size=1, max_size=4))
    layers = [conv(kernel=k, padding=k // 2) for k in kernels]
    shortcut = AffineConv.identity(2, 1)
    assert [j for j, _ in found(layers, shortcut)] == list(range(len(layers)))
    assert check(layers, (5, 6, 7), shortcut) == 3


@pytest.mark.parametrize(
    ("layers", "shortcut", "count"),
    [
        # ResNet's first block of a stage: stride 2 in the first or the second 3x3.
        ([{"stride": 2, "padding": 1}, {"padding": 1}], {"kernel": 1, "stride": 2}, 2),
        ([{"padding": 1}, {"stride": 2, "padding": 1}], {"kernel": 1, "stride": 2}, 2),
        # ResNet-D: an average pool of 2 x 2 as the shortcut's kernel, read at the first layer.
        ([{"stride": 2, "padding": 1}, {"padding": 1}],
         {"kernel": 2, "stride": 2, "padding": (0, 1)}, 1),
        # A 3x3 shortcut that pads like the main branch (RepVGG, DBB).
        ([{"padding": 1}], {"kernel": 3, "padding": 1}, 1),
        # Valid convolutions and a centre crop.
        ([{}, {}], {"kernel": 1, "padding": -2}, 2),
        # Dilated layers.
        ([{"dilation": 2, "padding": 2}] * 2, {"kernel": 1}, 2),
        # Even kernels, the odd zero on the right and then on the left.
        ([{"kernel": 2, "padding": (0, 1)}, {"kernel": 2, "padding": (1, 0)}], {"kernel": 1}, 2),
        # No tap at the centre: the Dirac tap lies between the kernel's own.
        ([{"kernel": 2, "dilation": 2, "padding": 1}] * 2, {"kernel": 1}, 2),
    ],
    ids=["stride first", "stride last", "resnet-d", "repvgg", "crop", "dilated", "even", "no tap"],
)  # fmt: skip
@pytest.mark.parametrize("dims", [1, 2])
def test_the_geometry_of_known_networks_fits(
    layers: list[dict[str, Any]], shortcut: dict[str, Any], count: int, dims: int
) -> None:
    chain = [conv(dims=dims, **options) for options in layers]
    beside = conv(dims=dims, **shortcut)
    assert len(found(chain, beside)) == count
    assert check(chain, (7, 8, 9, 13), beside) == 4


def test_a_shortcut_that_reads_padding_fits_after_layers_that_keep_the_size() -> None:
    layers = [conv(kernel=3, padding=1), conv(kernel=3, padding=1), conv(kernel=3, padding=1)]
    shortcut = conv(kernel=3, padding=1)
    assert [j for j, _ in found(layers, shortcut)] == [0, 1, 2]
    assert check(layers, (5, 8), shortcut) == 2


def test_a_shortcut_that_reads_padding_does_not_fit_after_a_stride() -> None:
    layers = [conv(stride=2, padding=1), conv(padding=1)]
    shortcut = conv(stride=2, padding=1)
    assert [j for j, _ in found(layers, shortcut)] == [0]


@pytest.mark.parametrize("outs", [1, 5])
def test_channels_change_where_the_shortcut_stands(outs: int) -> None:
    layers = [conv(padding=1, outs=4), conv(padding=1, ins=4, outs=outs)]
    for j, beside in found(layers, conv(kernel=1, outs=outs)):
        widths = [(g.in_channels, g.out_channels) for g in beside]
        assert widths == ([(2, outs), (outs, outs)] if j == 0 else [(2, 2), (2, outs)])


def test_other_strides_are_refused() -> None:
    result = placements([conv(stride=2, padding=1)], [AffineConv.identity(2, 1)])
    assert isinstance(result, Refusal)
    assert result.reason == "the branch has stride 2 and the shortcut 1"


@pytest.mark.parametrize("padding", [0, 2, (0, 1)])
def test_other_sizes_are_refused(padding: Any) -> None:
    result = placements([conv(padding=padding)], [AffineConv.identity(2, 1)])
    assert isinstance(result, Refusal)
    assert "sizes" in result.reason


def test_every_dimension_counts() -> None:
    tall = AffineConv(torch.ones(1, 1, 3, 3), torch.zeros(1), (1, 1), ((1, 1), (0, 0)), (1, 1))
    assert isinstance(placements([tall], [AffineConv.identity(1, 2)]), Refusal)


def test_layers_without_space_always_fit() -> None:
    layers = [AffineConv(torch.randn(3, 2), torch.zeros(3), (), (), ()) for _ in range(2)]
    assert [j for j, _ in found(layers, AffineConv.identity(2, 0))] == [0, 1]


@pytest.mark.parametrize(
    ("options", "inside"),
    [
        ({"kernel": 1}, True),
        ({"kernel": 1, "stride": 2}, True),
        ({"kernel": 1, "padding": -1}, True),
        ({"kernel": 1, "padding": (-1, 1)}, False),
        ({"kernel": 1, "padding": (1, -1)}, False),
        ({"kernel": 1, "padding": 1}, False),
        # Output ⌊(H + 2) / 2⌋: the zero on the right is read for odd H only.
        ({"kernel": 1, "stride": 2, "padding": (0, 1)}, False),
        ({"kernel": 2, "padding": -1}, False),
    ],
)
def test_a_layer_of_one_tap_reads_inside_or_not(options: dict[str, Any], inside: bool) -> None:
    assert reads_inside(conv(**options)) is inside


@given(st.integers(-3, 3), st.integers(1, 3), st.integers(0, 2))
def test_a_dirac_tap_reads_one_offset(offset: int, stride: int, padding: int) -> None:
    f = conv(stride=stride, padding=padding)
    x = torch.randn(1, 2, 9, dtype=F64)
    y, far = apply(dirac(2, f, (offset,)), x), F.pad(x, (4, 9))
    assert y.shape == apply(f, x).shape
    for n in range(y.shape[2]):
        assert torch.equal(y[..., n], far[..., 4 + n * stride + offset])
