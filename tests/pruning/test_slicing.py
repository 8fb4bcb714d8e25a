"""The cutter: what is left of a layer computes what it did, of what is left of its input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import chain
from torch import Tensor, nn

from rmfx.algebra.affine import AffineConv
from rmfx.algebra.modules import from_conv
from rmfx.pruning.slicing import Merge, cut_columns, cut_layer, cut_module, filters, inputs_read


def booleans(*bits: int) -> Tensor:
    return torch.tensor(bits, dtype=torch.bool)


# A layer of 6 inputs, what stays of its outputs and of its inputs, and the groups that are left.
LAYERS: dict[str, tuple[nn.Module, Tensor, Tensor, int]] = {
    "dense": (nn.Conv2d(6, 4, 3, padding=1), booleans(1, 0, 1, 1), booleans(1, 0, 0, 1, 1, 0), 1),
    "Linear": (nn.Linear(6, 4), booleans(1, 0, 0, 1), booleans(0, 1, 1, 1, 1, 1), 1),
    "no bias": (nn.Conv1d(6, 2, 3, bias=False), booleans(0, 1), booleans(1, 1, 1, 0, 0, 0), 1),
    "other places of each group": (
        nn.Conv2d(6, 4, 3, groups=2),
        booleans(1, 0, 0, 1),
        booleans(1, 1, 0, 0, 1, 1),
        2,
    ),
    "a whole group": (
        nn.Conv2d(6, 6, 3, groups=3),
        booleans(1, 1, 0, 0, 1, 1),
        booleans(0, 1, 0, 0, 1, 0),
        2,
    ),
    "depthwise": (
        nn.Conv2d(6, 6, 3, groups=6),
        booleans(1, 0, 0, 1, 1, 1),
        booleans(1, 0, 0, 1, 1, 1),
        4,
    ),
    "transposed": (
        nn.ConvTranspose2d(6, 4, 3, stride=2),
        booleans(0, 1, 1, 1),
        booleans(1, 1, 0, 0, 0, 1),
        1,
    ),
    "transposed, grouped": (
        nn.ConvTranspose1d(6, 4, 3, groups=2),
        booleans(0, 1, 1, 0),
        booleans(1, 0, 0, 0, 0, 1),
        2,
    ),
}


def input_of(layer: nn.Module) -> Tensor:
    dims = layer.weight.dim() - 2  # type: ignore[operator, union-attr]
    return torch.randn(2, 6, *[7] * dims, dtype=torch.float64)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_without_channels_computes_the_others(name: str) -> None:
    layer, outs, ins, groups = LAYERS[name]
    x = input_of(layer.double())
    with torch.no_grad():
        expected = layer(x * ins.reshape(-1, *[1] * (x.dim() - 2)))[:, outs]
    made: Any = cut_module(layer, outs, ins)
    torch.testing.assert_close(made(x[:, ins]), expected)
    assert getattr(made, "groups", 1) == groups
    assert (made.bias is None) == (layer.bias is None)
    assert repr(type(layer)(**_arguments(made))) == repr(made)
    value = from_conv(layer)
    if isinstance(value, AffineConv):  # all but transposed ones
        own = cut_layer(value, outs, ins)
        torch.testing.assert_close(own(x[:, ins]), expected)
        assert own.groups == groups


def _arguments(layer: Any) -> dict[str, Any]:
    """With which a layer like one that was cut would be made."""
    has_bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        out, own = layer.weight.shape
        return {"in_features": own, "out_features": out, "bias": has_bias}
    rows, own = layer.weight.shape[:2]
    sizes = (rows, own * layer.groups)
    ins, outs = sizes if layer.transposed else reversed(sizes)
    names = ("kernel_size", "stride", "padding", "groups")
    options = {name: getattr(layer, name) for name in names}
    return {"in_channels": ins, "out_channels": outs, "bias": has_bias, **options}


def test_what_the_groups_that_stay_read_stays_by_default() -> None:
    grouped = nn.Conv2d(6, 6, 1, groups=3)
    made: Any = cut_module(grouped, booleans(0, 0, 1, 1, 1, 1))
    assert (made.in_channels, made.out_channels, made.groups) == (4, 4, 2)
    dense: Any = cut_module(nn.Conv2d(6, 6, 1), booleans(0, 0, 1, 1, 1, 1))
    assert (dense.in_channels, dense.out_channels, dense.groups) == (6, 4, 1)


@pytest.mark.parametrize(
    ("outs", "ins"),
    [
        (booleans(1, 1, 1, 0), booleans(1, 1, 1, 1)),
        (booleans(1, 1, 1, 1), booleans(1, 0, 1, 1)),
    ],
)
def test_groups_of_two_sizes_are_no_layer(outs: Tensor, ins: Tensor) -> None:
    layer = nn.Conv1d(4, 4, 1, groups=2)
    value = from_conv(layer)
    assert isinstance(value, AffineConv)
    with pytest.raises(ValueError, match="larger than others"):
        cut_layer(value, outs, ins)
    with pytest.raises(ValueError, match="larger than others"):
        cut_module(layer, outs, ins)


def test_the_model_keeps_its_layer_and_what_is_trained_of_it() -> None:
    layer = nn.Conv2d(4, 4, 3).requires_grad_(False)
    made: Any = cut_module(layer, booleans(1, 0, 0, 1))
    assert layer.weight.shape == (4, 4, 3, 3)
    assert not made.weight.requires_grad
    assert not made.bias.requires_grad


def test_numbers_per_channel_are_cut_inside_of_a_module_too() -> None:
    made: Any = cut_module(chain(nn.BatchNorm2d(3), nn.PReLU(3)), booleans(1, 0, 1))
    norm, act = made.children()
    assert (norm.num_features, norm.running_var.numel(), norm.weight.numel()) == (2, 2, 2)
    assert (act.num_parameters, act.weight.numel()) == (2, 2)


@pytest.mark.parametrize("groups", [1, 2])
def test_columns_that_go_leave_what_they_gave(groups: int) -> None:
    layer = from_conv(nn.Conv2d(6, 4, 3, groups=groups).double())
    assert isinstance(layer, AffineConv)
    x = torch.randn(2, 6, 7, 7, dtype=torch.float64)
    x[:, 1] = 0.75
    x[:, 5] = 3 * x[:, 4]
    keep = booleans(1, 0, 1, 1, 1, 0)
    numbers = torch.tensor([0, 0.75, 0, 0, 0, 0], dtype=torch.float64)
    made = cut_columns(layer, keep, numbers, [Merge(5, 4, 3.0)])
    torch.testing.assert_close(made(x[:, keep]), layer(x))
    assert made.weight.shape == (4, 4 // groups, 3, 3)


def test_what_is_read_is_asked_of_some_outputs_or_of_all() -> None:
    weight = torch.tensor([[0.0, 1], [0, 0], [2, 0], [0, 3]])
    assert inputs_read(weight, 2).tolist() == [False, True, True, True]
    assert inputs_read(weight, 2, booleans(0, 1, 1, 0)).tolist() == [False, False, True, False]


def test_filters_of_a_transposed_layer_come_first() -> None:
    layer = nn.ConvTranspose1d(6, 4, 3, groups=2)
    own = filters(layer)
    assert own.shape == (4, 3, 3)
    assert torch.equal(own[3, 1], layer.weight[4, 1])  # output 3 and input 4, both of group 1
    assert filters(nn.Linear(6, 4)).shape == (4, 6)
