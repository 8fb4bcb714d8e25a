"""Branches put side by side, weighed and summed over their axis: additions of what they give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import Residual, assert_refused, chain, conv, image, ready
from torch import Tensor, nn

import rmfx
from rmfx.testing import assert_equivalent


class Selective(nn.Module):
    """Kernels of several widths, of which a softmax of their sum chooses."""

    def __init__(self, count: int, *, stacked: bool = True, groups: int = 1) -> None:
        super().__init__()
        self.kernels = nn.ModuleList(
            chain(conv(4, 4, kernel=2 * i + 1, padding=i, groups=groups), nn.ReLU())
            for i in range(count)
        )
        self.fc = conv(4, 4 * count, kernel=1)
        self.fcs = nn.ModuleList(conv(4, 4, kernel=1) for _ in range(count)) if stacked else None

    def forward(self, x: Tensor) -> Any:
        branches = torch.stack([kernel(x) for kernel in self.kernels], dim=1)
        total = branches.sum(1)
        vector = total.mean((2, 3), keepdim=True)
        if self.fcs is not None:
            w = torch.softmax(torch.stack([fc(vector) for fc in self.fcs], 1), 1)
        else:
            w = self.fc(vector).view(-1, len(self.kernels), 4, 1, 1).softmax(1)
        return (w * branches).sum(dim=1)


class Split(nn.Module):
    """Channels viewed as groups of branches."""

    def __init__(self, count: int, numbers: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.count, self.numbers = count, numbers
        self.wide, self.fc = chain(conv(4, 4 * count), nn.ReLU()), conv(4, 4 * count, kernel=1)

    def forward(self, x: Tensor) -> Any:
        u = self.wide(x)
        b, c, h, w = u.shape
        h, w = self.numbers or (h, w)
        u = u.reshape(b, self.count, c // self.count, h, w)
        vector = u.sum(1).mean((2, 3), keepdim=True)
        chosen = torch.softmax(self.fc(vector).view(b, self.count, 4, 1, 1), 1)
        return (u * chosen).sum(1)


def in_a_block(inner: nn.Module) -> Any:
    return ready(chain(conv(), Residual(chain(conv(), nn.ReLU(), inner, nn.ReLU(), conv()))))


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("stacked", [True, False])
def test_a_block_around_selective_kernels_is_removed(count: int, stacked: bool) -> None:
    model, x = in_a_block(Selective(count, stacked=stacked)), image()
    converted = rmfx.remove_residuals(model, x)
    report = rmfx.report(converted)
    assert report.rows[-1].status == "removed", str(report)
    assert report.refused == 0, str(report)
    assert_equivalent(model, converted, (x,))


@pytest.mark.parametrize("count", [2, 3])
def test_a_block_around_split_attention_is_removed(count: int) -> None:
    model, x = in_a_block(Split(count)), image()
    converted = rmfx.remove_residuals(model, x)
    report = rmfx.report(converted)
    assert (report.adds_left, report.rows[-1].status) == (0, "removed"), str(report)
    assert_equivalent(model, converted, (x,))


def test_sizes_in_the_code_are_demanded() -> None:
    model, x = in_a_block(Split(2, numbers=(9, 7))), image(2, 4, 9, 7)
    converted = rmfx.remove_residuals(model, x)
    assert rmfx.report(converted).adds_left == 0, str(rmfx.report(converted))
    assert (converted(x) - model(x)).abs().max() <= 1e-10
    y = image(3, 4, 9, 7)
    assert (converted(y) - model(y)).abs().max() <= 1e-10
    with pytest.raises(rmfx.ShapeError):
        converted(image(2, 4, 18, 7))


def test_sums_of_branches_are_not_opened_at_many_times_their_price() -> None:
    model, x = ready(Selective(2, groups=4)), image(1, 4, 16, 16)
    converted = rmfx.remove_residuals(model, x)
    report = rmfx.report(converted)
    assert (report.other, report.refused) == (2, 0), str(report)
    before, after = (rmfx.cost.count(m, x).macs for m in (model, converted))
    assert after <= before
    assert_equivalent(model, converted, (x,))


def test_a_view_of_other_dimensions_is_no_axis_of_branches() -> None:
    class Tokens(nn.Module):
        def forward(self, x: Tensor) -> Any:
            b, c, h, w = x.shape
            return x.reshape(b, 2, h, c // 2, w).sum(1).repeat(1, 1, 2, 1).reshape(b, c, h, w)

    model = ready(Residual(chain(conv(), Tokens())))
    assert_refused(model, image(2, 4, 9, 7), reason="", example=True)
