"""Additions that are no residual connections, and those that only look like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, Residual, assert_refused, chain, conv, conv_branch, image, ready
from torch import Tensor, nn

import rmfx
from rmfx.testing import assert_equivalent

Forward = Callable[..., Any]


class OfTwo(nn.Module):
    """A function of two inputs."""

    def __init__(self, function: Forward) -> None:
        super().__init__()
        self.function = function
        self.c, self.l = conv(), nn.Linear(3, 4)

    def forward(self, x: Tensor, z: Tensor) -> Any:
        return self.function(self, x, z)


BIASES: dict[str, Forward] = {
    "index": lambda m, x, z: m.c(x) + m.l(z)[:, :, None, None],
    "view": lambda m, x, z: m.c(x) + m.l(z).view(-1, 4, 1, 1),
    "unsqueeze": lambda m, x, z: torch.relu(m.c(x)) - m.l(z).unsqueeze(-1).unsqueeze(-1),
}


@pytest.mark.parametrize("forward", BIASES.values(), ids=[*BIASES])
@pytest.mark.parametrize("example", [True, False])
def test_a_bias_for_each_sample_is_none(forward: Forward, example: bool) -> None:
    model = ready(OfTwo(forward))
    inputs = (image(), torch.randn(2, 3, dtype=torch.float64))
    converted = rmfx.remove_residuals(model, inputs if example else None, strict=True)
    report = rmfx.report(converted)
    assert (report.other, report.refused, report.removed, report.adds_left) == (1, 0, 0, 1)
    assert "different inputs, x and z" in report.rows[0].reason
    assert report.to_dict()["other"] == 1
    assert "0 of 0 residual connections removed; 1 other additions" in str(report)
    assert_equivalent(model, converted, inputs)


POSITIONS: dict[str, Forward] = {
    "arange": lambda y: torch.arange(y.shape[3], dtype=y.dtype).expand(4, y.shape[2], -1),
    "cast": lambda y: torch.arange(y.shape[3], dtype=torch.float32)[None].to(y.dtype),
    "to": lambda y: torch.linspace(0, 1, y.shape[3]).expand(y.shape).type_as(y),
    "zeros": lambda y: torch.zeros_like(y).cumsum(3),
}


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=[*POSITIONS])
def test_an_embedding_of_positions_is_none(positions: Forward) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.block(x)
        return F.relu(y + positions(y))

    model = ready(Apply(forward, block=Residual(conv_branch())))
    report = rmfx.report(rmfx.remove_residuals(model, image(2, 4, 8, 8)))
    assert (report.removed, report.other, report.refused) == (1, 1, 0), str(report)
    assert "on sizes at most" in report.rows[1].reason


def pyramid(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    deeper = F.relu(m.down(x))
    return m.lateral(x) + m.up(deeper)  # type: ignore[no-any-return]


def test_an_enlarged_deeper_map_is_none() -> None:
    up = nn.Upsample(scale_factor=2, mode="bilinear")
    layers = {"stem": conv(), "down": conv(stride=2), "lateral": conv(kernel=1), "up": up}
    report = rmfx.report(rmfx.remove_residuals(ready(Apply(pyramid, **layers)), image(2, 4, 8, 8)))
    assert (report.other, report.refused) == (1, 0), str(report)
    assert "resizes by interpolation" in report.rows[0].reason


def test_an_enlarged_shortcut_is_one_that_is_refused() -> None:
    up = nn.Upsample(scale_factor=2, mode="bilinear")
    branch = chain(conv(4, 16), nn.PixelShuffle(2))
    model = ready(Residual(branch, up))
    assert_refused(model, image(2, 4, 8, 8), reason="")


class Selective(nn.Module):
    """Two branches, of which a gate computed of their sum chooses, and a convolution of the sum."""

    def __init__(self, gate: Forward, *, also: bool = False) -> None:
        super().__init__()
        self.a = chain(conv(8, 8, groups=2), nn.ReLU())
        self.b = chain(conv(8, 8, groups=2), nn.ReLU())
        self.fc, self.gate, self.also = conv(8, 16, kernel=1), gate, also

    def forward(self, x: Tensor) -> Any:
        a, b = self.a(x), self.b(x)
        total = a + b
        w = self.gate(self.fc(total.mean((2, 3), keepdim=True)))
        y = torch.cat([a, b], 1) * w
        return (y, total.sum()) if self.also else y


GATES: dict[str, Forward] = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda s: s.view(-1, 2, 8, 1, 1).softmax(1).flatten(1, 2),
    "norm": lambda s: s / s.norm(dim=1, keepdim=True),
}


@pytest.mark.parametrize("gate", GATES.values(), ids=[*GATES])
def test_what_a_gate_is_computed_of_is_not_opened(gate: Forward) -> None:
    model = ready(Selective(gate))
    x = image(2, 8, 6, 6)
    converted = rmfx.remove_residuals(model, x)
    report = rmfx.report(converted)
    assert (report.other, report.refused, report.removed) == (1, 0, 0), str(report)
    assert "for a gate" in report.rows[0].reason
    assert rmfx.cost.count(converted, x).macs == rmfx.cost.count(model, x).macs
    assert_equivalent(model, converted, (x,))


def test_what_is_given_out_as_well_is_opened() -> None:
    model = ready(Selective(torch.sigmoid, also=True))
    report = rmfx.report(rmfx.remove_residuals(model, image(2, 8, 6, 6)))
    assert (report.removed, report.other) == (1, 0), str(report)


def test_a_residual_connection_inside_of_a_gate_is_removed() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        return x * torch.sigmoid(m.block(F.relu(x).mean((2, 3), keepdim=True)))

    model = ready(Apply(forward, block=Residual(conv_branch())))
    report = rmfx.report(rmfx.remove_residuals(model, image()))
    assert (report.removed, report.other) == (1, 0), str(report)


def test_an_addition_of_sizes_that_are_open_is_not_told_to_broadcast() -> None:
    """A gate between rearrangements, of which a program with open sizes knows no size."""

    def gated(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).permute(0, 2, 3, 1)
        gate = torch.sigmoid(m.l(y.mean((1, 2), keepdim=True)))
        return x + (y * gate).permute(0, 3, 1, 2)

    model, x = ready(Apply(gated, a=conv(), l=nn.Linear(4, 4))), image()
    sizes = (dict.fromkeys(range(4), torch.export.Dim.AUTO),)
    program = torch.export.export(model, (x,), dynamic_shapes=sizes, strict=False)
    (row,) = rmfx.report(rmfx.remove_residuals(program, (x,))).rows
    assert row.status in ("removed", "refused")
    assert "broadcast" not in (row.reason or "")
