"""Copies: which channels of a value are equal, and layers that read each of them once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from builders import Apply, chain, conv, image
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rmfx
from rmfx.algebra.affine import AffineConv
from rmfx.ir.net import Net
from rmfx.rules.copies import Copies, gathered, read_once


def copied(layer: nn.Module, rows: Sequence[int]) -> nn.Module:
    """The layer, with each output a copy of one of them."""
    with torch.no_grad():
        layer.weight.copy_(layer.weight[list(rows)])  # type: ignore[operator,arg-type,index]
        layer.bias.copy_(layer.bias[list(rows)])  # type: ignore[operator,arg-type,index]
    return layer


def equal_channels(model: nn.Module) -> list[int] | None:
    """Which channel each one of a network's output equals."""
    net = Net(rmfx.trace(model.double().eval(), image()))
    last = next(iter(net.graph.find_nodes(op="output"))).all_input_nodes[0]
    found = Copies(net).of(last)
    return None if found is None else found.tolist()


def test_equal_filters_give_equal_channels() -> None:
    assert equal_channels(copied(conv(), [0, 1, 0, 1])) == [0, 1, 0, 1]
    assert equal_channels(conv()) is None
    other = copied(conv(), [0, 1, 0, 1])
    with torch.no_grad():
        other.bias[2] += 1  # type: ignore[operator,index]
    assert equal_channels(other) == [0, 1, 2, 1]


def test_filters_of_several_groups_are_equal_where_what_they_read_is() -> None:
    depthwise = copied(conv(groups=4), [0, 1, 0, 1])
    assert equal_channels(depthwise) is None
    assert equal_channels(chain(copied(conv(), [0, 1, 0, 1]), depthwise)) == [0, 1, 0, 1]
    dense = conv(4, 2)
    with torch.no_grad():
        dense.weight[1] = dense.weight[0, [2, 1, 0, 3]]  # type: ignore[operator,index]
        dense.bias[1] = dense.bias[0]  # type: ignore[operator,index]
    assert equal_channels(dense) is None
    assert equal_channels(chain(copied(conv(), [0, 1, 0, 3]), dense)) == [0, 0]


def test_activations_keep_channels_equal_that_they_treat_alike() -> None:
    slopes = nn.PReLU(4)
    with torch.no_grad():
        slopes.weight.copy_(torch.tensor([0.1, 0.2, 0.1, 0.3]))
    first = copied(conv(), [0, 1, 0, 1])
    assert equal_channels(chain(first, slopes)) == [0, 1, 0, 3]
    assert equal_channels(chain(first, nn.SiLU())) == [0, 1, 0, 1]
    assert equal_channels(chain(first, nn.BatchNorm2d(4))) is None  # nothing is known of it


def test_an_index_may_copy_channels_but_tells_nothing_of_unknown_ones() -> None:
    first = copied(conv(), [0, 1, 0, 3])
    assert equal_channels(Apply(lambda m, x: m.a(x)[:, [3, 2, 0]], a=first)) == [0, 1, 1]


@pytest.mark.parametrize("shared", [True, False])
def test_groups_that_read_the_same_channels_are_one(shared: bool) -> None:
    rows = [0, 1, 0, 1] if shared else [0, 1, 1, 0]
    model = chain(copied(conv(), rows), nn.ReLU(), conv(4, 6, groups=2)).double().eval()
    net = Net(rmfx.trace(model, image()))
    assert read_once(net) == 1
    made = net.finish()
    layer = made.get_submodule("2")
    assert isinstance(layer, nn.Conv2d)
    assert layer.groups == 1
    assert (layer.weight != 0).flatten(2).any(2).any(0).tolist() == [True, True, False, False]
    torch.testing.assert_close(made(image()), model(image()))


def test_a_layer_that_would_cost_more_stays() -> None:
    # Depthwise over copies: dense over two channels it would have twice the weights.
    model = chain(copied(conv(), [0, 1, 0, 1]), nn.ReLU(), conv(groups=4)).double().eval()
    assert read_once(Net(rmfx.trace(model, image()))) == 0


@given(st.lists(st.integers(0, 5), min_size=6, max_size=6), st.sampled_from((1, 2, 3)))
def test_what_reads_equal_channels_may_read_the_first(rows: list[int], groups: int) -> None:
    equal = torch.tensor([rows.index(row) for row in rows])
    weight = torch.randn(6, 6 // groups, 3, 3, dtype=torch.float64)
    place = ((1, 1), ((1, 1), (1, 1)), (1, 1))
    layer = AffineConv(weight, torch.randn(6, dtype=torch.float64), *place, groups)
    values: Tensor = image(2, 6, 7, 5)[:, rows]
    once = gathered(layer, equal)
    torch.testing.assert_close(once(values), layer(values))
    others = [i for i, row in enumerate(equal.tolist()) if row != i]
    assert not once.weight[:, others].any()
