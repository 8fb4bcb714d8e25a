"""The laws of the algebra, one property each, against `torch.nn.functional` in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rmfx.algebra.affine import AffineConv
from rmfx.algebra.laws import (
    common_block,
    common_window,
    direct_sum,
    groups_side_by_side,
    in_turn,
    join,
    plus,
    spread,
    stack,
    window_of,
)
from rmfx.algebra.modules import from_batch_norm, from_conv, from_transposed_conv, to_modules
from rmfx.algebra.products import Unmerged, chain, compose, unmerged
from rmfx.errors import Refusal, WeightError

F64 = torch.float64
CONVS = (F.linear, F.conv1d, F.conv2d, F.conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
PADDINGS = st.tuples(st.integers(-2, 3), st.integers(-2, 3))


# ---- the oracle ---------------------------------------------------------------------------------


def apply(layer: AffineConv, x: Tensor) -> Tensor:
    """The layer's definition in terms of PyTorch's own operations."""
    weight, bias = layer.weight.to(x), layer.bias.to(x)
    if not layer.dims:
        blocks = weight.chunk(layer.groups)
        return F.linear(x, torch.block_diag(*blocks), bias)
    flat = [p for pair in reversed(layer.padding) for p in pair]
    options = (layer.stride, 0, layer.dilation, layer.groups)
    result: Tensor = CONVS[layer.dims](F.pad(x, flat), weight, bias, *options)
    return result


def same(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * (1 + b.abs().max()))


def equal_maps(a: AffineConv, b: AffineConv) -> bool:
    """Whether two layers are the same function of inputs of one size that suits both."""
    x = inputs_of_each([a, b])[0]
    return same(apply(a, x), apply(b, x))


def inputs(*chain_of: AffineConv, slack: int = 2) -> Tensor:
    """A random input, just large enough for layers one after the other, and `slack` larger."""
    size = []
    for i in range(chain_of[0].dims):
        need = 1
        for layer in reversed(chain_of):
            crop = sum(max(-p, 0) for p in layer.padding[i])
            need = max(need * layer.stride[i] - layer.growth[i], crop + 1)
        size.append(need + slack + i)
    return torch.randn(2, chain_of[0].in_channels, *size, dtype=F64)


def inputs_of_each(side_by_side: list[AffineConv]) -> list[Tensor]:
    """Random inputs of one size for layers side by side."""
    sizes = zip(*(inputs(f).shape[2:] for f in side_by_side), strict=True)
    size = [max(n) for n in sizes]
    return [torch.randn(2, f.in_channels, *size, dtype=F64) for f in side_by_side]


def merged(result: AffineConv | Refusal) -> AffineConv:
    assert isinstance(result, AffineConv), result
    return result


# ---- strategies ---------------------------------------------------------------------------------


@st.composite
def layers(
    draw: st.DrawFn,
    *,
    dims: int | None = None,
    ins: int | None = None,
    outs: int | None = None,
    padding: st.SearchStrategy[tuple[int, int]] = PADDINGS,
    stride: tuple[int, ...] | None = None,
    growth: tuple[int, ...] | None = None,
    bias: bool | None = None,
    depthwise: bool = False,
) -> AffineConv:
    """Any valid layer; `growth` fixes the output size by choosing the right padding."""
    dims = draw(st.integers(0, 3)) if dims is None else dims
    most = 2 if dims == 3 else 3
    each = st.tuples(*[st.integers(1, most)] * dims)
    kernel, dilation = draw(each), draw(st.tuples(*[st.integers(1, 2)] * dims))
    stride = draw(each) if stride is None else stride
    ins = draw(st.sampled_from((1, 2, 4, 6))) if ins is None else ins
    outs = ins if depthwise else draw(st.sampled_from((1, 2, 4, 6))) if outs is None else outs
    common = [g for g in range(1, math.gcd(ins, outs) + 1) if math.gcd(ins, outs) % g == 0]
    groups = ins if depthwise else draw(st.sampled_from(common))
    pads = draw(st.tuples(*[padding] * dims))
    if growth is not None:
        spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = tuple(
            (left, a - left + span + 1 - s)
            for (left, _), a, span, s in zip(pads, growth, spans, stride, strict=True)
        )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    weight = torch.randn(outs, ins // groups, *kernel, generator=generator, dtype=F64)
    biased = draw(st.booleans()) if bias is None else bias
    own = (
        torch.randn(outs, generator=generator, dtype=F64) if biased else torch.zeros(outs).double()
    )
    return AffineConv(weight, own, stride, pads, dilation, groups)


@st.composite
def pairs(draw: st.DrawFn, **options: Any) -> tuple[AffineConv, AffineConv]:
    """(outer, inner) that fit one another."""
    inner = draw(layers(**options))
    options["dims"] = inner.dims
    return draw(layers(ins=inner.out_channels, **options)), inner


@st.composite
def siblings(
    draw: st.DrawFn, *, count: int = 2, same_ins: bool = False, same_outs: bool = False
) -> list[AffineConv]:
    """Layers of equal stride and output size, with windows of their own."""
    first = draw(layers())
    options = {"dims": first.dims, "stride": first.stride, "growth": first.growth}
    ins = first.in_channels if same_ins else None
    outs = first.out_channels if same_outs else None
    return [first] + [draw(layers(ins=ins, outs=outs, **options)) for _ in range(count - 1)]


# ---- sizes --------------------------------------------------------------------------------------


@given(layers(), st.integers(0, 3))
def test_output_size_is_what_torch_gives(layer: AffineConv, slack: int) -> None:
    x = inputs(layer, slack=slack)
    assert layer.output_size(x.shape[2:]) == tuple(apply(layer, x).shape[2:])


@given(layers(), st.integers(0, 3))
def test_calling_a_layer_applies_it(layer: AffineConv, slack: int) -> None:
    x = inputs(layer, slack=slack)
    assert same(layer(x), apply(layer, x))


@given(pairs())
def test_growth_of_a_chain_is_a1_plus_s1_a2(pair: tuple[AffineConv, AffineConv]) -> None:
    outer, inner = pair
    strides = tuple(a * b for a, b in zip(inner.stride, outer.stride, strict=True))
    growth = tuple(
        a + s * b for a, s, b in zip(inner.growth, inner.stride, outer.growth, strict=True)
    )
    for h in range(40):
        size = (h,) * inner.dims
        nested = outer.output_size(inner.output_size(size))
        assert nested == tuple((h + a) // s for a, s in zip(growth, strides, strict=True))


# ---- compose ------------------------------------------------------------------------------------


@given(pairs(), st.integers(12, 15))  # more than a merged crop takes away
def test_compose_is_exact_wherever_it_is_not_refused(
    pair: tuple[AffineConv, AffineConv], slack: int
) -> None:
    outer, inner = pair
    result = compose(outer, inner)
    x = inputs(inner, outer, slack=slack)
    if isinstance(result, Refusal):
        assert outer.pads
    else:
        assert same(apply(result, x), apply(outer, apply(inner, x)))


@given(pairs(padding=st.tuples(st.integers(-1, 3), st.integers(-1, 3)), bias=False))
def test_compose_of_layers_without_bias_is_exact_or_refused(
    pair: tuple[AffineConv, AffineConv],
) -> None:
    outer, inner = pair
    result = compose(outer, inner)
    x = inputs(inner, outer)
    if isinstance(result, AffineConv):
        assert same(apply(result, x), apply(outer, apply(inner, x)))


@given(pairs(padding=st.tuples(st.integers(-1, 0), st.integers(-1, 0))))
def test_compose_is_never_refused_where_the_outer_layer_does_not_pad(
    pair: tuple[AffineConv, AffineConv],
) -> None:
    outer, inner = pair
    result = merged(compose(outer, inner))
    x = inputs(inner, outer)
    assert same(apply(result, x), apply(outer, apply(inner, x)))


@given(layers(depthwise=True), st.data())
def test_compose_with_a_depthwise_layer_keeps_the_groups(
    inner: AffineConv, data: st.DataObject
) -> None:
    crop = st.tuples(st.integers(-1, 0), st.integers(-1, 0))
    outer = data.draw(layers(dims=inner.dims, ins=inner.out_channels, padding=crop))
    result = merged(compose(outer, inner))
    assert result.groups == outer.groups
    x = inputs(inner, outer)
    assert same(apply(result, x), apply(outer, apply(inner, x)))
    other = data.draw(layers(dims=inner.dims, outs=inner.in_channels))
    if not inner.pads:
        assert merged(compose(inner, other)).groups == other.groups


def conv(
    *,
    ins: int = 2,
    outs: int = 2,
    kernel: int = 3,
    padding: int = 0,
    stride: int = 1,
    bias: bool = True,
    groups: int = 1,
    dtype: torch.dtype = F64,
) -> AffineConv:
    """A 2-D layer as a person would write it."""
    weight = torch.randn(outs, ins // groups, kernel, kernel, dtype=dtype)
    own = torch.randn(outs, dtype=dtype) if bias else torch.zeros(outs, dtype=dtype)
    pads = ((padding, padding),) * 2
    return AffineConv(weight, own, (stride, stride), pads, (1, 1), groups)


def test_compose_is_refused_where_padding_meets_a_bias() -> None:
    result = compose(conv(padding=1), conv(kernel=1))
    assert isinstance(result, Refusal)
    assert "bias" in result.reason


def test_compose_is_refused_where_the_inner_kernel_sees_over_the_border() -> None:
    result = compose(conv(padding=1), conv(padding=1, bias=False))
    assert isinstance(result, Refusal)
    assert "kernel" in result.reason


def test_compose_allows_padding_after_a_pointwise_layer_without_bias() -> None:
    outer, inner = conv(padding=1), conv(kernel=1, bias=False)
    x = torch.randn(1, 2, 5, 4, dtype=F64)
    assert same(apply(merged(compose(outer, inner)), x), apply(outer, apply(inner, x)))


@pytest.mark.parametrize("fault", ["channels", "dims"])
def test_compose_is_refused_where_layers_do_not_fit(fault: str) -> None:
    inner = AffineConv.identity(3 if fault == "channels" else 2, 1 if fault == "dims" else 2)
    assert isinstance(compose(conv(), inner), Refusal)


@given(st.data())
def test_compose_is_associative(data: st.DataObject) -> None:
    crop = st.tuples(st.integers(-1, 0), st.integers(-1, 0))
    h = data.draw(layers(padding=st.tuples(st.integers(-1, 2), st.integers(-1, 2))))
    g = data.draw(layers(dims=h.dims, ins=h.out_channels, padding=crop))
    f = data.draw(layers(dims=h.dims, ins=g.out_channels, padding=crop))
    left = merged(compose(merged(compose(f, g)), h))
    right = merged(compose(f, merged(compose(g, h))))
    x = inputs(h, g, f)
    assert same(apply(left, x), apply(f, apply(g, apply(h, x))))
    assert (left.stride, left.growth) == (right.stride, right.growth)
    assert equal_weights(left, right)
    assert equal_weights(merged(chain([h, g, f])), left)


def equal_weights(a: AffineConv, b: AffineConv) -> bool:
    """Whether two layers have equal weights in one window, with one group."""
    one, two = merged_window(a.regroup(1), b.regroup(1))
    return same(one.weight, two.weight) and same(one.bias, two.bias)


def merged_window(*given: AffineConv) -> list[AffineConv]:
    found = common_window(given)
    assert not isinstance(found, Refusal), found
    return found


def test_chain_stops_at_the_first_refusal() -> None:
    assert isinstance(chain([conv(), conv(padding=1), conv()]), Refusal)


# ---- stack, join, direct sum, plus --------------------------------------------------------------


@given(siblings(same_ins=True, count=3))
def test_stack_puts_outputs_one_below_the_other(found: list[AffineConv]) -> None:
    x = inputs_of_each(found)[0]
    assert same(apply(merged(stack(*found)), x), torch.cat([apply(f, x) for f in found], 1))


def in_runs(parts: Sequence[Tensor], runs: int) -> Tensor:
    """Values (batch, channels, …) whose channels take turns."""
    return in_turn([x.transpose(0, 1) for x in parts], runs).transpose(0, 1)


def runs_of(data: st.DataObject, groups: int, *counts: int) -> int:
    """A multiple of the groups that divides numbers of channels."""
    fits = [n for n in range(1, math.gcd(*counts) + 1) if not n % groups]
    return data.draw(st.sampled_from([n for n in fits if not any(c % n for c in counts)]))


def groups_of(data: st.DataObject, found: list[AffineConv]) -> int:
    """A number that divides the groups of each layer."""
    common = math.gcd(*(f.groups for f in found))
    return data.draw(st.sampled_from([n for n in range(1, common + 1) if common % n == 0]))


@given(siblings(same_ins=True), st.data())
def test_a_stack_may_take_turns_and_stay_grouped(
    found: list[AffineConv], data: st.DataObject
) -> None:
    x, groups = inputs_of_each(found)[0], groups_of(data, found)
    runs = runs_of(data, groups, *(f.out_channels for f in found))
    together = merged(stack(*found, groups=groups, runs=runs))
    assert together.groups == groups
    assert same(apply(together, x), in_runs([apply(f, x) for f in found], runs))


@given(siblings(same_outs=True), st.data())
def test_a_join_may_read_what_takes_turns(found: list[AffineConv], data: st.DataObject) -> None:
    xs, groups = inputs_of_each(found), groups_of(data, found)
    runs = runs_of(data, groups, *(f.in_channels for f in found))
    together = merged(join(*found, groups=groups, runs=runs))
    total = sum(apply(f, x) for f, x in zip(found, xs, strict=True))
    assert together.groups == groups
    assert isinstance(total, Tensor)
    assert same(apply(together, in_runs(xs, runs)), total)


@given(siblings(), st.data())
def test_each_group_may_hold_a_share_of_both(found: list[AffineConv], data: st.DataObject) -> None:
    xs, groups = inputs_of_each(found), groups_of(data, found)
    before = runs_of(data, groups, *(f.in_channels for f in found))
    behind = runs_of(data, groups, *(f.out_channels for f in found))
    together = merged(spread(*found, groups=groups, runs=(before, behind)))
    ys = [apply(f, x) for f, x in zip(found, xs, strict=True)]
    assert together.groups == groups
    assert same(apply(together, in_runs(xs, before)), in_runs(ys, behind))


@given(siblings(), st.data())
def test_a_direct_sum_hands_its_runs_on(found: list[AffineConv], data: st.DataObject) -> None:
    counts = groups_side_by_side(merged_window(*found))
    widths = counts or [n for f in found for n in (f.in_channels, f.out_channels)]
    runs = runs_of(data, 1, *widths)
    together, xs = merged(direct_sum(*found, runs=runs)), inputs_of_each(found)
    ys = [apply(f, x) for f, x in zip(found, xs, strict=True)]
    assert together.groups == (sum(counts) if counts else 1)
    assert same(apply(together, in_runs(xs, runs)), in_runs(ys, runs))


@given(st.data())
def test_the_shape_of_a_product_is_known_before_its_weights(data: st.DataObject) -> None:
    inner = data.draw(layers(padding=st.tuples(st.integers(-1, 2), st.integers(-1, 2))))
    outer = data.draw(layers(dims=inner.dims, ins=inner.out_channels))
    shape, product = unmerged([inner, outer]), compose(outer, inner)
    if isinstance(product, Refusal):
        assert isinstance(shape, Refusal)
        assert shape.reason == product.reason
        return
    assert isinstance(shape, Unmerged)
    for name in ("stride", "padding", "dilation", "kernel", "groups", "block"):
        assert getattr(shape, name) == getattr(product, name), name
    assert shape.has_bias or not product.has_bias
    wide = (product.in_channels + 2, product.out_channels + 1)
    assert equal_weights(merged(shape.merged()), product)
    padded = shape.pad_channels(*wide)
    assert isinstance(padded, Unmerged)
    assert equal_weights(merged(padded.merged()), product.pad_channels(*wide))


@given(siblings(same_outs=True, count=3))
def test_join_adds_the_layers_of_the_blocks(found: list[AffineConv]) -> None:
    xs = inputs_of_each(found)
    total = sum(apply(f, x) for f, x in zip(found, xs, strict=True))
    assert isinstance(total, Tensor)
    assert same(apply(merged(join(*found)), torch.cat(xs, 1)), total)


@given(siblings(count=3))
def test_direct_sum_lets_each_layer_act_on_its_block(found: list[AffineConv]) -> None:
    xs = inputs_of_each(found)
    expected = torch.cat([apply(f, x) for f, x in zip(found, xs, strict=True)], 1)
    assert same(apply(merged(direct_sum(*found)), torch.cat(xs, 1)), expected)


@given(siblings(same_ins=True, same_outs=True, count=3))
def test_plus_adds_the_outputs(found: list[AffineConv]) -> None:
    x = inputs_of_each(found)[0]
    total = sum(apply(f, x) for f in found)
    assert isinstance(total, Tensor)
    assert same(apply(merged(plus(*found)), x), total)


@given(siblings(same_ins=True, same_outs=True))
def test_add_after_direct_sum_after_duplicate_is_plus(found: list[AffineConv]) -> None:
    f, g = found
    ones = AffineConv.identity(f.in_channels, f.dims), AffineConv.identity(f.out_channels, f.dims)
    duplicate, add = merged(stack(ones[0], ones[0])), merged(join(ones[1], ones[1]))
    middle = merged(direct_sum(f, g))
    x = inputs_of_each(found)[0]
    expected = apply(f, x) + apply(g, x)
    assert same(apply(add, apply(middle, apply(duplicate, x))), expected)
    # The same, merged into one layer: neither Δ nor ∇ has a kernel or a bias.
    whole = merged(compose(merged(compose(add, middle)), duplicate))
    assert same(apply(whole, x), expected)


@given(siblings(), st.data())
def test_direct_sums_compose_blockwise(outers: list[AffineConv], data: st.DataObject) -> None:
    f, g = outers
    first = data.draw(layers(dims=f.dims, outs=f.in_channels))
    options = {"dims": f.dims, "stride": first.stride, "growth": first.growth}
    second = data.draw(layers(outs=g.in_channels, **options))
    # (f ⊕ g) ∘ (h ⊕ k) = (f ∘ h) ⊕ (g ∘ k), where both sides exist.
    above, below = merged(direct_sum(f, g)), merged(direct_sum(first, second))
    sides = compose(f, first), compose(g, second)
    if any(isinstance(side, Refusal) for side in sides):
        return
    right = merged(direct_sum(*map(merged, sides)))
    left = compose(above, below)
    # A wider common window may read padding where no layer alone did; never a different function.
    if isinstance(left, AffineConv):
        assert equal_weights(left, right)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 3))
def test_the_direct_sum_of_identities_is_the_identity(m: int, n: int, dims: int) -> None:
    found = merged(direct_sum(AffineConv.identity(m, dims), AffineConv.identity(n, dims)))
    whole = AffineConv.identity(m + n, dims)
    assert torch.equal(found.weight, whole.weight)
    assert (found.groups, found.stride, found.padding) == (m + n, whole.stride, whole.padding)


@pytest.mark.parametrize("law", [stack, join, direct_sum, plus])
@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (conv(stride=2), "strides differ"),
        (conv(padding=1), "output sizes"),
        (AffineConv.identity(2, 1), "spatial dimensions"),
    ],
)
def test_side_by_side_is_refused_where_sizes_may_differ(
    law: Callable[..., AffineConv | Refusal], other: AffineConv, reason: str
) -> None:
    result = law(conv(), other)
    assert isinstance(result, Refusal)
    assert reason in result.reason


@given(siblings(count=3))
def test_the_common_window_is_common(found: list[AffineConv]) -> None:
    windows = merged_window(*found)
    first = windows[0]
    assert all(
        (w.kernel, w.dilation, w.padding) == (first.kernel, first.dilation, first.padding)
        for w in windows
    )
    for f, w in zip(found, windows, strict=True):
        assert equal_maps(f, w)


def test_the_window_of_a_wide_and_a_dilated_kernel_has_their_common_step() -> None:
    wide = AffineConv(torch.ones(1, 1, 3), torch.zeros(1), (1,), ((2, 2),), (2,))
    single = AffineConv(torch.ones(1, 1, 1), torch.zeros(1), (1,), ((0, 0),), (1,))
    assert window_of([wide, single]) == ((2,), (2,), (3,))
    shifted = AffineConv(torch.ones(1, 1, 1), torch.zeros(1), (1,), ((1, -1),), (1,))
    assert window_of([wide, shifted]) == ((2,), (1,), (5,))


# ---- grouped or dense ---------------------------------------------------------------------------


def test_direct_sum_is_grouped_where_blocks_fit() -> None:
    main, carry = conv(ins=8, outs=8, groups=4), AffineConv.identity(6, 2, padding=((-1, -1),) * 2)
    found = merged(direct_sum(main, carry))
    # Groups of 2 channels: 8 of main and 6 of the carry, one weight each per tap and group input.
    assert (found.groups, found.multiply_adds()) == (7, 14 * 2 * 9)


def test_direct_sum_of_depthwise_layers_stays_depthwise() -> None:
    main, carry = conv(ins=3, outs=3, groups=3), AffineConv.identity(5, 2, padding=((-1, -1),) * 2)
    assert merged(direct_sum(main, carry)).is_depthwise


def test_direct_sum_is_dense_where_blocks_do_not_fit() -> None:
    main, carry = conv(ins=4, outs=2), AffineConv.identity(3, 2, padding=((-1, -1),) * 2)
    found = merged(direct_sum(main, carry))
    assert (found.groups, found.multiply_adds()) == (1, 5 * 7 * 9)
    odd = AffineConv.identity(3, 2, padding=((-1, -1),) * 2)
    assert merged(direct_sum(conv(ins=4, outs=4), odd)).groups == 1


def test_common_block_is_the_smallest_that_all_blocks_divide() -> None:
    assert common_block([(2, 2), (3, 3)]) == (6, 6)
    assert common_block([(2, 4), (1, 2)]) == (2, 4)
    assert common_block([(2, 4), (1, 1)]) is None


@given(layers())
def test_multiply_adds_are_weights_times_positions(layer: AffineConv) -> None:
    taps = math.prod(layer.kernel)
    per_output = layer.in_channels // layer.groups * taps
    assert layer.multiply_adds() == layer.out_channels * per_output
    assert layer.multiply_adds(7) == 7 * layer.multiply_adds()


# ---- other forms of one function ----------------------------------------------------------------


@given(layers(), st.data())
def test_regroup_keeps_the_function(layer: AffineConv, data: st.DataObject) -> None:
    groups = data.draw(st.sampled_from([g for g in (1, 2, 3, 4, 6) if layer.groups % g == 0]))
    found = layer.regroup(groups)
    assert found.groups == groups
    assert equal_maps(layer, found)


@given(layers())
def test_splitting_into_groups_undoes_regrouping(layer: AffineConv) -> None:
    found = layer.regroup(1).split_into_groups()
    assert equal_maps(layer, found)
    assert found.groups >= layer.groups or not layer.dims


@given(layers(), st.data())
def test_in_window_keeps_the_function_and_the_size(layer: AffineConv, data: st.DataObject) -> None:
    steps = [data.draw(st.sampled_from((1, d) if k > 1 else (1, 2)))
             for d, k in zip(layer.dilation, layer.kernel, strict=True)]  # fmt: skip
    before, after = (data.draw(st.tuples(*[st.integers(0, 2)] * layer.dims)) for _ in range(2))
    left = tuple(
        own + n * step for (own, _), n, step in zip(layer.padding, before, steps, strict=True)
    )
    kernel = tuple(
        b + span // step + 1 + a
        for b, span, step, a in zip(before, layer.span, steps, after, strict=True)
    )
    found = layer.in_window(left, tuple(steps), kernel)
    assert (found.kernel, found.dilation, found.growth) == (kernel, tuple(steps), layer.growth)
    assert equal_maps(layer, found)


@given(layers(), st.integers(0, 3), st.integers(0, 3))
def test_padded_channels_are_ignored_and_zero(layer: AffineConv, ins: int, outs: int) -> None:
    found = layer.pad_channels(layer.in_channels + ins, layer.out_channels + outs)
    x = inputs(layer)
    extra = torch.randn(2, ins, *x.shape[2:], dtype=F64)
    y = apply(found, torch.cat([x, extra], 1))
    assert same(y[:, : layer.out_channels], apply(layer, x))
    assert not y[:, layer.out_channels :].any()


def test_padding_the_channels_of_a_depthwise_layer_keeps_it_depthwise() -> None:
    assert AffineConv.identity(3, 2).pad_channels(4, 4).is_depthwise


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (AffineConv.identity(2, 2), {"is_depthwise", "is_pointwise", "preserves_size"}),
        (conv(padding=1), {"pads", "has_bias", "preserves_size"}),
        (conv(kernel=1, stride=2, bias=False), {"is_pointwise"}),
        (AffineConv.identity(2, 1, padding=((1, -1),)),
         {"is_depthwise", "is_pointwise", "preserves_size", "pads"}),
    ],
)  # fmt: skip
def test_what_a_layer_says_of_itself(layer: AffineConv, names: set[str]) -> None:
    known = ("is_depthwise", "is_pointwise", "preserves_size", "pads", "has_bias")
    assert {name for name in known if getattr(layer, name)} == names


# ---- made from modules --------------------------------------------------------------------------


@given(st.integers(0, 3), st.booleans(), st.integers(0, 99))
def test_batch_norm_in_eval_mode_is_a_scale(dims: int, affine: bool, seed: int) -> None:
    torch.manual_seed(seed)
    bn = BATCH_NORMS[dims](3, affine=affine, eps=1e-2).double().eval()
    bn.running_mean, bn.running_var = torch.randn(3).double(), torch.rand(3).double() + 0.1
    if affine:
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
    layer = merged(from_batch_norm(bn, dims))
    x = torch.randn(4, 3, *[5] * dims, dtype=F64)
    expected = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=1e-2)
    assert layer.is_depthwise
    assert same(apply(layer, x), expected)


def test_batch_norm_without_statistics_is_refused() -> None:
    found = from_batch_norm(nn.BatchNorm2d(3, track_running_stats=False), 2)
    assert isinstance(found, Refusal)
    assert "statistics" in found.reason


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 2),
    st.sampled_from(("valid", "same", 0, 1, 2)),
    st.sampled_from((1, 2)),
    st.booleans(),
)
def test_conv_modules_are_read_with_all_their_options(
    dims: int, kernel: int, stride: int, dilation: int, padding: str | int, groups: int, bias: bool
) -> None:
    stride = 1 if padding == "same" else stride
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    module = kind(
        2, 4, kernel, stride=stride, dilation=dilation, padding=padding, groups=groups, bias=bias
    ).double()  # fmt: skip
    x = torch.randn(1, 2, *[9, 8, 7][:dims], dtype=F64)
    # PyTorch warns that it pads an even kernel by a copy; that copy is what is compared with.
    options = (module.stride, module.padding, module.dilation, groups)
    expected = no_warning(CONVS[dims], x, module.weight, module.bias, *options)
    assert same(apply(merged(from_conv(module)), x), expected)


def no_warning(function: Callable[..., Tensor], *args: Any) -> Tensor:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args).detach()


def test_linear_modules_have_no_space() -> None:
    module = nn.Linear(3, 5).double()
    layer = merged(from_conv(module))
    x = torch.randn(2, 4, 3, dtype=F64)
    assert (layer.dims, layer.in_channels, layer.out_channels) == (0, 3, 5)
    assert same(apply(layer, x), F.linear(x, module.weight, module.bias).detach())


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_padding_modes_are_refused_unless_nothing_is_padded(mode: Any) -> None:
    found = from_conv(nn.Conv2d(2, 2, 3, padding=1, padding_mode=mode))
    assert isinstance(found, Refusal)
    assert mode in found.reason
    assert isinstance(from_conv(nn.Conv2d(2, 2, 3, padding_mode=mode)), AffineConv)


@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2), st.booleans(),
    st.integers(0, 1),
)  # fmt: skip
def test_transposed_convolutions_of_stride_1_are_convolutions(
    dims: int, kernel: int, padding: int, dilation: int, grouped: bool, extra: int
) -> None:
    kind: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    options = {"padding": padding, "dilation": dilation, "groups": 2 if grouped else 1}
    extra = min(extra, dilation - 1)
    module = kind(4, 6, kernel, output_padding=extra, **options).double()
    layer = merged(from_transposed_conv(module))
    x = torch.randn(2, 4, *[7, 6, 5][:dims], dtype=F64)
    assert same(apply(layer, x), module(x).detach())


def test_transposed_convolutions_with_a_stride_are_refused() -> None:
    assert isinstance(from_conv(nn.ConvTranspose2d(2, 2, 3)), Refusal)
    assert isinstance(from_transposed_conv(nn.ConvTranspose2d(2, 2, 2, 2)), Refusal)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 1), st.booleans())
def test_average_pools_are_depthwise_convs(
    dims: int, kernel: int, stride: int, padding: int, divided: bool
) -> None:
    padding, divided = min(padding, kernel // 2), divided and dims > 1
    layer = merged(
        AffineConv.average_pool(
            2, (kernel,) * dims, (stride,) * dims, (padding,) * dims, divisor=3 if divided else None
        )
    )
    x = torch.randn(1, 2, *[9, 8, 7][:dims], dtype=F64)
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[dims - 1]
    options = {"divisor_override": 3} if divided else {}
    assert layer.is_depthwise
    assert same(apply(layer, x), pool(x, kernel, stride, padding, **options))


def test_average_pools_that_average_less_at_the_border_are_refused() -> None:
    found = AffineConv.average_pool(2, (2,), (1,), (1,), count_include_pad=False)
    assert isinstance(found, Refusal)
    assert "count_include_pad" in found.reason


@pytest.mark.parametrize(
    "options",
    [
        {"padding": (0,), "count_include_pad": False},
        {"padding": (1,), "count_include_pad": False, "divisor": 2},
    ],
)
def test_options_of_average_pools_that_change_nothing_are_accepted(options: dict[str, Any]) -> None:
    given_ = {"kernel": (2,), "stride": (2,), "padding": (0,)} | options
    assert isinstance(AffineConv.average_pool(2, **given_), AffineConv)


# ---- turned back into modules -------------------------------------------------------------------


@given(layers())
def test_modules_apply_the_layer_in_float64(layer: AffineConv) -> None:
    module = nn.Sequential(*to_modules(layer, F64, torch.device("cpu")))
    x = inputs(layer)
    assert same(module(x).detach(), apply(layer, x))
    assert not module[-1].training
    assert (module[-1].bias is not None) == layer.has_bias


@given(layers())
def test_modules_apply_the_layer_in_float32(layer: AffineConv) -> None:
    module = nn.Sequential(*to_modules(layer, torch.float32, torch.device("cpu")))
    x = inputs(layer)
    assert all(p.dtype == torch.float32 for p in module.parameters())
    assert same(module(x.float()).detach().double(), apply(layer, x), tolerance=1e-5)


def test_symmetric_padding_needs_one_module_and_any_other_two() -> None:
    device = torch.device("cpu")
    assert [type(m) for m in to_modules(conv(padding=1), F64, device)] == [nn.Conv2d]
    crop = AffineConv.identity(2, 2, padding=((0, 1), (-1, 0)))
    assert [type(m) for m in to_modules(crop, F64, device)] == [nn.ZeroPad2d, nn.Conv2d]
    assert [type(m) for m in to_modules(AffineConv.identity(2, 0), F64, device)] == [nn.Linear]


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_weight_too_large_for_its_type_is_an_error(part: str) -> None:
    big = torch.full((1,), 1e5, dtype=F64)
    one = torch.ones(1, dtype=F64)
    layer = AffineConv.scale(*((big, one) if part == "weight" else (one, big)), dims=2)
    with pytest.raises(WeightError, match="float16"):
        to_modules(layer, torch.float16, torch.device("cpu"))


# ---- types --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_that_only_move_keep_their_type(dtype: torch.dtype) -> None:
    main = conv(kernel=1, dtype=dtype)
    carry = AffineConv.identity(2, 2)
    wider = torch.promote_types(dtype, torch.bfloat16)
    for law in (stack, join, direct_sum):
        found = merged(law(main, carry))
        assert found.weight.dtype == wider
    assert main.regroup(1).weight.dtype == dtype
    assert main.pad_channels(3, 3).weight.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("outer_groups", [1, 4])
@pytest.mark.parametrize("inner_groups", [1, 4])
@pytest.mark.parametrize("kernels", [(1, 1), (1, 3), (3, 1), (2, 2)])
def test_computed_weights_are_exact_to_float64(
    dtype: torch.dtype, outer_groups: int, inner_groups: int, kernels: tuple[int, int]
) -> None:
    outer = conv(ins=4, outs=4, kernel=kernels[0], groups=outer_groups, dtype=dtype)
    inner = conv(ins=4, outs=4, kernel=kernels[1], groups=inner_groups, dtype=dtype)
    found = merged(compose(outer, inner))
    assert found.weight.dtype == found.bias.dtype == F64
    x = torch.randn(1, 4, 6, 6, dtype=F64)
    assert same(apply(found, x), apply(outer, apply(inner, x)), tolerance=1e-13)


def test_sums_are_computed_in_float64() -> None:
    f, g = conv(dtype=torch.float32), conv(dtype=torch.float32)
    assert merged(plus(f, g)).weight.dtype == F64
    # Biases of a join add up, so they are summed in float64 too.
    assert torch.equal(merged(join(f, g)).bias, f.bias.double() + g.bias.double())
