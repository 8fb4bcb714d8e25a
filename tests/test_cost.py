"""Multiply-adds, parameters, layers and additions, against numbers found by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, Residual, chain, conv, conv_bn, conv_branch, image, ready
from torch import nn

import rmfx
from rmfx.cost import Cost, count

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
    assert found == Cost(2 * 2 * 63 * 9 * 16, 4 * 4 * 9 + 4, 2, 0)


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
