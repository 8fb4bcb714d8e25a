"""Carries: which channels of a value were handed on, from where, and times what."""

from __future__ import annotations

from typing import Any

import torch
from builders import chain, conv, image, ready
from torch import Tensor, nn

import rmfx
from rmfx.algebra.affine import AffineConv
from rmfx.algebra.modules import from_conv
from rmfx.ir.net import Net
from rmfx.rules.carries import Carry, Origins, hands_on, trimmed

Tap = tuple[int, int, int, float]  # an input, row and column of the kernel, a weight


def handing_on(outputs: int, taps: dict[int, Tap], *, alone: bool = True) -> nn.Conv2d:
    """A 3x3 layer of 4 inputs, of which some outputs have one tap, and those inputs alone."""
    layer = nn.Conv2d(4, outputs, 3, padding=1)
    with torch.no_grad():
        if alone:
            layer.weight[:, [column for column, *_ in taps.values()]] = 0
        for row, (column, i, j, weight) in taps.items():
            layer.weight[row] = 0
            layer.weight[row, column, i, j] = weight
            assert layer.bias is not None
            layer.bias[row] = 0
    return layer


def carries_of(model: nn.Module) -> tuple[Tensor, list[Carry]]:
    """The value before the last layer, and the carries in it, but for those that begin there."""
    net = Net(rmfx.trace(model, image()))
    *_, before, last, _ = net.graph.nodes
    found = Origins(net, None).of(before)
    begins = next(node for node in net.graph.nodes if node.op == "call_module")
    value = chain(*list(model.children())[:-1])(image())
    assert last.op == "call_module"
    return value, [c for c in found if c.source is begins.all_input_nodes[0]]


def test_what_is_handed_on_is_a_filter_of_the_source_somewhere() -> None:
    first, span = conv(), handing_on(6, {1: (2, 1, 1, 1.0), 4: (0, 1, 1, -2.0)})
    value, (carry,) = carries_of(ready(chain(first, span, conv(6, 4))))
    assert carry.rows.tolist() == [-1, 2, -1, -1, 0, -1]
    made = first(image())
    for channel in (1, 4):
        own = carry.factors[channel] * made[:, [int(carry.rows[channel])]]
        torch.testing.assert_close(value[:, [channel]], carry.way(own))


def test_a_channel_that_the_main_block_reads_too_begins_a_carry_of_its_own() -> None:
    taps = {row: (row, 1, 1, 1.0) for row in (0, 1, 2)}
    span = handing_on(4, taps, alone=False)  # its last output reads all
    _, carries = carries_of(ready(chain(conv(), span, conv())))
    assert carries == []


def test_a_tap_that_reads_the_border_hands_nothing_on() -> None:
    span = handing_on(4, {row: (row, 0, 1, 1.0) for row in range(4)})
    assert carries_of(ready(chain(conv(), span, conv())))[1] == []


def test_an_activation_hands_on_what_it_provably_leaves_alone() -> None:
    span = handing_on(4, {row: (row, 1, 1, 1.0) for row in range(4)})
    _, carries = carries_of(ready(chain(conv(), nn.ReLU(), span, conv())))
    assert carries == []
    first: Any = conv()
    with torch.no_grad():
        first.weight[:2] = 0
        first.bias[:2] = 1.0  # constants above 0
    _, (carry,) = carries_of(ready(chain(first, nn.ReLU(), span, conv())))
    assert carry.rows.tolist() == [0, 1, -1, -1]


def test_outputs_of_one_weight_and_no_bias_hand_on() -> None:
    layer = from_conv(handing_on(3, {0: (1, 0, 2, 3.0), 2: (0, 1, 1, 1.0)}))
    assert isinstance(layer, AffineConv)
    assert hands_on(layer).tolist() == [True, False, True]


def test_edges_of_zeros_are_trimmed() -> None:
    layer = from_conv(handing_on(2, {0: (1, 0, 2, 3.0), 1: (0, 1, 2, 1.0)}).double())
    assert isinstance(layer, AffineConv)
    small = trimmed(layer)
    assert small.kernel == (2, 1)
    torch.testing.assert_close(small(image()), layer(image()))
