"""A table of what layers take: where it is read off, and that pruning can aim at it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import Residual, chain, conv, conv_bn, image, ready
from torch import nn

import rmfx
from rmfx.analysis.channel_labels import Channels
from rmfx.errors import OptionError
from rmfx.frontend import trace
from rmfx.ir.net import Net
from rmfx.pruning.families import Size, Widths
from rmfx.pruning.latency_table import sizes_around
from rmfx.timing import timer


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let a layer take as many seconds as it has weights; returns the layers that were timed."""
    timed: list[Any] = []

    def compare(forms: Any, inputs: Any, *_: Any) -> list[tuple[float, ...]]:
        for form in forms:
            form(*inputs)
        timed.extend(form[0] for form in forms)
        return [(float(form[0].weight.numel()),) * 3 for form in forms]

    monkeypatch.setattr(timer, "compare_speed", compare)
    return timed


def network() -> nn.Module:
    blocks = [Residual(chain(conv_bn(8, 16), nn.ReLU(), conv_bn(16, 8))) for _ in range(2)]
    spread = (conv(8, 12, groups=4), nn.ConvTranspose2d(12, 6, 2, stride=2), conv(6, 6, groups=6))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    return ready(chain(conv_bn(3, 8), nn.ReLU(), *blocks, *spread, *head), torch.float32)


def widths_of(model: nn.Module, x: torch.Tensor) -> Widths:
    net = Net(trace(model, x))
    net.sweep()
    return Widths(net, Channels(net))


def test_sizes_are_read_between_those_that_were_timed(pretend: list[Any]) -> None:
    widths = widths_of(network(), image(1, 3, 8, 8, dtype=torch.float32))
    table = rmfx.LatencyTable("eager")
    layers = [part for part in widths.parts if part.module is not None]
    for part in layers:
        groups = part.carries.numel()
        for share in (1, 0.75, 0.6) if groups == 1 else (1, 0.5):
            ins, outs = round(part.ins.numel() * share), round(part.outs.numel() * share)
            size = Size(ins, outs, max(1, round(groups * share)))
            assert table(part, size) == pytest.approx(part.taps * size.weights)
    count = len(pretend)
    assert table(layers[1], Size(8, 16, 1)) > 0
    assert len(pretend) == count  # what was timed is not timed again
    # Both blocks are alike.
    assert len(table.timings) == len(layers) - 2
    assert table(layers[1], Size(0, 16, 1)) == 0


def test_the_cache_is_for_ever(pretend: list[Any], tmp_path: Path) -> None:
    widths = widths_of(network(), image(1, 3, 8, 8, dtype=torch.float32))
    path = tmp_path / "layers.json"
    everything = torch.ones(len(widths.roots), dtype=torch.bool)
    steps: list[str] = []
    first = rmfx.LatencyTable("eager", cache=path, step=steps.append)
    cost = widths.cost(everything, first)
    assert len(steps) == len(json.loads(path.read_text()))
    count = len(pretend)
    assert widths.cost(everything, rmfx.LatencyTable("eager", cache=path)) == cost
    assert len(pretend) == count
    other = rmfx.LatencyTable("eager", cache=path, threads=7)
    assert widths.cost(everything, other) == cost
    assert len(pretend) == 2 * count


@pytest.mark.parametrize("allocation", ["uniform", "search"])
def test_pruning_aims_at_it(pretend: list[Any], allocation: str) -> None:
    x = image(1, 3, 8, 8, dtype=torch.float32)
    table = rmfx.LatencyTable("eager")
    small, _ = rmfx.prune_channels(
        network(), x, target=0.5, of=table, importance="l2", allocation=allocation
    )
    costs = []
    for model in (network(), small):
        widths = widths_of(model, x)
        costs.append(widths.cost(torch.ones(len(widths.roots), dtype=torch.bool), table))
    assert 0.35 <= costs[1] / costs[0] <= 0.55


def test_a_layer_with_a_carry_is_taken_by_its_weights(pretend: list[Any]) -> None:
    block = Residual(chain(conv(16, 4, 1), nn.ReLU(), conv(4, 4), nn.ReLU(), conv(4, 16, 1)))
    x = image(1, 3, 6, 6, dtype=torch.float32)
    plain = rmfx.remove_residuals(ready(chain(conv(3, 16), block), torch.float32), x)
    widths = widths_of(plain, x)
    (part,) = [part for part in widths.parts if bool(part.carries.any())]
    table = rmfx.LatencyTable("eager")
    assert table(part, Size(20, 20, 5)) == 20 * 4 * 9
    assert table(part, Size(10, 10, 1)) == 10 * 10 * 9


def test_measured_for_real() -> None:
    widths = widths_of(
        ready(chain(conv(3, 4), nn.ReLU()), torch.float32), image(1, 3, 8, 8, dtype=torch.float32)
    )
    table = rmfx.LatencyTable("eager", rounds=1, seconds=0.001, threads=1)
    assert table(widths.parts[0], Size(3, 4, 1)) > 0
    with pytest.raises(rmfx.RmfxError, match="no runtime sundial"):
        rmfx.LatencyTable("sundial")(widths.parts[0], Size(3, 4, 1))


def test_points() -> None:
    assert sizes_around(8, 8) == [(8, 1.0)]
    assert sizes_around(1, 8) == [(2, 1.0)]
    assert sizes_around(7, 8) == [(6, 0.5), (8, 0.5)]
    assert sizes_around(1, 1) == [(1, 1.0)]


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_a_cache_that_holds_no_timings(content: str, tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(OptionError, match="delete it"):
        rmfx.LatencyTable("eager", cache=path)
    with pytest.raises(OptionError, match="there is no folder"):
        rmfx.LatencyTable("eager", cache=tmp_path / "none" / "layers.json")
