"""Channels of zeros, however they are written, are a padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import adds, assert_all_gone, basic_branch, chain, conv, image, ready
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rmfx
from rmfx.testing import assert_equivalent

Shortcut = Callable[[Tensor, Tensor], Tensor]  # of what goes in, and what the branch gives


class Block(nn.Module):
    """A basic block whose shortcut grows by channels of zeros."""

    def __init__(self, shortcut: Shortcut, inner: int = 4, outer: int = 6, stride: int = 1) -> None:
        super().__init__()
        self.branch = basic_branch(inner, outer, stride=stride)
        self.pool = nn.AvgPool2d(stride, stride) if stride > 1 else nn.Identity()
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        return torch.relu(y + self.shortcut(self.pool(x), y))


def net(shortcut: Shortcut, **options: int) -> Any:
    return ready(nn.Sequential(conv(3, 4), nn.ReLU(), Block(shortcut, **options), conv(6, 2)))


def by_size(x: Tensor, y: Tensor) -> Tensor:
    n, c, h, w = y.size()
    return torch.cat((x, torch.zeros(n, c - x.size(1), h, w, dtype=x.dtype)), 1)


FORMS: dict[str, Shortcut] = {
    "zeros of a size": by_size,
    "zeros of another's size": lambda x, y: torch.cat(
        (x, torch.zeros(x.shape[0], y.shape[1] - x.shape[1], *x.shape[2:], dtype=x.dtype)), dim=1
    ),
    "zeros like a slice": lambda x, y: torch.cat([x, torch.zeros_like(y[:, x.shape[1] :])], 1),
    "new zeros": lambda x, y: torch.cat(
        (x, x.new_zeros((x.shape[0], 2, x.shape[2], x.shape[3]))), dim=-3
    ),
    "times zero": lambda x, y: torch.cat((x, x[:, :2].mul(0)), 1),
    "a copy": lambda x, y: torch.cat((x, torch.zeros_like(x[:, :2]).detach().clone()), 1),
    "zero times": lambda x, y: torch.cat((x, 0.0 * x[:, :2]), 1),
    "before": lambda x, y: torch.cat((torch.zeros_like(x[:, :2]), x), 1),
    "on both sides": lambda x, y: torch.cat((x[:, :1] * 0, x, x[:, 2:3] * 0), 1),
    "twice": lambda x, y: torch.cat((x, x[:, :1] * 0, torch.zeros_like(x[:, :1])), 1),
    "padded by a difference": lambda x, y: F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1])),
    "padded by half of it": lambda x, y: F.pad(
        x, (0, 0, 0, 0, (y.size(1) - x.size(1)) // 2, (y.size(1) - x.size(1)) // 2)
    ),
}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_the_shortcut_is_removed_and_the_result_plain(form: str, stride: int) -> None:
    model, x = net(FORMS[form], stride=stride), image(2, 3, 8, 8)
    gm = rmfx.remove_residuals(model, x)
    assert_all_gone(model, gm, (x,), 1, None)
    assert rmfx.is_plain(gm)
    exported = rmfx.remove_residuals(torch.export.export(model, (x,)))
    assert_all_gone(model, exported, (x,), 1, None)
    assert rmfx.is_plain(exported)


@pytest.mark.parametrize("form", [form for form in FORMS if "size" not in form])
def test_it_runs_at_other_sizes(form: str) -> None:
    model = net(FORMS[form], stride=2)
    gm = rmfx.remove_residuals(model, image(2, 3, 8, 8))
    other = image(1, 3, 12, 6)
    torch.testing.assert_close(gm(other), model(other), rtol=0, atol=1e-10)


@pytest.mark.slow
@given(channels=st.integers(1, 5), before=st.integers(0, 3), behind=st.integers(0, 3))
def test_zeros_on_either_side(channels: int, before: int, behind: int) -> None:
    def shortcut(x: Tensor, y: Tensor) -> Tensor:
        n, c, h, w = y.shape[0], y.shape[1] - x.shape[1] - before, x.shape[2], x.shape[3]
        zeros = (torch.zeros(n, k, h, w, dtype=x.dtype) for k in (before, c))
        return torch.cat((next(zeros), x, next(zeros)), 1)

    model = ready(chain(conv(3, channels), Block(shortcut, channels, channels + before + behind)))
    x = image(2, 3, 6, 6)
    gm = rmfx.remove_residuals(model, x)
    assert_all_gone(model, gm, (x,), 1, None)
    assert rmfx.is_plain(gm)


@pytest.mark.parametrize(
    "shortcut",
    [
        lambda x, y: torch.cat((x[:, :2], x[:, :2] * 0, x[:, 2:]), 1),  # zeros in the middle
        lambda x, y: torch.cat((x, x.new_zeros(x.shape[0], x.shape[2] - 6, 8, 8)), 1),
        lambda x, y: torch.cat((x[:, :, :2] * 0, x[:, :, 2:]), 2).repeat(1, 2, 1, 1)[:, :6],
        lambda x, y: torch.cat((x, torch.zeros_like(x[:, :2]) + 1), 1),
        lambda x, y: torch.cat((x, torch.zeros_like(x[:, :2]).add_(1)), 1),
        lambda x, y: torch.cat((x, x[:, :2] * 0), 1).sigmoid(),
    ],
)
def test_what_is_no_padding_keeps_its_numbers(shortcut: Shortcut) -> None:
    model, x = net(shortcut), image(2, 3, 8, 8)
    gm = rmfx.remove_residuals(model, x)
    assert_equivalent(model, gm, x)


def test_channels_that_follow_from_the_size_of_the_image_stay() -> None:
    class Grown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat((x, x.new_zeros(x.shape[0], x.shape[2], x.shape[2], x.shape[3])), 1)

    model = ready(chain(conv(3, 4), Grown(), nn.AdaptiveAvgPool2d(1)))
    gm = rmfx.remove_residuals(model, image(2, 3, 8, 8))
    for size in (8, 5):
        x = image(2, 3, size, size)
        assert gm(x).shape == model(x).shape == (2, 4 + size, 1, 1)


def test_zeros_of_a_wider_type_still_widen() -> None:
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            zeros = torch.zeros(x.shape[0], 2, *x.shape[2:], dtype=torch.float64)
            return torch.cat((x, zeros), 1)

    model = ready(chain(conv(3, 4), Wide()), torch.float32)
    x = image(2, 3, 8, 8, dtype=torch.float32)
    assert rmfx.remove_noops(model, x)(x).dtype == torch.float64


def test_what_was_padded_can_be_pruned() -> None:
    model, x = net(FORMS["times zero"]), image(2, 3, 8, 8)
    small, report = rmfx.prune_channels(model, x, target=0.6, importance="l2")
    assert small(x).shape == model(x).shape
    assert adds(small) == 1
    assert report.macs_after <= 0.6 * report.macs_before
