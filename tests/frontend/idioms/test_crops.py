"""Slices and paddings by sizes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, assert_all_gone, chain, conv, image, ready
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rmfx
from rmfx.testing import assert_equivalent

Cut = Callable[[Tensor, Tensor], Tensor]  # x to the size of y


def center(x: Tensor, y: Tensor) -> Tensor:
    start = (x.size(-1) - y.size(-1)) // 2
    return x[..., start : start + y.size(-1)]


CUTS: dict[str, Cut] = {
    "the last ones": lambda x, y: x[:, :, -y.size(2) :],
    "the first ones": lambda x, y: x[:, :, : y.shape[-1]],
    "without the first": lambda x, y: x[..., x.size(2) - y.size(2) :],
    "without the last": lambda x, y: x[:, :, : -(x.size(2) - y.size(2))],
    "the middle": center,
    "padding": lambda x, y: F.pad(x, (0, y.size(2) - x.size(2))),
    "padding on both sides": lambda x, y: F.pad(
        x,
        [
            -((x.size(2) - y.size(2)) // 2),
            -((x.size(2) - y.size(2)) - (x.size(2) - y.size(2)) // 2),
        ],
    ),
}


def causal(cut: Cut) -> nn.Module:
    """The block of a WaveNet, without padding."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.second(torch.relu(m.first(x)))
        return cut(x, y) + y

    first = conv(4, 4, 3, dims=1, dilation=2, padding=0)
    return Apply(forward, first=first, second=conv(4, 4, 2, dims=1, padding=0))


@pytest.mark.parametrize("name", CUTS)
def test_a_shortcut_cut_to_the_size_of_its_branch_is_removed(name: str) -> None:
    cut = CUTS[name]
    model = ready(chain(conv(2, 4, dims=1), nn.ReLU(), causal(cut), causal(cut)))
    x, longer = image(2, 2, 20), image(3, 2, 33)
    for gm in (rmfx.remove_residuals(model, x), rmfx.remove_residuals(model)):
        assert_all_gone(model, gm, (x,), 2, None)
        assert rmfx.is_plain(gm)
        torch.testing.assert_close(gm(longer), model(longer), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CUTS)
def test_it_is_removed_from_exported_programs(name: str) -> None:
    model = ready(chain(conv(2, 4, dims=1), nn.ReLU(), causal(CUTS[name])))
    x, longer = image(2, 2, 20), image(2, 2, 33)
    fixed = rmfx.remove_residuals(torch.export.export(model, (x,)))
    assert_all_gone(model, fixed, (x,), 1, None)
    with pytest.raises(rmfx.ShapeError):
        fixed(longer)
    sizes = ({2: torch.export.Dim("length", min=12)},)
    open_ = rmfx.remove_residuals(torch.export.export(model, (x,), dynamic_shapes=sizes))
    assert_all_gone(model, open_, (x,), 1, None)
    torch.testing.assert_close(open_(longer), model(longer), rtol=0, atol=1e-10)


def bounds(model: nn.Module, x: Tensor | None) -> list[Any]:
    """The last dimension's slice of each slicing that is left."""
    gm = rmfx.trace(model, x)
    found = [n.args[1] for n in gm.graph.nodes if n.target is operator.getitem]
    return [index[-1] for index in found if isinstance(index, tuple)]


@pytest.mark.parametrize(
    "cut",
    [
        lambda x, y: x[:, :, : x.size(2) - 30],  # may be negative, which means something else
        lambda x, y: x[:, :, 25 - x.size(2) :],
        lambda x, y: x[:, :, : y.size(2) // 2],
        lambda x, y: x[:, :, :15],
        lambda x, y: x[:, :, 30 - y.size(2) : -1],
    ],
)
def test_a_cut_that_depends_on_the_size_stays(cut: Cut) -> None:
    model = ready(Apply(lambda m, x: cut(x, m.conv(x)), conv=conv(4, 4, 5, dims=1, padding=0)))
    gm = rmfx.trace(model, image(2, 4, 20))
    for length in (6, 20, 29, 41):
        x = image(2, 4, length)
        assert torch.equal(gm(x), model(x))


def test_sizes_that_round_apart_stay_what_they_are() -> None:
    """⌊(H + 1)/2⌋ and ⌊H/2⌋ differ by 0 or 1."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.pool(x)[:, :, -y.size(2) :] + y

    conv_ = conv(4, 4, 3, dims=1, stride=2)
    model = ready(Apply(forward, conv=conv_, pool=nn.AvgPool1d(2, ceil_mode=False)))
    (bound,) = bounds(model, image(2, 4, 20))
    assert not isinstance(bound.start, int)
    gm = rmfx.remove_residuals(model, image(2, 4, 20))
    assert_equivalent(model, gm, image(2, 4, 20))


def test_equal_sizes_leave_nothing_to_cut() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return x[:, :, : y.size(2)] + y

    model = ready(Apply(forward, conv=conv(dims=1)))
    assert bounds(model, image(2, 4, 20)) == [slice(None, None, None)]


@given(
    kernel=st.integers(1, 4),
    padding=st.integers(0, 2),
    stride=st.integers(1, 3),
    own=st.integers(1, 3),
    length=st.integers(8, 20),
)
def test_a_known_cut_is_that_of_every_size(
    kernel: int, padding: int, stride: int, own: int, length: int
) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y, z = m.branch(x), m.shortcut(x)
        return z[:, :, -y.size(2) :] + 0 * y.sum()

    branch = conv(2, 2, kernel, dims=1, padding=padding, stride=stride)
    model = ready(Apply(forward, branch=branch, shortcut=conv(2, 2, own, dims=1, stride=stride)))
    gm = rmfx.trace(model, image(1, 2, 12))
    for n in (length, length + 1, length + 2):
        x = image(1, 2, n)
        assert torch.equal(gm(x), model(x))


@pytest.mark.parametrize("name", CUTS)
def test_dynamo_sees_it_at_every_size(name: str) -> None:
    model = ready(chain(conv(2, 4, dims=1), nn.ReLU(), causal(CUTS[name])))
    reports: list[rmfx.Report] = []
    torch._dynamo.reset()
    options = {"backend": "eager", "on_report": reports.append}
    compiled = torch.compile(model, backend="rmfx", dynamic=True, options=options)
    with torch.no_grad():
        for length in (20, 33, 27):
            x = image(2, 2, length)
            torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-10)
    assert {report.removed for report in reports} == {1}
