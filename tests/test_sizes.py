"""Sizes of inner maps, and networks that hold for some input sizes only."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, assert_refused, chain, conv, image, ready
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rmfx
from rmfx._graph import Net
from rmfx.testing import assert_equivalent


def downsampling(stem: nn.Module | None = None) -> nn.Module:
    """A block whose shortcut pools with ceil_mode, as in ResNet-D."""
    pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)

    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.stem(x))
        return m.shortcut(y) + F.relu(m.b(F.relu(m.a(y))))

    parts = {"a": conv(4, 6, 3, stride=2), "b": conv(6, 6), "shortcut": chain(pool, conv(4, 6, 1))}
    return ready(Apply(forward, stem=nn.Identity() if stem is None else stem, **parts))


def test_rounding_up_makes_no_difference_where_there_is_nothing_to_round() -> None:
    model, x = downsampling(), image(2, 4, 8, 10)
    gm = rmfx.remove_residuals(model, x)
    assert rmfx.report(gm).removed == 1
    for size in ((8, 10), (12, 6), (2, 2)):
        assert_equivalent(model, gm, image(1, 4, *size))


@pytest.mark.parametrize("size", [(9, 10), (8, 7)])
def test_a_size_at_which_it_does_is_an_error(size: tuple[int, int]) -> None:
    model = downsampling()
    gm = rmfx.remove_residuals(model, image(2, 4, 8, 10))
    saved = io.BytesIO()
    torch.save(gm, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    for form in (gm, copy.deepcopy(gm), loaded, rmfx.remove_residuals(gm)):
        with pytest.raises(rmfx.ShapeError, match=r"x has shape .*shortcut_0 averages fewer"):
            form(image(2, 4, *size))


def test_the_sequential_form_demands_the_same_sizes() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.AvgPool2d(2, ceil_mode=True)
            self.conv = conv(stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(x) + self.conv(x)

    gm = rmfx.remove_residuals(ready(Block()), image(1, 4, 8, 8))
    network = rmfx.to_sequential(gm)
    torch.testing.assert_close(network(image(1, 4, 4, 6)), gm(image(1, 4, 4, 6)))
    with pytest.raises(rmfx.ShapeError, match="averages fewer"):
        copy.deepcopy(network)(image(1, 4, 5, 6))


def test_examples_of_such_a_size_are_refused() -> None:
    assert_refused(downsampling(), image(2, 4, 9, 10), reason="maps of size 9")
    assert_refused(downsampling(), image(2, 4, 8, 10), reason="pass example_inputs", example=False)


def test_a_pool_that_stays_asks_for_nothing() -> None:
    model = ready(chain(conv(), nn.AvgPool2d(2, ceil_mode=True), nn.ReLU(), conv()))
    gm = rmfx.remove_residuals(model, image(2, 4, 8, 8))
    torch.testing.assert_close(gm(image()), model(image()))


@pytest.mark.parametrize("height", range(20, 40))
def test_the_demand_reaches_through_a_stem(height: int) -> None:
    stem = chain(conv(4, 4, 7, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    model = downsampling(stem)
    gm = rmfx.remove_residuals(model, image(1, 4, 32, 32))
    x = image(1, 4, height, 32)
    if stem.eval()(x).shape[2] % 2:
        with pytest.raises(rmfx.ShapeError, match="averages fewer"):
            gm(x)
    else:
        assert_equivalent(model, gm, x)


@given(
    st.lists(
        st.tuples(st.sampled_from(["conv", "max", "avg", "act", "crop", "pad"]),
                  st.integers(1, 3), st.integers(1, 3), st.integers(0, 1)),
        max_size=5,
    ),
    st.integers(20, 60),
)  # fmt: skip
def test_the_law_gives_the_size_of_every_value(
    layers: list[tuple[str, int, int, int]], size: int
) -> None:
    made: list[nn.Module] = []
    for kind, kernel, stride, padding in layers:
        padding = min(padding, kernel // 2)
        if kind == "conv":
            made.append(nn.Conv1d(2, 2, kernel, stride, padding))
        elif kind == "max":
            made.append(nn.MaxPool1d(kernel, stride, padding))
        elif kind == "avg":
            made.append(nn.AvgPool1d(kernel, stride, padding))
        elif kind == "crop":
            made.append(Apply(lambda m, x: x[:, :, 1:]))
        elif kind == "pad":
            made.append(nn.ZeroPad1d((1, 0)))
        else:
            made.append(nn.ReLU())
    model = nn.Sequential(*made, nn.Conv1d(2, 2, 1)).eval()
    try:
        expected = model(torch.zeros(1, 2, size)).shape[2]
    except RuntimeError:  # nothing is left
        return
    net = Net(rmfx.trace(model, torch.zeros(1, 2, 50)))
    last = next(iter(net.graph.find_nodes(op="output"))).all_input_nodes[0]
    law = net.sizes.law(last)
    assert law is not None
    assert (size + law.growth[0]) // law.stride[0] == expected
