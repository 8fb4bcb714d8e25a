"""Closing carries: the same numbers, the adds are back, and so is the cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import (
    Apply,
    Residual,
    assert_same,
    chain,
    conv,
    conv_bn,
    image,
    ready,
    snapshot,
    types,
)
from hypothesis import given, settings
from torch import fx, nn

import rmfx
from rmfx.testing import NetworkSpec, assert_equivalent, residual_networks

torchvision = pytest.importorskip("torchvision")

BLOCKS: dict[str, nn.Module] = {
    "basic": Residual(chain(conv_bn(4, 6), nn.ReLU(), conv_bn(6, 4))),
    "strided projection": Residual(
        chain(conv_bn(4, 6, stride=2), nn.ReLU(), conv_bn(6, 8)), conv_bn(4, 8, 1, stride=2)
    ),
    "3x3 projection that meets the border": Residual(
        chain(conv_bn(4, 6, stride=2), nn.ReLU(), conv_bn(6, 8)), conv_bn(4, 8, stride=2)
    ),
    "grouped bottleneck": Residual(
        chain(conv_bn(16, 4, 1), nn.ReLU(), conv_bn(4, 4), nn.ReLU(), conv_bn(4, 16, 1))
    ),
    "inverted residual": Residual(
        chain(
            *(conv_bn(4, 12, 1), nn.ReLU6(), conv_bn(12, 12, groups=12), nn.ReLU6()),
            conv_bn(12, 4, 1),
        )
    ),
    "depthwise first": Residual(
        chain(conv_bn(4, 4, groups=4), nn.ReLU6(), conv_bn(4, 4, 1)),
    ),
    "grouped first": Residual(chain(conv_bn(4, 6, groups=2), nn.PReLU(), conv_bn(6, 4, 1))),
    "masked": Residual(chain(conv_bn(4, 6), nn.SiLU(), conv_bn(6, 4))),
    "nested": Residual(
        chain(conv_bn(4, 4), nn.ReLU(), Residual(chain(conv_bn(4, 6), nn.ReLU(), conv_bn(6, 4))))
    ),
    "long": Residual(chain(*[chain(conv_bn(4, 4), nn.ReLU()) for _ in range(4)], conv_bn(4, 4))),
}


def closed(plain: fx.GraphModule, x: torch.Tensor) -> fx.GraphModule:
    before = snapshot(plain)
    result = rmfx.close_carries(plain, x)
    assert_same(before, snapshot(plain))
    torch.testing.assert_close(result(x), plain(x), rtol=1e-11, atol=1e-11)
    return result


@pytest.mark.parametrize("name", BLOCKS)
def test_what_was_opened_is_closed_at_the_same_cost(name: str) -> None:
    channels = 16 if "bottleneck" in name else 4
    model = ready(chain(conv_bn(3, channels), nn.ReLU(), BLOCKS[name]))
    x = image(2, 3, 9, 9)
    plain = rmfx.remove_residuals(model, x)
    assert rmfx.is_plain(plain)
    back = closed(plain, x)
    folded = rmfx.fold_batch_norm(model, x)
    costs = [rmfx.cost.count(gm, x) for gm in (folded, plain, back)]
    assert costs[1].macs > costs[0].macs
    assert (costs[2].macs, costs[2].adds) == (costs[0].macs, costs[0].adds)
    assert costs[2].parameters <= costs[0].parameters  # one bias does for two layers
    assert sorted(types(back)) == sorted(types(folded))
    again = rmfx.close_carries(back, x)
    assert types(again) == types(back)
    assert_equivalent(model, back, x)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobilenet_v3_large"])
def test_networks_come_back(name: str) -> None:
    model = ready(getattr(torchvision.models, name)())
    x = image(1, 3, 64, 64)
    back = closed(rmfx.remove_residuals(model, x), x)
    folded = rmfx.fold_batch_norm(rmfx.remove_noops(model, x), x)
    costs = [rmfx.cost.count(gm, x) for gm in (folded, back)]
    assert costs[0].adds == costs[1].adds
    assert costs[1].macs <= costs[0].macs


def test_a_selection_of_channels_stays_one() -> None:
    model = ready(
        chain(conv_bn(3, 8), nn.ReLU(), Residual(chain(conv(8, 8), nn.ReLU(), conv(8, 8))))
    )
    x = image(2, 3, 9, 9)
    plain = rmfx.remove_residuals(model, x)
    carry = {"2.branch.0": torch.arange(16.0).where(torch.arange(16) % 3 > 0, -1.0)}
    pruned, report = rmfx.prune_channels(
        plain, x, target=0.7, importance=lambda gm: carry, protect=("0.0", "2.branch.2")
    )
    assert report.macs_after < report.macs_before
    back = closed(pruned, x)
    assert rmfx.cost.count(back, x).macs < rmfx.cost.count(pruned, x).macs
    assert rmfx.cost.count(back, x).adds == 1


def test_a_carry_that_an_activation_may_change_stays() -> None:
    first, second = conv(4, 8), conv(8, 4)
    with torch.no_grad():
        first.weight[4:], first.bias[4:] = 0, 0
        for i in range(4):
            first.weight[4 + i, i, 1, 1] = 1
    x = image(1, 3, 9, 9)
    for activation, adds in ((nn.ReLU(), 0), (nn.PReLU(8), 1)):
        model = ready(chain(conv(3, 4), first, activation, second))
        if isinstance(activation, nn.PReLU):
            with torch.no_grad():
                activation.weight[4:] = 1
        assert rmfx.cost.count(closed(rmfx.trace(model), x), x).adds == adds


def test_a_sum_that_comes_back_is_not_taken_for_one_that_stayed() -> None:
    # Both are of the top level: the one that comes back would be the first of that name.
    def forward(m: Any, x: Any) -> Any:
        y = x + m.second(torch.relu(m.first(x)))
        return torch.sigmoid(y + m.last(y))

    names = ("first", "second", "last")
    model = ready(Apply(forward, **{name: conv(3, 3) for name in names}))
    x = image(2, 3, 7, 7)
    plain = rmfx.remove_residuals(model, x, policy=lambda site: site.join != "add_1")
    assert [n.name for n in plain.graph.nodes if n.target is torch.add] == ["add_1"]
    again = rmfx.close_carries(plain, x)
    assert [n.name for n in again.graph.nodes if n.target is torch.add] == ["add", "add_1"]
    assert {row.join: row.node for row in plain.meta["rmfx_report"].rows}["add_1"] == "add_1"
    assert_equivalent(plain, again, x)


def test_a_network_without_carries_is_the_same() -> None:
    model = ready(chain(conv_bn(3, 4), nn.ReLU(), conv_bn(4, 4)))
    assert types(rmfx.close_carries(model, image(1, 3, 9, 9))) == types(rmfx.trace(model))
    with pytest.raises(rmfx.ShapeError, match="example inputs"):
        rmfx.close_carries(model, None)


@settings(max_examples=15)
@given(spec=residual_networks())
def test_random_networks_keep_their_function(spec: NetworkSpec) -> None:
    model, inputs = spec.build(seed=0), spec.inputs(seed=0)
    plain = rmfx.remove_residuals(model, inputs)
    assert_equivalent(plain, rmfx.close_carries(plain, inputs), inputs)


def test_slopes_of_tokens_are_not_those_of_features() -> None:
    # Both are four: PReLU's slopes belong to dimension 1, the carry to the last one.
    slopes = nn.PReLU(4)
    first, second = nn.Linear(4, 4), nn.Linear(4, 3)
    model = ready(chain(nn.Linear(2, 4), first, slopes, second))
    with torch.no_grad():
        slopes.weight.copy_(torch.tensor([0.5, 0.5, 1.0, 1.0]))
    x = image(3, 4, 2)
    assert rmfx.cost.count(closed(rmfx.trace(model), x), x).adds == 0


def test_a_value_that_a_product_repeats_over_space_is_not_carried() -> None:
    def forward(m: Any, x: Any) -> Any:
        y = m.start(x)
        return m.end(m.first(y.mean((2, 3), keepdim=True)) * m.gate(y))

    ones, first = conv(4, 6), conv(4, 6, 1)
    with torch.no_grad():
        ones.weight[:5], ones.bias[:5], first.bias[:] = 0, 1, 0
    layers = {"start": conv(3, 4), "first": first, "end": conv(6, 4), "gate": ones}
    model = ready(Apply(forward, **layers))
    x = image(2, 3, 9, 9)
    closed(rmfx.trace(model), x)
