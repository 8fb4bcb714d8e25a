"""Reasons name the operation and say what it does to a carry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, conv, image, ready
from torch import Tensor, nn

import rmfx


def reason_of(forward: Any, *inputs: Tensor, **parts: nn.Module) -> str:
    gm = rmfx.remove_residuals(ready(Apply(forward, **parts)), inputs or image())
    (row,) = rmfx.report(gm).rows
    assert row.status == "refused"
    return row.reason


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: x + m.a(F.group_norm(x, 2)), "group_norm divides by statistics"),
        (lambda m, x: x + m.a(F.layer_norm(x, (7,))), "layer_norm divides by statistics of each"),
        (lambda m, x: x + m.n(x), "InstanceNorm2d divides by statistics"),
        (lambda m, x: x + m.a(x).softmax(1), "softmax weighs"),
        (lambda m, x: x + m.a(F.interpolate(x, (9, 7))), "interpolate resizes"),
        (lambda m, x: x + F.max_pool2d(x, 3, 1, 1), "MaxPool2d takes the largest"),
        (lambda m, x: x + F.pad(m.a(x).amax((2, 3), keepdim=True), (3, 3, 4, 4)), "amax pools"),
        (lambda m, x: x + m.a(x).flip(2), "flip rearranges"),
        (lambda m, x: x + torch.cumsum(m.a(x), 1), "cumsum is neither linear nor"),
        (lambda m, x: x + m.u(x)[:, :, :9, :7], "transposed convolution with a stride"),
        (
            lambda m, x: x + m.a(x[:, :, :5].repeat(1, 1, 2, 1)[:, :, 1:]),
            "a slice whose place depends",
        ),
    ],
)
def test_what_stands_in_the_way_is_named(forward: Any, reason: str) -> None:
    up = nn.ConvTranspose2d(4, 4, 2, stride=2)
    assert reason in reason_of(forward, a=conv(), n=nn.InstanceNorm2d(4), u=up)


def test_the_cause_is_looked_for_behind_what_only_rearranges() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(x.permute(0, 2, 3, 1))
        return x + m.a(m.linear(y).permute(0, 3, 1, 2))

    reason = reason_of(forward, a=conv(), norm=nn.LayerNorm(4), linear=nn.Linear(4, 4))
    assert reason.startswith("norm: LayerNorm divides by statistics of each sample")


def test_what_lies_before_the_fork_is_not_to_blame() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(x)
        return y + m.a(y).roll(1, 2)

    assert "roll rearranges" in reason_of(forward, a=conv(), norm=nn.GroupNorm(2, 4))
