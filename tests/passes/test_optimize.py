"""`optimize` returns the fastest form of a network, and says what it measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import Apply, Residual, chain, conv, conv_bn, conv_branch, image, ready, types
from hypothesis import given, settings
from torch import nn

import rmfx
from rmfx.passes import optimize as pipeline
from rmfx.testing import NetworkSpec, assert_equivalent, residual_networks
from rmfx.timing.speed import LatencyError
from rmfx.words import FORMS

Times = dict[str, float]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[[Times], list[int]]:
    """Sets how long each form takes, instead of measuring."""

    def install(times: Times) -> list[int]:
        counts: list[int] = []

        def compare(
            forms: list[Any], inputs: Any, runtime: str, settings: Any, step: Any
        ) -> list[tuple[float, ...]]:
            counts.append(len(forms))
            return [(times[name],) * settings.rounds for name in [*FORMS][: len(forms)]]

        monkeypatch.setattr(pipeline, "compare_speed", compare)
        return counts

    return install


def network() -> Any:
    """A linear branch, a residual block and a pair of layers that merges."""
    first = Residual(conv_bn(), conv_bn(kernel=1))
    return ready(chain(first, nn.ReLU(), Residual(conv_branch()), nn.ReLU(), conv(4, 8, 1)))


def statuses(gm: Any) -> list[str]:
    return [row.status for row in rmfx.report(gm).rows]


@pytest.mark.parametrize("best", FORMS)
def test_the_fastest_form_is_returned(best: str, pretend: Any) -> None:
    pretend({name: 0.5 if name == best else 1.0 for name in FORMS})
    model = network()
    fast = rmfx.optimize(model, image(), policy="all")
    expected = {"folded": 2, "merged": 1, "converted": 0}
    told = [f"{int(best == 'converted')} of 1 residual connections removed"]
    told += [f"{int(best != 'folded')} of 1 sums of parallel branches merged"]
    report = rmfx.report(fast)
    assert report.adds_left == expected[best]
    assert [timing.form for timing in report.timings if timing.chosen] == [best]
    assert f"  {FORMS[best]}: " in str(report)
    assert ", ".join(told) in str(report)
    assert "BatchNorm2d" not in types(fast)
    for row in report.rows:
        assert row.status == "removed" or "would not pay" in row.reason
    if best != "folded":
        assert_equivalent(model, fast, image())
    torch.testing.assert_close(fast(image()), model(image()))


def test_what_is_not_faster_is_not_returned(pretend: Any) -> None:
    pretend({"folded": 1.0, "merged": 1.01, "converted": 1.02})
    fast = rmfx.optimize(network(), image(), policy="all")
    assert statuses(fast) == ["kept", "kept"]
    report = rmfx.report(fast)
    told = "it would not pay, measured: time in inductor times 1.02 (1.02 to 1.02)"
    assert [row.reason for row in report.rows] == [told] * 2
    assert str(report).splitlines()[-3:] == [
        "  batch norm folded: 1, returned",
        "  parallel branches merged: 1.01 (1.01 to 1.01)",
        "  residual connections removed: 1.02 (1.02 to 1.02)",
    ]


def test_what_is_faster_is_told_beside_what_is_faster_still(pretend: Any) -> None:
    pretend({"folded": 1.0, "merged": 0.5, "converted": 0.7})
    report = rmfx.report(rmfx.optimize(network(), image(), policy="all"))
    reason = report.rows[1].reason
    assert reason.endswith("times 0.70 (0.70 to 0.70); without it, times 0.50 (0.50 to 0.50)")


def test_a_difference_within_the_noise_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(forms: Any, inputs: Any, runtime: str, settings: Any, step: Any) -> list[Any]:
        even = (0.9, 1.1, 0.9, 0.98, 1.05, 0.9, 1.1, 0.9) * (settings.rounds // 8)
        return [(1.0,) * len(even), even, (2.0,) * len(even)]

    monkeypatch.setattr(pipeline, "compare_speed", compare)
    report = rmfx.report(rmfx.optimize(network(), image(), policy="all", rounds=8))
    folded, merged, converted = report.timings
    assert "merged: 0.94 (0.90 to 1.06), not beyond the noise" in str(report)
    assert (folded.chosen, merged.beyond_noise, converted.beyond_noise) == (True, False, True)
    assert report.to_dict()["timings"][1]["beyond_noise"] is False


@pytest.mark.parametrize(
    ("slow_rounds", "slow_later", "measured", "best"),
    [(1, 0, 1, "merged"), (5, 20, 2, "folded"), (5, 8, 2, "merged"), (8, 0, 1, "folded")],
)
def test_noise_is_not_taken_for_speed(
    slow_rounds: int,
    slow_later: int,
    measured: int,
    best: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow = [slow_later, slow_rounds]

    def compare(forms: Any, inputs: Any, runtime: str, settings: Any, step: Any) -> list[Any]:
        count, n = settings.rounds, slow.pop()
        return [(1.0,) * count, (1.1,) * n + (0.9,) * (count - n)]

    monkeypatch.setattr(pipeline, "compare_speed", compare)
    fast = rmfx.optimize(network(), image(), rounds=15)
    (chosen,) = [timing for timing in rmfx.report(fast).timings if timing.chosen]
    assert (chosen.form, 2 - len(slow)) == (best, measured)


def test_equal_forms_are_measured_once(pretend: Any) -> None:
    counts = pretend({"folded": 1.0, "merged": 0.5, "converted": 0.5})
    rmfx.optimize(network(), image())  # a carry would cost more than it saves
    assert counts == [2]


def test_where_nothing_can_be_done_nothing_is_measured(pretend: Any) -> None:
    counts = pretend({})
    fast = rmfx.optimize(ready(chain(conv_bn(), nn.ReLU(), conv_bn())), image())
    assert counts == []
    assert types(fast) == ["Conv2d", "ReLU", "Conv2d"]
    only_residual = ready(Residual(conv_branch()))
    (row,) = rmfx.report(rmfx.optimize(only_residual, image())).rows
    assert (row.status, counts) == ("kept", [])
    assert "multiply-adds" in row.reason


def test_the_reasons_for_what_cannot_go_are_kept(pretend: Any) -> None:
    pretend({"folded": 1.0, "merged": 0.5, "converted": 0.7})
    blocked = Residual(chain(conv(), nn.GroupNorm(2, 4), conv()))
    fast = rmfx.optimize(ready(chain(Residual(conv()), blocked)), image(), policy="all")
    first, second = rmfx.report(fast).rows
    assert (first.status, second.status) == ("removed", "refused")
    assert "GroupNorm" in second.reason


def test_measured_for_real() -> None:
    branches = {name: conv_bn(16, 16) for name in "abcdefgh"}
    model = ready(
        Apply(lambda m, x: sum(getattr(m, name)(x) for name in "abcdefgh"), **branches),
        torch.float32,
    )
    x = image(1, 16, 32, 32, dtype=torch.float32)
    steps: list[str] = []
    fast = rmfx.optimize(
        model, x, runtime="eager", rounds=3, seconds=0.01, threads=1, step=steps.append
    )
    folded, merged = rmfx.report(fast).timings
    assert (folded.ratio, merged.form) == (1.0, "merged")
    assert len(types(fast)) == (1 if merged.chosen else 8)  # whichever this machine found faster
    assert rmfx.report(fast).to_dict()["timings"][1]["form"] == "merged"
    assert any("eager" in text for text in steps)


def test_bad_arguments() -> None:
    model = network()
    with pytest.raises(rmfx.RmfxError, match="example inputs"):
        rmfx.optimize(model, None)
    with pytest.raises(rmfx.RmfxError, match="at least one"):
        rmfx.optimize(model, ())
    with pytest.raises(rmfx.RmfxError, match="policy"):
        rmfx.optimize(model, image(), policy="best")
    with pytest.raises(LatencyError, match="no runtime abacus"):
        rmfx.optimize(model, image(), runtime="abacus")
    with pytest.raises(LatencyError, match="no runtime abacus"):  # also where nothing is measured
        rmfx.optimize(nn.Conv2d(4, 4, 1).double().eval(), image(), runtime="abacus")


@pytest.mark.slow
@settings(deadline=None)
@given(residual_networks())
def test_every_form_of_a_random_network_keeps_its_values(spec: NetworkSpec) -> None:
    model, inputs = spec.build(), spec.inputs()
    forms, rows = pipeline.forms_of(rmfx.trace(model, inputs), "all", lambda text: None)
    for name, form in forms.items():
        assert_equivalent(model, form, inputs)
        assert [row.join for row in rmfx.report(form).rows] == [row.join for row in rows], name
