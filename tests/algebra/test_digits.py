"""What a type has digits for: the laws, and every way past an activation bit for bit or by its law.

The block's own branch gives zero, so that what comes out is the carry and nothing else.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from builders import Residual, assert_removed, chain, conv, image, ready, types
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rmfx
from rmfx.algebra.activation import TABLE, Activation
from rmfx.algebra.affine import AffineConv
from rmfx.algebra.digits import (
    EXACTNESS,
    affords,
    bits_of,
    factor_up_or_down,
    lost_rows,
    smallest_scale,
)
from rmfx.algebra.modules import to_modules
from rmfx.errors import WeightError
from rmfx.testing import assert_equivalent

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FEW_ROUNDINGS = 6  # of weights, products, sums and the result


def spread(dtype: torch.dtype, largest: float, *, signed: bool, seed: int) -> Tensor:
    """Values of every size that a type has, the smallest included: (2, 4, 6, 5)."""
    generator = torch.Generator().manual_seed(seed)
    info = torch.finfo(dtype)
    down = max(math.log2(largest) - math.log2(info.tiny) - math.log2(info.eps), 1.0)
    size = torch.exp2(-down * torch.rand(240, generator=generator, dtype=torch.float64))
    sign = 1.0 - 2.0 * signed * torch.randint(0, 2, (240,), generator=generator).double()
    x = (largest * size * sign).clamp(-largest, largest).to(dtype)
    return torch.cat([x[:-2], torch.tensor([0.0, largest]).to(dtype)]).reshape(2, 4, 6, 5)


def silent(act: nn.Module, dtype: torch.dtype) -> Any:
    """x + 0, by a branch with an activation in its middle."""
    model = Residual(chain(conv(), act, conv())).to(dtype).eval()
    for layer in (model.branch[0], model.branch[2]):
        for parameter in layer.parameters():
            parameter.data.zero_()
    return model.requires_grad_(False)


def assert_keeps_its_promise(
    row: rmfx.SiteReport, x: Tensor, y: Tensor, least: float = 0.0
) -> None:
    """Compare a carry with what the report says of it.

    Args:
        least: the size from which on rounding is relative to the value.
    """
    info = torch.finfo(x.dtype)
    error, size = (y.double() - x.double()).abs(), x.double().abs()
    assert row.exactness in EXACTNESS
    assert row.gain is not None
    if row.exactness == "bit-exact":
        assert torch.equal(x, y)
    elif row.exactness == "normal numbers":
        floor = row.gain * info.tiny
        assert not bool(error[size >= floor].any())
        flushed = x.dtype == torch.bfloat16
        assert float(error.max()) <= floor * (1 if flushed else info.eps / 2)
    else:
        beside = size.clamp(min=least if row.strategy == "odd-pair" else float(size.max()))
        units = FEW_ROUNDINGS * 2**row.bits * info.eps / 2
        # An activation may halve a value near the smallest normal number.
        assert bool((error <= units * beside + 4 * row.gain * info.tiny).all())


# ---- the laws -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(k=st.integers(0, 20), mantissa=st.integers(-(2**24), 2**24), exponent=st.integers(-1100, 15))
def test_a_value_scaled_and_back_loses_digits_below_normal_numbers_only(
    dtype: torch.dtype, k: int, mantissa: int, exponent: int
) -> None:
    info = torch.finfo(dtype)
    x = torch.tensor(mantissa * 2.0**-24 * 2.0 ** max(exponent, -1000), dtype=torch.float64).to(
        dtype
    )
    assume(bool(torch.isfinite(x)))
    back = (x * torch.tensor(2.0**-k, dtype=dtype)) * 2.0**k
    error = abs(float(back) - float(x))
    if abs(float(x)) >= 2.0**k * info.tiny:
        assert error == 0
    assert error <= 2.0**k * info.tiny * info.eps / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(end=st.floats(1e-3, 1e4))
def test_what_the_smallest_scale_loses_lies_below_the_last_digit_of_the_end(
    dtype: torch.dtype, end: float
) -> None:
    info, scale = torch.finfo(dtype), smallest_scale(dtype, end)
    assert info.tiny / scale <= info.eps * end * (1 + 1e-9)
    assert scale >= info.tiny
    assert 1 / scale <= info.max


def test_a_type_affords_a_quarter_of_its_bits() -> None:
    assert [bits_of(dtype) for dtype in DTYPES] == [11, 8, 24, 53]
    assert [affords(dtype, 2.5) for dtype in DTYPES] == [True, False, True, True]
    assert [affords(dtype, 6.5) for dtype in DTYPES] == [False, False, False, True]


def test_a_factor_counts_up_and_down() -> None:
    assert factor_up_or_down(0.5, 3.0) == 3
    assert factor_up_or_down(-0.125, 3.0) == 8
    assert factor_up_or_down(0.0) == float("inf")


SLOPES = st.floats(-3, 3).filter(lambda a: abs(1 + a) > 1e-3)


@given(slope=SLOPES, x=st.floats(1e-3, 1e3))
def test_the_terms_of_a_pair_are_as_much_larger_as_said(slope: float, x: float) -> None:
    others = [nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.LogSigmoid(), nn.ReLU()]
    for act in (Activation(m) for m in (nn.LeakyReLU(slope), nn.RReLU(slope, slope), *others)):
        ends = act.apply(torch.tensor([x, -x], dtype=torch.float64))
        terms = float(ends.abs().sum()) / abs(act.odd * x)
        assert terms <= act.terms(x) * (1 + 1e-9)


def test_every_odd_row_has_its_terms() -> None:
    for kind, row in TABLE.items():
        if row.odd is not None:
            assert Activation(kind()).terms(1.0) >= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_beyond_a_type_are_lost_and_rows_of_zeros_are_not(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    rows = [[0.0, 0.0], [1.0, 0.0], [info.tiny, 0.0], [info.tiny / 2, info.tiny / 4]]
    layer = AffineConv.pointwise(torch.tensor(rows, dtype=torch.float64), dims=2)
    assert lost_rows(layer, dtype) == 1 / 4
    if dtype != torch.float64:
        rows.append([2 * info.max, 1.0])
        layer = AffineConv.pointwise(torch.tensor(rows, dtype=torch.float64), dims=2)
        assert lost_rows(layer, dtype) == 2 / 5


# ---- every way, in every type, for values of every size -----------------------------------------

ACTS = st.one_of(
    st.sampled_from([nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.ELU, nn.LogSigmoid]).map(
        lambda kind: kind()
    ),
    SLOPES.map(nn.LeakyReLU),
    SLOPES.map(lambda a: nn.RReLU(min(a, 0.5), max(a, 0.5))),
    SLOPES.map(lambda a: nn.PReLU(init=a)),
    st.floats(1e-4, 1e3).map(lambda end: nn.Hardtanh(0, end)),
    st.floats(1e-4, 1e3).map(lambda end: nn.Hardtanh(-end, 2 * end)),
    st.floats(-0.99, -0.9).map(nn.LeakyReLU),
)
WAYS: tuple[Any, ...] = ("auto", "relu", "odd-pair", "scale", ("identity", "scale"))


@settings(max_examples=100)
@given(
    act=ACTS,
    dtype=st.sampled_from(DTYPES),
    ways=st.sampled_from(WAYS),
    largest=st.floats(2.0**-8, 2.0**13).map(lambda v: float(torch.tensor(v).bfloat16())),
    signed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_carry_arrives_as_exactly_as_the_report_says(
    act: nn.Module, dtype: torch.dtype, ways: Any, largest: float, signed: bool, seed: int
) -> None:
    x = spread(dtype, largest, signed=signed, seed=seed)
    bounds = (-largest * signed, largest)
    gm = rmfx.remove_residuals(silent(act, dtype), x, activation=ways, input_range=bounds)
    (row,) = rmfx.report(gm).rows
    assert row.status == "removed" or ways != "auto"
    if row.status == "refused":
        return
    with torch.no_grad():
        # The terms of its pair are of order 1 however small x is.
        least = min(largest, 1.0) if isinstance(act, nn.LogSigmoid) else 0.0
        assert_keeps_its_promise(row, x, gm(x), least)


@pytest.mark.parametrize("largest", [1.0, 7.0, 1000.0, 8000.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_shifted_carry_arrives_as_exactly_as_the_report_says(
    dtype: torch.dtype, largest: float
) -> None:
    x = spread(dtype, largest, signed=True, seed=1)
    for act in (nn.ReLU(), nn.ReLU6(), nn.Hardtanh(0.5, 2)):
        options: dict[str, Any] = {"activation": "shift", "calibration": [x]}
        gm = rmfx.remove_residuals(
            silent(act, dtype), x, **options, input_range=(-largest, largest)
        )
        (row,) = rmfx.report(gm).rows
        if dtype in (torch.float32, torch.float64):
            assert (row.strategy, row.exactness) == ("shift", "rounding")
        if row.status == "removed":
            assert row.bits > 0
            assert_keeps_its_promise(row, x, gm(x))
        else:
            assert f"{dtype} has no digits for 'shift'" in row.reason


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scaled_carry_is_exact_in_normal_numbers(dtype: torch.dtype) -> None:
    x = spread(dtype, 16.0, signed=False, seed=0)
    gm = rmfx.remove_residuals(silent(nn.ReLU6(), dtype), x, input_range=(0, 16))
    (row,) = rmfx.report(gm).rows
    assert (row.strategy, row.exactness, row.gain) == ("scale", "normal numbers", 4)
    assert_keeps_its_promise(row, x, gm(x))
    assert dtype == torch.float64 or not torch.equal(gm(x), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scaled_carry_that_is_never_small_is_bit_exact(dtype: torch.dtype) -> None:
    x = (4 + 12 * torch.rand(2, 4, 6, 5)).to(dtype)
    gm = rmfx.remove_residuals(silent(nn.ReLU6(), dtype), x, input_range=(4, 16))
    (row,) = rmfx.report(gm).rows
    exactness = "normal numbers" if dtype == torch.bfloat16 else "bit-exact"
    assert (row.strategy, row.exactness, row.gain) == ("scale", exactness, 4)
    assert torch.equal(gm(x), x)


# ---- what is not chosen -------------------------------------------------------------------------


@pytest.mark.parametrize("end", [6.0, 1e-3])
def test_float16_is_not_scaled_into_subnormal_numbers(end: float) -> None:
    model, x = silent(nn.Hardtanh(0, end), torch.float16), image(dtype=torch.float16).abs() * end
    for dtype, way in ((torch.float16, "per-channel"), (torch.bfloat16, "scale")):
        gm = rmfx.remove_residuals(model.to(dtype), x.to(dtype), input_range=(0, 1000 * end))
        assert rmfx.report(gm).rows[0].strategy == way
        gm = rmfx.remove_residuals(
            model.to(dtype), x.to(dtype), input_range=(0, 1000 * end), activation="scale"
        )
        refused = "torch.float16 has no digits for 'scale'" in rmfx.report(gm).rows[0].reason
        assert refused == (dtype == torch.float16)


@pytest.mark.parametrize("make", [nn.LeakyReLU, lambda a: nn.PReLU(init=a)], ids=["leaky", "prelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pair_whose_factor_is_near_0_is_not_chosen(dtype: torch.dtype, make: Any) -> None:
    for slope, types_that_hold in ((-0.5, 4), (-0.9, 2), (-0.96, 2), (-0.999, 1), (-0.99999, 0)):
        model, x = silent(make(slope), dtype), spread(dtype, 4.0, signed=True, seed=0)
        gm = rmfx.remove_residuals(model, x, activation="odd-pair")
        (row,) = rmfx.report(gm).rows
        holds = (
            dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)[:types_that_hold]
        )
        assert (row.status == "removed") == holds, (slope, row)
        if holds:
            assert row.gain == pytest.approx(1 / (1 + slope), rel=0.02)
            assert row.bits == pytest.approx(math.log2((1 - slope) / (1 + slope)), rel=0.05)
            assert_keeps_its_promise(row, x, gm(x))
        else:
            if float(torch.tensor(slope).to(dtype)) != -1:  # where there is no factor at all
                assert f"{dtype} has no digits for 'odd-pair'" in row.reason
            assert "'per-channel'" in row.reason
        auto = rmfx.remove_residuals(model, x)
        assert rmfx.report(auto).rows[0].strategy == "per-channel"
        assert_keeps_its_promise(rmfx.report(auto).rows[0], x, auto(x))


def test_a_steep_slope_takes_no_value_beyond_the_type() -> None:
    x = torch.full((2, 4, 6, 5), 60000.0, dtype=torch.float16)
    x[:, ::2] *= -1
    gm = rmfx.remove_residuals(silent(nn.LeakyReLU(100.0), torch.float16), x, activation="odd-pair")
    (row,) = rmfx.report(gm).rows
    assert row.status == "removed"
    assert row.gain == 128
    assert_keeps_its_promise(row, x, gm(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_shortcut_is_not_scaled_into_subnormal_weights(dtype: torch.dtype) -> None:
    shortcut = conv(4, 4, 1)
    model = ready(Residual(chain(conv(), nn.Hardtanh(0, 1), conv()), shortcut), dtype)
    shortcut.weight.data = (4e-4 * torch.eye(4)).reshape(4, 4, 1, 1).to(dtype)
    shortcut.bias.data.zero_()
    x = (30000 * image().abs().clamp(max=1)).to(dtype)
    gm = rmfx.remove_residuals(model, x, activation="scale", input_range=(0, 30000))
    (row,) = rmfx.report(gm).rows
    assert row.status == ("refused" if dtype == torch.float16 else "removed")
    if dtype == torch.float16:
        assert "torch.float16 has no digits for 'scale'" in row.reason


def test_products_too_small_for_float16_are_an_error() -> None:
    weight = torch.full((2, 3, 1, 1), 1e-8, dtype=torch.float64)
    small = AffineConv(weight, weight.new_zeros(2), (1, 1), ((0, 0),) * 2, (1, 1))
    with pytest.raises(WeightError, match=r"too small for torch.float16.*torch.float32"):
        to_modules(small, torch.float16, torch.device("cpu"))
    for dtype in (torch.bfloat16, torch.float32):
        (module,) = to_modules(small, dtype, torch.device("cpu"))
        assert bool(module.weight.all())
    beside = AffineConv(weight, weight.new_ones(2), (1, 1), ((0, 0),) * 2, (1, 1))
    to_modules(beside, torch.float16, torch.device("cpu"))  # below the last digit of its bias


def test_a_batch_norm_that_vanishes_in_float16_is_an_error() -> None:
    model = ready(chain(conv(bias=False), nn.BatchNorm2d(4), conv()), torch.float16)
    model[0].weight.data *= 1e-3
    model[1].weight.data.fill_(1e-4)
    for statistic in (model[1].running_mean, model[1].bias.data):
        statistic.zero_()
    with pytest.raises(WeightError, match=r"too small for torch\.float16"):
        rmfx.fold_batch_norm(model, image(dtype=torch.float16))
    rmfx.fold_batch_norm(model.float(), image(dtype=torch.float32))


def test_sums_of_weights_and_batch_norms_on_the_carry_round() -> None:
    def exactness(branch: nn.Module, **options: Any) -> str:
        gm = rmfx.remove_residuals(ready(Residual(branch)), image(), **options)
        (row,) = rmfx.report(gm).rows
        assert row.status == "removed"
        return row.exactness

    assert exactness(conv()) == "rounding"
    normalised = chain(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv())
    assert exactness(normalised) == "bit-exact"
    assert exactness(normalised, fold_batch_norm=False) == "rounding"


# ---- whoever asks for "relu" may quantise -------------------------------------------------------


def wide(act: nn.Module, *, signed: bool = False) -> Any:
    """A block on a value whose range is proven to be thousands of times that of its clamp."""
    stem = chain(conv(), nn.Hardtanh(-9000 * signed, 9000))
    body = chain(conv(4, 8, 1), act, conv(8, 8, groups=8), act, conv(8, 4, 1))
    return ready(chain(stem, Residual(body)))


@pytest.mark.parametrize("signed", [False, True])
def test_relu_takes_two_relu_rather_than_a_large_gain(signed: bool) -> None:
    model = wide(nn.ReLU6(), signed=signed)
    gm = assert_removed(model, image(), activation="relu", strategy="double-relu")
    (row,) = rmfx.report(gm).rows
    assert (row.exactness, row.gain, row.bits) == ("rounding", 1, math.log2(6))
    assert types(gm).count("ReLU") == 4
    assert {*types(gm)} == {"Conv2d", "Hardtanh", "ReLU"}
    assert row.carry == (8 if signed else 4)
    gm = rmfx.remove_residuals(model, image(), activation=("scale", "odd-pair"))
    (row,) = rmfx.report(gm).rows
    assert row.strategy == ("odd-pair" if signed else "scale")
    assert row.gain == 2**11


def test_relu_takes_no_large_gain_unless_a_way_that_multiplies_is_named() -> None:
    # A raised clamp is not two ReLU before a padding.
    model = wide(nn.Hardtanh(-2, 6), signed=True)
    row = rmfx.report(rmfx.remove_residuals(model, image(), activation="relu")).rows[0]
    assert row.status == "refused"
    assert "name 'scale' beside 'relu'" in row.reason
    assert "16 at most, here 8.19e+03" in row.reason
    for beside in ("scale", "odd-pair"):
        gm = assert_removed(model, image(), activation=("relu", beside), strategy="scale")
        assert rmfx.report(gm).rows[0].gain == 2**13
    gm = rmfx.remove_residuals(model, image(), activation=("relu", "masked"))
    assert rmfx.report(gm).rows[0].strategy == "masked"


def test_with_any_gain_allowed_the_simplest_way_comes_first() -> None:
    gm = assert_removed(wide(nn.ReLU6()), image(), activation=("relu", "scale"), strategy="scale")
    assert types(gm).count("ReLU6") == 2


def test_relu_takes_a_simpler_way_of_a_small_gain() -> None:
    stem, body = chain(conv(), nn.Hardtanh(0, 90)), chain(conv(4, 8, 1), nn.ReLU6(), conv(8, 4, 1))
    model = ready(chain(stem, Residual(body)))
    gm = assert_removed(model, image(), activation="relu", strategy="scale")
    assert rmfx.report(gm).rows[0].gain == 16


def test_a_small_gain_comes_before_a_simpler_way() -> None:
    def chosen(act: nn.Module, ways: Any) -> tuple[str, str, bool]:
        model = wide(act, signed=True)
        gm = rmfx.remove_residuals(model, image(), activation=ways, calibration=[image()])
        (row,) = rmfx.report(gm).rows
        assert row.gain is not None
        assert_equivalent(model, gm, image(), tolerance=1e-8)
        return row.strategy, row.exactness, row.gain <= 16

    # A raised clamp is not two ReLU before a padding, and is no odd pair.
    raised = nn.Hardtanh(-2, 6)
    assert chosen(raised, ("scale", "shift")) == ("scale", "normal numbers", False)
    assert chosen(raised, "relu") == ("shift", "calibrated range", True)
    # Two ReLU are right for all values, which a range taken from data is not.
    assert chosen(nn.ReLU6(), ("odd-pair", "shift")) == ("odd-pair", "normal numbers", False)
    assert chosen(nn.ReLU6(), "relu") == ("double-relu", "rounding", True)


def test_without_digits_the_reason_says_so_and_what_would_do() -> None:
    model = silent(nn.LeakyReLU(-0.99), torch.bfloat16)
    gm = rmfx.remove_residuals(model, image(dtype=torch.bfloat16), activation="relu")
    reason = rmfx.report(gm).rows[0].reason
    assert "'per-channel'" in reason
    assert "torch.bfloat16 has no digits for 'odd-pair'" in reason
    assert "wider type" in reason


# ---- a clamp as two ReLU ------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("low", [0.0, -1.0, 0.5])
def test_a_clamp_is_two_relu_at_any_size(low: float, dims: int) -> None:
    body = chain(conv(4, 6, 3, dims=dims), nn.Hardtanh(low, 2.0), conv(6, 4, 1, dims=dims))
    model = ready(Residual(body))
    x = image(2, 4, *(9, 7, 5)[:dims])
    gm = assert_removed(model, x, activation=("odd-pair", "double-relu"), strategy="double-relu")
    assert {*types(gm)} == {f"Conv{dims}d", "ReLU"}
    for size in ((1, 4, *(6, 11, 3)[:dims]), (3, 4, *(1, 1, 1)[:dims])):
        assert_equivalent(model, gm, 3 * image(*size), tolerance=1e-10)


def test_a_raised_clamp_before_a_padding_is_left() -> None:
    def removed(low: float) -> bool:
        model = ready(Residual(chain(conv(), nn.Hardtanh(low, 2.0), conv())))
        gm = rmfx.remove_residuals(model, image(), activation=("odd-pair", "double-relu"))
        assert_equivalent(model, gm, image())
        return rmfx.report(gm).removed == 1

    assert removed(0.0)
    assert not removed(-0.5)  # for a pair its ends differ, and padding would read 0.5


def test_a_clamp_stands_at_four_times_its_size_beside_a_carry() -> None:
    seen = list[Tensor]()
    model = wide(nn.ReLU6(), signed=True)
    for layer in (0, 2):
        model[1].branch[layer].weight.data *= 100  # so that there are values beyond the clamp
    gm = assert_removed(model, image(), activation="relu", strategy="double-relu")
    for act in (m for m in gm.modules() if isinstance(m, nn.ReLU)):
        act.register_forward_hook(lambda _, __, y: seen.append(y[:, :8].detach()))
    gm(image())
    _, first, _, second = (float(y.max()) for y in seen)
    assert (first, second) == (24, 24)


def test_two_relu_have_the_gradient_of_their_clamp() -> None:
    model = wide(nn.ReLU6()).requires_grad_(True)
    gm = rmfx.remove_residuals(model, image(), activation="relu", differentiable=True)
    assert rmfx.report(gm).rows[0].strategy == "double-relu"
    weight = model[1].branch[0].weight
    found, expected = (torch.autograd.grad(m(image()).sum(), weight)[0] for m in (gm, model))
    assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_relu_in_any_type(dtype: torch.dtype) -> None:
    model, x = wide(nn.Hardtanh(0, 2)).to(dtype), image(dtype=dtype)
    gm = rmfx.remove_residuals(model, x, activation="relu")
    assert rmfx.report(gm).rows[0].strategy == "double-relu"
    taps = gm.get_submodule("1.merge_1").weight.unique().tolist()
    assert taps == ([-1, 1] if dtype == torch.float16 else [-4, 1])


def test_a_clamp_that_others_read_keeps_its_size() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.act = conv(), conv(), conv(), nn.ReLU6()

        def forward(self, x: Tensor) -> Tensor:
            y = self.act(self.a(x))
            return (x + self.b(y)) * 2 + self.c(y)

    model = ready(Read())
    gm = rmfx.remove_residuals(model, image(), activation=("odd-pair", "double-relu"))
    assert rmfx.report(gm).rows[0].strategy == "double-relu"
    assert_equivalent(model, gm, 3 * image(1, 4, 6, 11), tolerance=1e-10)


def test_a_clamp_is_left_where_others_read_what_comes_before_it() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = conv(), conv(), conv()
            self.act = nn.ReLU6()

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return (x + self.b(self.act(y))) * 2 + self.c(y)

    model = ready(Read())
    ways = ("identity", "odd-pair", "double-relu")
    gm = rmfx.remove_residuals(model, image(), activation=ways)
    assert_equivalent(model, gm, image(), tolerance=1e-10)
    gm = rmfx.remove_residuals(model, image(), activation=(*ways, "per-channel"))
    assert_equivalent(model, gm, image(), tolerance=1e-10)


def test_what_lies_far_beyond_a_clamp_costs_two_relu_nothing() -> None:
    model = wide(nn.ReLU6()).float()
    with torch.no_grad():
        for layer in (model[1].branch[0], model[1].branch[2]):
            layer.weight.mul_(1e4)
    x = image(dtype=torch.float32)
    gm = assert_removed(model, x, activation="relu", strategy="double-relu")
    assert_equivalent(model, gm, 100 * x, tolerance=1e-5)


def test_a_clamp_with_huge_bounds_is_no_two_relu() -> None:
    model = ready(Residual(nn.Sequential(conv(), nn.Hardtanh(-3e4, 3e4), conv())), torch.float32)
    x = image(2, 4, 8, 8, dtype=torch.float32)
    row = rmfx.report(rmfx.remove_residuals(model, x, activation="relu")).rows[0]
    assert row.strategy != "double-relu"
