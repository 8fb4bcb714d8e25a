"""Channels in another order, or some of them several times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import (
    assert_all_gone,
    assert_refused,
    basic_branch,
    chain,
    conv,
    conv_bn,
    image,
    ready,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import rmfx
from rmfx.ir.net import Net
from rmfx.ir.selections import may_select, selection
from rmfx.testing import assert_equivalent

Form = Callable[[Tensor], Tensor]


class Call(nn.Module):
    def __init__(self, function: Form) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Block(nn.Module):
    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


class Chosen(nn.Module):
    def __init__(self, method: str) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([3, 1, 1, 0]))
        self.method = method

    def forward(self, x: Tensor) -> Any:
        return x[:, self.order] if self.method == "index" else x.index_select(1, self.order)  # type: ignore[index, arg-type]


SHORTCUTS: dict[str, Form] = {
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "tile": lambda x: torch.tile(x, (1, 2, 1, 1)),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "concatenation": lambda x: torch.cat((x, x), 1),
    "flip": lambda x: x.flip(1).repeat(1, 2, 1, 1),
    "roll": lambda x: torch.roll(x, 1, 1).repeat(1, 2, 1, 1),
    "list": lambda x: x[:, [0, 2, 1, 3, 3, 3, 1, 0]],
    "shuffle": lambda x: F.channel_shuffle(torch.cat([x, x], 1), 2),
}


@pytest.mark.parametrize("name", SHORTCUTS)
def test_a_shortcut_of_chosen_channels_is_removed(name: str) -> None:
    block = Block(basic_branch(4, 8), Call(SHORTCUTS[name]))
    model, x = ready(chain(conv(3, 4), nn.ReLU(), block, conv(8, 2))), image(2, 3, 8, 8)
    gm = rmfx.remove_residuals(model, x)
    assert_all_gone(model, gm, (x,), 1, None)
    assert rmfx.is_plain(gm)
    exported = rmfx.remove_residuals(torch.export.export(model, (x,)))
    assert_equivalent(model, exported, x)


@pytest.mark.parametrize("method", ["index", "index_select"])
def test_an_order_in_a_buffer(method: str) -> None:
    model, x = (
        ready(chain(conv(3, 4), Block(basic_branch(4, 4), Chosen(method)))),
        image(2, 3, 8, 8),
    )
    assert_all_gone(model, rmfx.remove_residuals(model, x), (x,), 1, None)
    exported = rmfx.remove_residuals(torch.export.export(model, (x,)))
    assert_all_gone(model, exported, (x,), 1, None)


@pytest.mark.parametrize("shuffle", [nn.ChannelShuffle(2), Call(lambda x: F.channel_shuffle(x, 4))])
def test_a_shuffle_within_a_branch(shuffle: nn.Module) -> None:
    branch = chain(
        conv_bn(8, 8, 1, groups=2), nn.ReLU(), shuffle, conv_bn(8, 8, groups=8), conv(8, 8, 1)
    )
    model, x = ready(chain(conv(3, 8), nn.ReLU(), Block(branch))), image(2, 3, 8, 8)
    gm = rmfx.remove_residuals(model, x)
    assert_all_gone(model, gm, (x,), 1, None)
    other = image(3, 3, 5, 9)
    torch.testing.assert_close(gm(other), model(other), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.flip(2),
        lambda x: x.flip((1, 3)),
        lambda x: x.roll(1),
        lambda x: x.roll((1, 1), (1, 2)),
        lambda x: x.repeat(2, 1, 1, 1)[:2],
    ],
)
def test_what_moves_more_than_channels_is_refused(function: Form) -> None:
    model, x = ready(chain(conv(3, 4), Block(conv(4, 4), Call(function)))), image(2, 3, 8, 8)
    gm = rmfx.remove_residuals(model, x)
    assert rmfx.report(gm).removed == 0
    assert_equivalent(model, gm, x)


class Read(nn.Module):
    """A constant of the model and a function that reads it."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.value)  # type: ignore[arg-type]


ALONG_OTHERS: dict[str, Form] = {
    "as many rows as a small probe has": lambda x: torch.roll(x, 3, 2),
    "as many columns": lambda x: torch.roll(x, 4, 3),
    "as many samples": lambda x: torch.roll(x, 2, 0),
    "many rows": lambda x: torch.roll(x, 60, -2),
    "more rows than any probe has": lambda x: x.roll(10**6 + 1, 2),
    "channels and rows": lambda x: x.roll((1, 3), (1, 2)),
    "all in a row": lambda x: x.roll(12),
    "columns": lambda x: torch.flip(x, dims=(-1,)),
    "samples in a list": lambda x: x[[1, 0]],
    "rows in a list": lambda x: x[:, :, [1, 0, 2, 3, 4, 5, 6, 7, 8]],
    "columns behind an ellipsis": lambda x: x[..., [1, 0, 2, 3, 4, 5, 6, 7]],
    "rows in turn": lambda x: x.repeat_interleave(2, 2)[:, :, :9],
    "samples again": lambda x: x.repeat(2, 1, 1, 1)[:2],
}


@pytest.mark.parametrize("name", ALONG_OTHERS)
@pytest.mark.parametrize("verb", [rmfx.remove_residuals, rmfx.merge_branches])
def test_what_moves_along_other_dimensions_is_refused(name: str, verb: Any) -> None:
    model = ready(chain(conv(3, 4), Block(conv(4, 4, 1), Call(ALONG_OTHERS[name]))))
    x = image(2, 3, 9, 8)
    gm = verb(model, x)
    assert rmfx.report(gm).removed == 0
    assert torch.equal(gm(x), model(x))
    exported = verb(torch.export.export(model, (x,)))
    assert rmfx.report(exported).removed == 0
    assert torch.equal(exported(x), model(x))


@pytest.mark.parametrize(("dim", "size"), [(0, 2), (2, 3), (3, 4)])
def test_an_index_along_another_dimension_is_refused(dim: int, size: int) -> None:
    order = torch.arange(size)  # the identity, at this size
    model = ready(
        chain(conv(3, 4), Block(conv(4, 4), Read(lambda x, i: x.index_select(dim, i), order)))
    )
    x = image(2, 3, 3, 4)
    gm = rmfx.remove_residuals(model, x)
    assert rmfx.report(gm).removed == 0
    assert torch.equal(gm(x), model(x))


def test_a_constant_beside_channels_is_none_of_them() -> None:
    beside = Read(lambda x, c: torch.cat((x, c), 1), torch.zeros(1, 4, 1, 1))
    model = ready(chain(conv(3, 4), Block(conv(4, 8, 1), beside)))
    x = image(1, 3, 1, 1)  # where a constant of one pixel fits
    assert_equivalent(model, rmfx.remove_residuals(model, x), x)


def test_only_one_channel_along_other_dimensions() -> None:
    model = ready(chain(conv(3, 1), Block(conv(1, 1), Call(lambda x: x.roll(3, 2)))))
    gm = rmfx.remove_residuals(model, image(2, 3, 6, 4))
    assert rmfx.report(gm).removed == 0
    assert_equivalent(model, gm, image(2, 3, 6, 4))


ALONG_CHANNELS: dict[str, Form] = {
    "further than there are": lambda x: x.roll(10**6 + 1, 1),
    "backwards": lambda x: torch.roll(x, -3, dims=-3),
    "nowhere along rows": lambda x: x.roll((1, 0), (1, 2)),
    "there and back along rows": lambda x: x.roll((1, 5, -5), (1, 2, 2)),
    "counted from behind": lambda x: torch.flip(x, dims=[-3]),
    "fewer than all dimensions": lambda x: x.tile((2, 1, 1))[:, :4],
    "behind an ellipsis": lambda x: x[..., [3, 1, 0, 2], :, :],
    "whole slices": lambda x: x[:, [3, 1, 0, 2], 0:, :],
    "in turn": lambda x: torch.repeat_interleave(x, 2, dim=-3)[:, 2:6],
    "once": lambda x: x.repeat_interleave(1, 2).flip(1),
}


@pytest.mark.parametrize("name", ALONG_CHANNELS)
def test_what_moves_along_channels_is_removed(name: str) -> None:
    model = ready(chain(conv(3, 4), Block(conv(4, 4), Call(ALONG_CHANNELS[name])), conv(4, 2)))
    gm = rmfx.remove_residuals(model, image(2, 3, 9, 8))
    assert_all_gone(model, gm, (image(2, 3, 9, 8),), 1, None)
    assert_equivalent(model, gm, image(3, 3, 5, 4))


@pytest.mark.parametrize("form", [lambda x: x.flip(-1), lambda x: x[..., [3, 1, 0, 2]]])
def test_features_of_tokens_in_another_order(form: Form) -> None:
    model = ready(chain(nn.Linear(3, 4), Block(nn.Linear(4, 4), Call(form)), nn.Linear(4, 2)))
    gm = rmfx.remove_residuals(model, image(2, 5, 3))
    assert_all_gone(model, gm, (image(2, 5, 3),), 1, None)
    assert_equivalent(model, gm, image(3, 7, 3))


def test_tokens_in_another_order_are_refused() -> None:
    model = ready(
        chain(nn.Linear(4, 4), Block(nn.Linear(4, 4), Call(lambda x: x.flip(1))), nn.Linear(4, 2))
    )
    for gm in (rmfx.remove_residuals(model), rmfx.remove_residuals(model, image(2, 5, 4))):
        assert rmfx.report(gm).removed == 0
        assert_equivalent(model, gm, image(2, 5, 4))
    features = rmfx.remove_residuals(model, image(2, 4))  # where dimension 1 holds them
    assert_all_gone(model, features, (image(2, 4),), 1, None)


def test_the_reason_is_that_of_before() -> None:
    model = ready(chain(conv(3, 4), Block(conv(4, 4), Call(lambda x: x.flip(2)))))
    assert_refused(model, image(2, 3, 8, 8), reason="flip rearranges values", example=True)


def test_a_shuffle_is_not_merged_into_a_grouped_layer() -> None:
    model = ready(chain(conv(8, 8, 1, groups=4), nn.ChannelShuffle(4), conv(8, 8, 1, groups=4)))
    x = image(2, 8, 8, 8)
    merged = rmfx.merge_convs(model, x)
    assert rmfx.cost.count(merged, x).macs <= rmfx.cost.count(model, x).macs
    assert_equivalent(model, merged, x)


@given(order=st.lists(st.integers(0, 4), min_size=1, max_size=7), dims=st.integers(0, 3))
def test_what_is_selected(order: list[int], dims: int) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["shape"] = (2, 5, *[4] * dims)
    node = graph.call_function(torch.ops.aten.index_select.default, (x, 1, graph.get_attr("order")))
    graph.output(node)
    root = nn.Module()
    root.register_buffer("order", torch.tensor(order))
    net = Net(fx.GraphModule(root, graph))
    found = next(n for n in net.graph.nodes if may_select(net, n))
    layer = selection(net, found, 5, dims)
    value = image(2, 5, *[4] * dims)
    assert layer is not None
    assert torch.equal(layer.in_float64()(value), value[:, order])
