"""Columns of order: channels come to stand where the next layer reads them."""

from __future__ import annotations

import pytest
import torch
from builders import Residual, conv_branch, image, ready
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rmfx
from rmfx.algebra.laws import in_turn
from rmfx.ir.net import Net
from rmfx.removal.column import Spot
from rmfx.removal.order import Order, Ordered
from rmfx.removal.site import find_sites


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_a_shuffle_is_that_of_torch_in_each_block(blocks: int, groups: int, each: int) -> None:
    x = torch.randn(2, blocks * groups * each, 3, 3)
    order = Order.shuffle(x.shape[1], groups=groups, blocks=blocks)
    shuffled = torch.cat([nn.ChannelShuffle(groups)(part) for part in x.chunk(blocks, 1)], 1)
    assert order.rows is not None
    assert torch.equal(x[:, list(order.rows)], shuffled)
    assert order.channels_behind(x.shape[1], 2) == x.shape[1]


def test_an_order_may_take_some_channels_or_all_as_they_are() -> None:
    assert Order((3, 1, 1)).channels_behind(4, 2) == 3
    assert Order().channels_behind(4, 2) == 4
    assert Ordered(Order()).stays
    assert not Ordered(Order()).between((1, 2)).stays
    assert Ordered(Order()).between((2, 2)).stays
    assert not Ordered(Order((0, 1))).between((2, 2)).stays
    assert Ordered(Order((3, 1, 1))).widths_behind((4, 6), 2) == (3, 6)


@pytest.mark.parametrize("rows", [None, (2, 0, 3, 1), (3, 3, 0, 1, 2, 0)], ids=str)
@pytest.mark.parametrize("runs", [(1, 1), (1, 2), (2, 1), (4, 2)], ids=str)
def test_both_blocks_stand_in_their_new_runs(
    rows: tuple[int, ...] | None, runs: tuple[int, int]
) -> None:
    """The value before it is [main; carry] in some runs: channels know their own number."""
    net = Net(rmfx.trace(ready(Residual(conv_branch(channels=12))), image(1, 12, 5, 5)))
    join = next(node for node in net.graph.nodes if node.target is torch.add)
    sites = find_sites(net, join, keep_norms=False)
    assert isinstance(sites, list)
    (x,) = net.graph.find_nodes(op="placeholder")
    column = Ordered(Order(rows)).between(runs)
    with net.graph.inserting_after(x):
        made = column.put(Spot(net, sites[0], x, (4, 8), ("", x), {}, None))
    join.replace_all_uses_with(made)
    taken = list(range(4) if rows is None else rows)
    value = image(1, 12, 5, 5)
    main, carry = value[0, :4], value[0, 4:]
    stands: Tensor = in_turn([main, carry], runs[0]).unsqueeze(0)
    expected = in_turn([main[taken], carry], runs[1]).unsqueeze(0)
    assert torch.equal(net.finish()(stands), expected)
