"""How a carry passes activations: every strategy by its law, and which of them is chosen."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import (
    Apply,
    Residual,
    assert_removed,
    basic_branch,
    chain,
    conv,
    conv_bn,
    image,
    ready,
    types,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rmfx
from rmfx.algebra.activation import Activation
from rmfx.analysis.ranges import Ranges
from rmfx.choices import STRATEGIES
from rmfx.errors import Refusal, RmfxError
from rmfx.ir.net import Net
from rmfx.removal.assembly import Plan
from rmfx.removal.codes import scale_into, shift_into
from rmfx.removal.columns import Pointwise
from rmfx.removal.plan import plans
from rmfx.removal.site import find_sites
from rmfx.removal.strategy import AUTO, Settled, settle
from rmfx.removal.target import BY_NAME, Target
from rmfx.testing import assert_equivalent

ENDS = st.floats(-1e4, 1e4, width=32)


class Stub(Ranges):
    """Ranges that prove everything, or nothing."""

    def __init__(self, *, proven: bool) -> None:
        self.proven = proven
        self.weights_vary = self.of_known_inputs = self.on_data = False

    def fixed_by(self, node: Any, activation: Activation) -> bool:
        return self.proven


def plan_of(forward: Any, **parts: Any) -> Plan:
    net = Net(rmfx.trace(ready(Apply(forward, **parts)), image()))
    join = [n for n in net.graph.nodes if n.target in (torch.add, torch.sub)][-1]
    sites = find_sites(net, join, keep_norms=False)
    assert isinstance(sites, list), sites
    found = plans(sites[0])
    assert not isinstance(found, Refusal), found
    return found[0]


def settled(plan: Plan, *, proven: bool) -> list[Pointwise]:
    done = settle(plan, Stub(proven=proven), ("identity", "per-channel", "masked"))
    assert isinstance(done, Settled), done
    return [c for c in done.plan.columns if isinstance(c, Pointwise)]


def clamped(act: nn.Module, *, stem: nn.Module | None = None) -> nn.Module:
    """A stem whose output is bounded, and a block with this activation on it."""
    body = chain(conv(4, 8, 1), act, conv(8, 8, groups=8), act, conv(8, 4, 1))
    stem = chain(conv(), nn.ReLU6(), conv(4, 4, 1)) if stem is None else stem
    return ready(chain(stem, Residual(body), conv(4, 4, 1)))


@pytest.mark.parametrize("act", [F.relu6, F.relu, F.silu])
@pytest.mark.parametrize("rate", [0.0, 1e-3, 1e3])
def test_what_uneven_activations_cost_decides_between_ways(
    act: Any, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target(beyond={"slopes": rate, "bounds": rate, "masks": rate})
    monkeypatch.setitem(BY_NAME, "onnxruntime", target)
    model = ready(Apply(lambda m, x: x + m.b(act(m.a(x))), a=conv(), b=conv()))
    converted = assert_removed(model, image(), minimise="onnxruntime", input_range=(-8, 8))
    (row,) = rmfx.report(converted).rows
    plain = "masked" if act is F.silu else "per-channel"
    assert row.strategy == (plain if rate < 1 else "odd-pair")


def test_a_named_runtime_leaves_the_ways_that_were_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(BY_NAME, "openvino", Target(beyond={"slopes": 1e3}))
    model = ready(Apply(lambda m, x: x + m.b(F.relu(m.a(x))), a=conv(), b=conv()))
    options = {"minimise": "openvino", "activation": "per-channel"}
    assert_removed(model, image(), strategy="per-channel", **options)


def test_onnx_runtime_gets_bounds_where_it_would_be_slow_with_slopes() -> None:
    """A bottleneck, in which odd pairs would cost more."""
    branch = chain(conv(48, 12, 1), nn.ReLU(), conv(12, 12), nn.ReLU(), conv(12, 48, 1))
    model = ready(chain(conv(48, 48), Residual(branch)))
    x = image(2, 48, 9, 7)
    names = {how: types(assert_removed(model, x, minimise=how)) for how in ("time", "onnxruntime")}
    assert names["time"].count("PReLU") == names["onnxruntime"].count("ChannelClamp") == 2
    assert "ChannelClamp" not in names["time"]
    assert "PReLU" not in names["onnxruntime"]


# ---- the laws -----------------------------------------------------------------------------------


@given(st.lists(st.tuples(ENDS, ENDS), min_size=1, max_size=4), st.tuples(ENDS, ENDS))
def test_a_scale_maps_into_the_interval_by_powers_of_two(
    ranges: list[tuple[float, float]], interval: tuple[float, float]
) -> None:
    low, high = (
        torch.tensor(e, dtype=torch.float64) for e in zip(*map(sorted, ranges), strict=True)
    )
    begin, end = sorted(interval)
    scale = scale_into(low, high, begin, end)
    if scale is None:
        return
    assert bool((scale * low >= begin).all() and (scale * high <= end).all())
    assert bool((torch.frexp(scale).mantissa == 0.5).all() and (scale <= 1).all())


@pytest.mark.parametrize("interval", [(-1.0, 1.0), (0.0, 6.0), (-2.0, math.inf)])
def test_a_scale_is_found_wherever_there_is_one(interval: tuple[float, float]) -> None:
    low = torch.tensor([0.0 if interval[0] == 0 else -100.0])
    assert scale_into(low, torch.tensor([1e6]), *interval) is not None
    assert scale_into(low, torch.tensor([math.inf]), 0.0, 6.0) is None


@given(
    st.lists(st.tuples(ENDS, ENDS), min_size=1, max_size=4), st.sampled_from([6.0, 1.0, math.inf])
)
def test_a_shift_maps_into_the_interval_and_is_exact_itself(
    ranges: list[tuple[float, float]], end: float
) -> None:
    low, high = (
        torch.tensor(e, dtype=torch.float64) for e in zip(*map(sorted, ranges), strict=True)
    )
    found = shift_into(low, high, 0.0, end)
    assert found is not None
    scale, shift = found
    assert bool((scale * low + shift >= 0).all() and (scale * high + shift <= end).all())
    assert torch.equal(shift.to(torch.float32).double(), shift)


def test_a_range_without_end_cannot_be_shifted() -> None:
    low, endless = torch.tensor([-1.0]), torch.tensor([math.inf])
    assert shift_into(low, endless, 0.0, 6.0) is None
    assert shift_into(-endless, low, 0.0, math.inf) is None
    assert shift_into(low, endless, 0.0, math.inf) is not None


# ---- each strategy in a network -----------------------------------------------------------------


SHIFT = ("identity", "scale", "shift")


@pytest.mark.parametrize("act", [nn.ReLU6(), nn.Hardtanh(-1, 1), nn.Hardtanh(0.5, 2)], ids=str)
def test_a_proven_range_is_shifted_into_a_clamp(act: nn.Module) -> None:
    gm = assert_removed(
        clamped(act), image(), activation=SHIFT, calibration=[image()], without_inputs=False
    )
    assert {"ChannelClamp", "PReLU", "MaskedActivation"}.isdisjoint(types(gm))
    (row,) = rmfx.report(gm).rows
    expected = ("scale", "normal numbers") if act.min_val == -1 else ("shift", "rounding")
    assert (row.strategy, row.exactness) == expected


def test_without_data_nothing_is_shifted() -> None:
    gm = rmfx.remove_residuals(clamped(nn.ReLU6()), image(), activation=SHIFT)
    assert "'per-channel'" in rmfx.report(gm).rows[0].reason


def signed_stream(depth: int = 6) -> nn.Module:
    """Blocks whose stream is never rectified: bounds proven from weights grow with each."""
    blocks = [Residual(chain(nn.ReLU(), conv(), nn.BatchNorm2d(4), nn.ReLU(), conv()))]
    blocks += [Residual(chain(nn.ReLU(), conv(), nn.ReLU(), conv())) for _ in range(depth - 1)]
    return ready(chain(conv(), *blocks))


def test_where_a_proven_range_is_too_wide_that_of_the_data_is_used() -> None:
    model, x = signed_stream().float(), image(dtype=torch.float32).clamp(-3, 3)
    options: dict[str, Any] = {"activation": SHIFT, "input_range": (-3, 3), "calibration": [x]}
    gm = rmfx.remove_residuals(model, x, **options)
    rows = rmfx.report(gm).rows
    assert {row.strategy for row in rows} == {"shift"}
    assert "calibrated range" in {row.exactness for row in rows}
    assert "PReLU" not in types(gm)
    assert_equivalent(model, gm, x, tolerance=2e-5)


def test_the_range_of_the_data_is_not_that_of_a_conv_before_its_batch_norm() -> None:
    x = image(2, 12, 9, 7)  # the shortcut is narrower, so it is the one to carry
    model = ready(Residual(chain(conv(12), nn.ReLU(), conv()), conv_bn(12, kernel=1)))
    norm: Any = model.shortcut[1]
    norm.running_mean.fill_(5.0)
    norm.weight.data.fill_(3.0)
    gm = rmfx.remove_residuals(model, x, activation="shift", calibration=[x])
    assert [row.strategy for row in rmfx.report(gm).rows] == ["shift"]
    assert_equivalent(model, gm, x, tolerance=1e-8)


def test_outside_the_range_of_the_data_the_result_is_wrong() -> None:
    model, x = signed_stream(1), image()
    gm = rmfx.remove_residuals(model, x, activation=SHIFT, calibration=[x])
    assert rmfx.report(gm).rows[0].exactness == "calibrated range"
    assert_equivalent(model, gm, 1.5 * x)
    assert not torch.allclose(gm(100 * x), model(100 * x))


def test_pure_relu_without_data_is_exact() -> None:
    model, x = signed_stream().float(), image(dtype=torch.float32)
    gm = rmfx.remove_residuals(model, x, activation={"relu"}, input_range=(-9, 9))
    assert {row.exactness for row in rmfx.report(gm).rows} == {"bit-exact"}
    assert {*types(gm)} == {"Conv2d", "ReLU"}
    assert_equivalent(model, gm, x, tolerance=1e-5)


def test_auto_scales_what_is_positive_and_bounded() -> None:
    stem = chain(conv(), nn.Hardtanh(0, 50))
    gm = assert_removed(clamped(nn.ReLU6(), stem=stem), image(), strategy="scale")
    assert types(gm).count("ReLU6") == 2


def test_auto_never_pays_with_rounding_or_channels() -> None:
    assert_removed(clamped(nn.ReLU6()), image(), strategy="per-channel")
    assert {*AUTO} == {*STRATEGIES} - {"shift", "odd-pair", "double-relu"}


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize(
    "act",
    [
        nn.ReLU(),
        nn.LeakyReLU(0.2),
        nn.PReLU(),
        nn.GELU(),
        nn.GELU("tanh"),
        nn.SiLU(),
        nn.Hardswish(),
    ],
    ids=str,
)
def test_an_odd_pair_passes_any_carry(act: nn.Module, depthwise: bool) -> None:
    middle = conv(8, 8, groups=8 if depthwise else 1)
    body = chain(conv(4, 8, 1), act, middle, act, conv(8, 4, 1))
    gm = assert_removed(ready(Residual(body)), image(), strategy="odd-pair", activation="odd-pair")
    assert {type(act).__name__} == {*types(gm)} - {"Conv2d"}
    exact = rmfx.report(gm).rows[0].exactness == "bit-exact"
    assert exact == isinstance(act, nn.ReLU)
    middle = next(m for m in gm.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3))
    # ReLU's pair passes a depthwise layer as it is; the others have to be put together there.
    assert (middle.groups == 16) == (depthwise and isinstance(act, nn.ReLU))


def test_a_pair_passes_a_clamp_bit_for_bit() -> None:
    gm = assert_removed(
        clamped(nn.ReLU6()),
        image(),
        strategy="odd-pair",
        activation="odd-pair",
        without_inputs=False,
    )
    assert rmfx.report(gm).rows[0].exactness == "bit-exact"
    assert rmfx.report(gm).rows[0].carry == 8


def test_a_pair_split_by_relu_passes_what_leaves_positive_values_alone() -> None:
    body = chain(conv(), nn.ReLU(), conv(), nn.LeakyReLU(0.3), conv(), nn.SiLU(), conv())
    assert_removed(ready(Residual(body)), image(), strategy="odd-pair", activation="odd-pair")


def test_a_pair_does_not_pass_two_activations_in_a_row() -> None:
    twice = chain(conv(), conv(), nn.SiLU(), nn.SiLU(), conv())
    gm = rmfx.remove_residuals(ready(Residual(twice)), image(), activation="odd-pair")
    assert "'masked'" in rmfx.report(gm).rows[0].reason
    split = chain(conv(), conv(), nn.ReLU(), nn.LeakyReLU(0.1), conv())
    assert_removed(ready(Residual(split)), image(), strategy="odd-pair", activation="odd-pair")


def test_a_shortcut_with_a_layer_of_its_own_is_coded_before_and_behind_it() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.hardtanh(m.stem(x), -2, 3)
        return m.s(y) + m.c(F.relu6(m.b(F.relu6(m.a(y)))))

    parts = {"stem": conv(), "a": conv(4, 6), "b": conv(6, 6, stride=2), "c": conv(6, 3)}
    for s in (conv(4, 3, 1, stride=2), conv(4, 3, 3, stride=2)):
        model = ready(Apply(forward, s=s, **parts))
        for way in ("relu", ("scale", "shift"), "odd-pair"):
            options: dict[str, Any] = {"activation": way, "calibration": [image()]}
            gm = assert_removed(model, image(), without_inputs=False, **options)
            assert "ChannelClamp" not in types(gm)


def test_an_input_range_lets_a_carry_through_relu() -> None:
    model = ready(Residual(basic_branch()))
    x = image().clamp(-3, 3)
    gm = assert_removed(
        model, x, activation=SHIFT, input_range=(-3, 3), calibration=[x], strategy="shift"
    )
    assert "PReLU" not in types(gm)
    assert rmfx.report(gm).rows[0].exactness == "rounding"


def test_relu_stands_for_what_adds_no_other_activation() -> None:
    model = ready(chain(Residual(basic_branch()), Residual(basic_branch(act=nn.SiLU()))))
    gm = assert_removed(model, image(), sites=2, activation="relu")
    assert {*types(gm)} == {"Conv2d", "ReLU", "SiLU"}
    gm = rmfx.remove_residuals(ready(Residual(basic_branch(act=nn.Tanh()))), activation="relu")
    assert "'masked'" in rmfx.report(gm).rows[0].reason


def test_an_unknown_strategy_is_named() -> None:
    with pytest.raises(RmfxError, match=r"'mask'.*odd-pair"):
        rmfx.remove_residuals(ready(Residual(basic_branch())), activation="mask")


def test_a_batch_norm_that_stays_meets_no_code() -> None:
    model = ready(Residual(basic_branch()))
    kept = rmfx.remove_residuals(model, image(), fold_batch_norm=False, activation="odd-pair")
    assert "'per-channel'" in rmfx.report(kept).rows[0].reason


def test_hardswish_rounds_where_it_is_the_identity() -> None:
    stem = chain(conv(), nn.Hardtanh(4, 9))
    gm = assert_removed(clamped(nn.Hardswish(), stem=stem), image(), strategy="identity")
    assert rmfx.report(gm).rows[0].exactness == "rounding"


# ---- which columns an activation acts on --------------------------------------------------------


def test_an_activation_that_fixes_the_carry_acts_on_everything() -> None:
    plan = plan_of(lambda m, x: x + m.b(F.relu(m.a(x))), a=conv(), b=conv())
    (before,) = (c for c in plan.columns if isinstance(c, Pointwise))
    assert before.carry is None
    assert before.carried is not None
    assert before.carried.name == "x"
    (after,) = settled(plan, proven=True)
    assert after.carry is after.main
    (same,) = settled(plan, proven=False)
    assert same.carry is None


@pytest.mark.parametrize("threshold", [0.5, -20.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_carry_comes_near_the_jump_of_a_threshold(threshold: float, dtype: torch.dtype) -> None:
    # The clamp gives its lowest value often; shifted to the threshold, rounding decides.
    block = Residual(nn.Threshold(threshold, -1.0))
    for low in (-1.0, threshold, threshold + 1e-12):
        model = ready(chain(conv(), nn.Hardtanh(low, low + 3), block, conv(4, 4, 1)), dtype)
        x = image(dtype=dtype)
        for ways in ("relu", "auto"):
            gm = rmfx.remove_residuals(model, x, activation=ways, calibration=[x])
            tolerance = 1e-8 if dtype == torch.float64 else 1e-4
            assert_equivalent(model, gm, x, tolerance=tolerance)


def test_slopes_per_channel_never_act_on_the_carry() -> None:
    plan = plan_of(lambda m, x: x + m.b(m.p(m.a(x))), a=conv(), b=conv(), p=nn.PReLU(4))
    (column,) = settled(plan, proven=True)
    assert column.carry is None


def test_a_carried_value_that_no_node_holds_is_not_asked_about() -> None:
    parts = {"a": conv(4, 9), "b": conv(9, 2), "s": conv(4, 2, 1)}
    plan = plan_of(lambda m, x: m.b(F.relu(m.a(x))) - m.s(x), **parts)
    assert [c.carried for c in plan.columns if isinstance(c, Pointwise)] == [None]
    assert all(c.carry is None for c in settled(plan, proven=True))


REMEDIES: dict[str, tuple[Any, str, str, bool]] = {
    "a range": (nn.ReLU6, "identity", r"pass an input_range=\(low, high\)", True),
    "a range for a scale": (nn.ReLU6, "scale", r"pass an input_range=\(low, high\)", True),
    "data": (nn.ReLU6, "shift", r"pass calibration=\[batch, ...\], which a shift needs", True),
    "nothing else": (nn.Softplus, "identity", "'masked', which .* excludes; allow it$", False),
}


@pytest.mark.parametrize("name", REMEDIES)
def test_a_refusal_names_what_would_help(name: str) -> None:
    act, way, remedy, helps = REMEDIES[name]
    model = ready(Residual(chain(conv(), act(), conv())))
    x = image().abs().clamp(max=1)
    (row,) = rmfx.report(rmfx.remove_residuals(model, x, activation=way)).rows
    assert re.search(remedy, row.reason)
    known: dict[str, Any] = {"input_range": (0, 1), "calibration": [x]}
    assert rmfx.report(rmfx.remove_residuals(model, x, activation=way, **known)).removed == helps
