"""Multiply-adds, parameters, layers and additions, against numbers found by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, Residual, chain, conv, conv_bn, conv_branch, image, ready
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rmfx
from rmfx.cost import Cost, count, nodes, skips, table

LAYERS: list[tuple[nn.Module, tuple[int, ...], int]] = [
    (conv(4, 6), (2, 4, 9, 7), 2 * 63 * 9 * 4 * 6),
    (conv(4, 6, stride=2), (2, 4, 9, 7), 2 * 20 * 9 * 4 * 6),
    (conv(4, 8, groups=4), (2, 4, 9, 7), 2 * 63 * 9 * 8),
    (conv(4, 6, dilation=2, padding=0), (1, 4, 9, 7), 15 * 9 * 4 * 6),
    (conv(4, 6, dims=1), (2, 4, 9), 2 * 9 * 3 * 4 * 6),
    (conv(4, 6, dims=3), (2, 4, 3, 4, 5), 2 * 60 * 27 * 4 * 6),
    (nn.Linear(4, 6), (2, 4), 2 * 4 * 6),
    (nn.Linear(4, 6), (2, 5, 4), 10 * 4 * 6),
    (nn.ReLU(), (2, 4), 0),
    (nn.BatchNorm2d(4), (2, 4, 3, 3), 0),
]


@pytest.mark.parametrize(("layer", "shape", "macs"), LAYERS)
def test_multiply_adds_of_one_layer(layer: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    found = count(ready(layer), image(*shape))
    assert found.macs == macs
    assert found.parameters == sum(p.numel() for p in layer.parameters())
    assert found.layers == (macs > 0)
    assert found.adds == 0


def test_functional_convs_count_like_modules() -> None:
    model = ready(Apply(lambda m, x: F.conv2d(x, m.c.weight, padding=1), c=conv(bias=False)))
    assert count(model, image()) == count(ready(conv(bias=False)), image())


def test_a_layer_counts_once_for_every_call_and_its_weights_once() -> None:
    layer = conv()
    found = count(ready(chain(layer, layer)), image())
    values, weights = 2 * 4 * 63 * 8, (4 * 4 * 9 + 4) * 8
    moved = 2 * (2 * values + weights)
    assert found == Cost(2 * 2 * 63 * 9 * 16, 4 * 4 * 9 + 4, 2, 0, moved, 2 * values)


@pytest.mark.parametrize(
    ("combine", "adds"),
    [
        (lambda x, y: x + y, 1),
        (lambda x, y: x - y, 1),
        (lambda x, y: x + y + x, 2),
        (lambda x, y: torch.add(x, y, alpha=2), 1),
        (lambda x, y: x + 1, 0),
        (lambda x, y: y + y.size(0), 0),
        (lambda x, y: x * y, 0),
    ],
)
def test_additions_of_two_tensors_count(combine: object, adds: int) -> None:
    assert count(ready(Residual(conv(), combine=combine)), image()).adds == adds  # type: ignore[arg-type]


def test_conversion_leaves_no_add_and_states_its_price() -> None:
    model = ready(Residual(conv_branch()))
    before, after = count(model, image()), count(rmfx.remove_residuals(model), image())
    assert (before.adds, after.adds) == (1, 0)
    assert (before.layers, after.layers) == (2, 2)
    assert after.macs == 2 * before.macs


def test_cost_can_be_counted_of_an_exported_program() -> None:
    model = ready(chain(conv_bn(), Residual(conv_branch())))
    program = torch.export.export(model, (image(),))
    one, other = count(program, image()), count(model, image())
    assert dataclasses.replace(one, parameters=0) == dataclasses.replace(other, parameters=0)


def test_counting_needs_inputs_that_fit() -> None:
    with pytest.raises(rmfx.ShapeError, match="needs example inputs"):
        count(conv(), None)
    with pytest.raises(rmfx.ShapeError, match="does not run on the example inputs"):
        count(conv(), torch.zeros(1, 5, 3, 3))


# ---- memory -------------------------------------------------------------------------------------

VALUE = 2 * 4 * 63 * 8  # bytes of `image()`


@pytest.mark.parametrize(
    ("model", "peak"),
    [
        (lambda: chain(conv(), conv(), conv()), 2),
        (lambda: chain(conv(), nn.ReLU(), conv(), nn.ReLU()), 2),
        (lambda: Residual(chain(conv(), nn.ReLU(), conv())), 3),
        (lambda: Residual(nn.ReLU()), 2),
        (lambda: chain(conv(4, 12), nn.ReLU(), conv(12, 4)), 4),
        (
            lambda: Apply(lambda m, x: m.b(m.a(x).flatten(2).view(2, 4, 9, 7)), a=conv(), b=conv()),
            2,
        ),
        (lambda: Apply(lambda m, x: (y := m.a(x), m.b(y), m.b(y))[1:], a=conv(), b=conv()), 3),
    ],
)
def test_values_that_live_at_the_same_time(model: Any, peak: int) -> None:
    assert count(ready(model()), image()).peak == peak * VALUE


def test_the_costs_of_nodes_add_up() -> None:
    model = ready(chain(Residual(conv_branch()), nn.Flatten(), nn.Linear(4 * 63, 3)))
    rows, whole = nodes(model, image()), count(model, image())
    assert sum(row.macs for row in rows) == whole.macs
    assert sum(row.moved for row in rows) == whole.moved
    assert max(row.live for row in rows) == whole.peak
    assert [row.kind for row in rows if row.macs] == ["Conv2d", "Conv2d", "Linear"]
    assert "Linear" in table(rows)
    assert len(table(rows).splitlines()) == len(rows) + 2


# ---- streams ------------------------------------------------------------------------------------


def reads_ahead(branch: nn.Module, x: torch.Tensor) -> int:
    """How many pixels of x, in raster order, a branch has to see before its first output."""
    x = x.clone().requires_grad_(True)
    y = branch(x)
    y[(0, slice(None), *[0] * (x.dim() - 2))].sum().backward()
    assert x.grad is not None
    return int(x.grad[0].abs().sum(0).flatten().nonzero().max())


@given(st.data())
def test_a_fifo_holds_what_the_branch_has_to_see_first(data: st.DataObject) -> None:
    dims = data.draw(st.integers(1, 2))
    layers = []
    for _ in range(data.draw(st.integers(1, 3))):
        kernel = data.draw(st.sampled_from([1, 3, 5]))
        layers += [conv(kernel=kernel, dims=dims), nn.LeakyReLU()]
    branch = ready(chain(*layers))
    x = image(1, 4, *(13, 11)[:dims])
    (skip,) = skips(ready(Residual(branch)), x)
    # The first output needs a whole row less where it stands at the border.
    assert skip.fifo == 4 * reads_ahead(branch, x)


def test_fifos_of_known_blocks() -> None:
    x = image(1, 4, 8, 8)
    assert skips(ready(Residual(conv_branch())), x)[0].fifo == 4 * (2 * 8 + 2)
    strided = Residual(chain(conv(stride=2), nn.ReLU(), conv()), conv(kernel=1, stride=2))
    assert skips(ready(strided), x)[0].fifo == 4 * (2 * 4 + 2)  # pixels of the join
    pooled = Apply(
        lambda m, x: x + m.a(x) * torch.sigmoid(m.b(x.mean((2, 3), keepdim=True))),
        a=conv(kernel=1), b=conv(kernel=1),
    )  # fmt: skip
    assert skips(ready(pooled), x)[0].fifo == 4 * 8 * 8
    norm = Residual(chain(conv(), nn.GroupNorm(2, 4)))
    assert skips(ready(norm), x)[0].fifo is None
    assert skips(rmfx.remove_residuals(ready(Residual(conv_branch())), x), x) == ()
