"""A policy that times each site."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, Residual, chain, conv, conv_bn, conv_branch, image, ready, types

import rmfx
import rmfx.latency
from rmfx.ir.net import Net
from rmfx.removal import measured
from rmfx.removal.cut_out import cut_out
from rmfx.removal.measured import MeasuredPolicy
from rmfx.removal.site import find_sites
from rmfx.testing import assert_equivalent
from rmfx.timing import timer
from rmfx.timing.speed import LatencyError
from rmfx.timing.timer import Timer


def quick(**options: Any) -> MeasuredPolicy:
    return MeasuredPolicy("eager", threads=1, rounds=3, seconds=0.005, **options)


def wide(channels: int = 48) -> Any:
    """A sum of eight branches, and a residual block that a carry makes three times dearer."""
    branches = {name: conv_bn(channels, channels) for name in "abcdefgh"}
    merges = Apply(lambda m, x: sum(getattr(m, name)(x) for name in "abcdefgh"), **branches)
    return ready(chain(merges, Residual(conv_branch(channels=channels))), torch.float32)


@pytest.fixture
def by_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a form take as long as it has multiply-adds; real times would differ from run to run."""

    def compare(forms: list[Any], inputs: Any, *rest: Any) -> list[tuple[float, ...]]:
        return [(float(rmfx.cost.count(form, inputs).macs),) * 3 for form in forms]

    monkeypatch.setattr(timer, "compare_speed", compare)


def test_a_site_is_timed_for_real() -> None:
    policy = quick()
    gm = rmfx.remove_residuals(wide(8), image(1, 8, 8, 8, dtype=torch.float32), policy=policy)
    assert {row.status for row in rmfx.report(gm).rows} <= {"removed", "kept"}
    assert all(0 < low <= median <= high for median, low, high in policy.timings.values())


@pytest.mark.usefixtures("by_work")
def test_sites_that_become_faster_are_rewritten() -> None:
    model, x = wide(), image(1, 48, 24, 24, dtype=torch.float32)
    steps: list[str] = []
    gm = rmfx.remove_residuals(model, x, policy=quick(step=steps.append))
    report = rmfx.report(gm)
    assert [row.status for row in report.rows] == ["removed"] * 7 + ["kept"]
    assert "measured alone" in report.rows[-1].reason
    assert types(gm)[0] == "Conv2d"
    assert len(types(gm)) == 4
    assert "in eager" in steps[0]
    torch.testing.assert_close(gm(x), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("by_work")
def test_timings_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "timings.json"
    model, x = wide(8), image(1, 8, 8, 8, dtype=torch.float32)
    first = quick(cache=path)
    before = rmfx.remove_residuals(model, x, policy=first)
    assert json.loads(path.read_text()) == {k: list(v) for k, v in first.timings.items()}
    assert len(first.timings) < 8 == len(rmfx.report(before).rows)  # those alike once

    def fail(*arguments: object) -> None:
        raise AssertionError("it was measured again")

    monkeypatch.setattr(Timer, "times", fail)
    after = rmfx.remove_residuals(model, x, policy=quick(cache=path))
    assert rmfx.report(after) == rmfx.report(before)


def test_without_shapes_nothing_is_measured() -> None:
    (row,) = rmfx.report(rmfx.remove_residuals(ready(Residual(conv())), policy=quick())).rows
    assert row.status == "kept"
    assert "pass example_inputs" in row.reason


def test_a_site_is_cut_out_as_it_stands() -> None:
    def forward(m: Any, x: Any) -> Any:
        y = F.relu(m.a(x)) * torch.sigmoid(m.g(x.mean((2, 3), keepdim=True)))
        return m.s(x) + m.b(y) * 0.5

    model = ready(Apply(forward, a=conv(), b=conv(), g=conv(kernel=1), s=conv(kernel=1)))
    net = Net(rmfx.trace(model, image()))
    join = next(n for n in net.graph.nodes if n.name == "add")
    sites = find_sites(net, join, keep_norms=False)
    assert isinstance(sites, list)
    found = cut_out(net, sites[0])
    assert found is not None
    gm, inputs = found
    assert [tuple(x.shape) for x in inputs] == [(2, 4, 9, 7), (2, 4, 1, 1)]
    assert gm(*inputs).shape == (2, 4, 9, 7)
    assert_equivalent(gm, rmfx.remove_residuals(gm, inputs), inputs)


def test_bad_runtimes_and_passes_are_named() -> None:
    model, x = wide(4), image(1, 4, 8, 8, dtype=torch.float32)
    with pytest.raises(LatencyError, match="no runtime abacus"):
        MeasuredPolicy("abacus")
    with pytest.raises(LatencyError, match="at least 1"):
        MeasuredPolicy("eager", rounds=0)
    with pytest.raises(rmfx.RmfxError, match="merge_convs"):
        rmfx.merge_convs(model, x, policy=measured.MeasuredPolicy())
