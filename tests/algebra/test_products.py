"""Products of linear layers: what they compute, and shapes that are known before the weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rmfx.algebra.affine import AffineConv
from rmfx.algebra.products import Unmerged, chain, compose, sum_of_taps, unmerged
from rmfx.errors import Refusal

F64 = torch.float64


@st.composite
def layers(draw: st.DrawFn, dims: int, n_in: int, *, pad: bool = False) -> AffineConv:
    """A layer of any window, which crops, or pads where told to."""
    groups = draw(st.sampled_from([n for n in (1, 2, n_in) if n_in % n == 0]))
    n_out = groups * draw(st.integers(1, 2))
    kernel, stride, dilation = (
        tuple(draw(st.integers(1, most)) for _ in range(dims)) for most in (3, 2, 2)
    )
    most = 2 if pad else 0
    pads = tuple((draw(st.integers(-1, most)), draw(st.integers(-1, most))) for _ in range(dims))
    weight = torch.randn(n_out, n_in // groups, *kernel, dtype=F64)
    return AffineConv(weight, torch.randn(n_out, dtype=F64), stride, pads, dilation, groups)


@st.composite
def rows(draw: st.DrawFn) -> list[AffineConv]:
    """Two or three layers in a row, of which the first alone may pad."""
    dims, width = draw(st.integers(0, 3)), draw(st.sampled_from((2, 4)))
    found: list[AffineConv] = []
    for i in range(2 if dims == 3 else draw(st.integers(2, 3))):
        found.append(draw(layers(dims, width, pad=not i)))
        width = found[-1].out_channels
    return found


def value_for(row: list[AffineConv]) -> Tensor:
    """A random value that is large enough."""
    size = 20 if len(row) == 2 else 45
    return torch.randn(2, row[0].in_channels, *[size] * row[0].dims, dtype=F64)


@given(rows())
def test_a_chain_of_layers_is_one_layer(row: list[AffineConv]) -> None:
    whole, x = chain(row), value_for(row)
    assert isinstance(whole, AffineConv)
    expected = x
    for layer in row:
        expected = layer(expected)
    torch.testing.assert_close(whole(x), expected, rtol=1e-10, atol=1e-10)


@given(rows(), st.data())
def test_products_of_products_have_all_factors(row: list[AffineConv], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(row)))
    first = unmerged(row[:cut])
    assert isinstance(first, AffineConv)
    whole = unmerged([first, *row[cut:]])
    assert isinstance(whole, Unmerged)
    assert whole.factors == tuple(row)
    assert whole.weight.untyped_storage().nbytes() <= 8  # zeros without memory
    made, direct = whole.merged(), chain(row)
    assert isinstance(made, AffineConv)
    assert isinstance(direct, AffineConv)
    assert (
        (made.kernel, made.padding)
        == (direct.kernel, direct.padding)
        == (whole.kernel, whole.padding)
    )
    assert torch.equal(made.weight, direct.weight)
    assert torch.equal(made.bias, direct.bias)


@given(rows(), st.integers(1, 2), st.integers(-1, 2))
def test_where_a_product_stands_may_be_changed_before_it_is_made(
    row: list[AffineConv], stride: int, left: int
) -> None:
    shape, product = unmerged(row), chain(row)
    assert isinstance(shape, Unmerged)
    assert isinstance(product, AffineConv)
    strides, pads = (stride,) * product.dims, ((left, 1),) * product.dims
    made = replace(shape, stride=strides, padding=pads).merged()
    assert isinstance(made, AffineConv)
    assert (made.stride, made.padding) == (strides, pads)
    assert torch.equal(made.weight, product.weight)


@given(rows())
def test_the_sum_of_taps_is_the_answer_to_a_constant(row: list[AffineConv]) -> None:
    layer = replace(row[0], padding=((0, 0),) * row[0].dims)
    value = torch.randn(layer.in_channels, dtype=F64)
    space = [8] * layer.dims
    x = value.reshape(1, -1, *[1] * layer.dims).expand(1, -1, *space)
    answer = layer(x) - layer.bias.reshape(1, -1, *[1] * layer.dims)
    constant = sum_of_taps(layer, value).reshape(1, -1, *[1] * layer.dims).expand_as(answer)
    torch.testing.assert_close(answer, constant)


@given(rows())
def test_what_forbids_a_product_forbids_its_shape(row: list[AffineConv]) -> None:
    inner = row[0]
    pads = ((1, 1),) * inner.dims
    outer = replace(AffineConv.identity(inner.out_channels, inner.dims), padding=pads)
    found, shape = compose(outer, inner), unmerged([inner, outer])
    assert isinstance(found, Refusal) == isinstance(shape, Refusal) == (inner.dims > 0)
