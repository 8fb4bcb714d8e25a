"""Dimensions and channels of values, with and without shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, chain, conv, image, ready
from torch import Tensor, fx, nn

import rmfx
from rmfx.ir.facts import facts_of
from rmfx.ir.net import Net

Forward = Callable[[Any, Tensor], Any]


def parts() -> dict[str, Any]:
    return {
        "conv": conv(4, 6),
        "one": conv(4, 1),
        "conv1": nn.Conv1d(4, 6, 1),
        "conv3": nn.Conv3d(4, 6, 1),
        "wide": nn.Linear(7, 5),
        "linear": nn.Linear(4, 5),
        "bn": nn.BatchNorm2d(4),
        "c": nn.Parameter(torch.rand(4, 1, 1)),
    }


def result(forward: Forward, x: Tensor | None) -> tuple[Net, fx.Node]:
    net = Net(rmfx.trace(Apply(forward, **parts()).double().eval(), x))
    return net, next(n for n in net.graph.nodes if n.op == "output").all_input_nodes[0]


@pytest.mark.parametrize(
    ("forward", "rank", "channels"),
    [
        (lambda m, x: m.conv(x), 4, 6),
        (lambda m, x: m.bn(x), 4, 4),
        (lambda m, x: F.relu(m.conv(x)), 4, 6),
        (lambda m, x: F.max_pool2d(F.dropout(m.conv(x), 0.1, False), 2), 4, 6),
        (lambda m, x: F.adaptive_avg_pool2d(m.conv(x), 1), 4, 6),
        (lambda m, x: m.conv(x) + m.conv(x), 4, 6),
        (lambda m, x: F.relu(m.conv(x)) - m.conv(x), 4, 6),
        (lambda m, x: m.conv1(x), 3, 6),
        (lambda m, x: m.conv3(x), 5, 6),
        (lambda m, x: torch.flatten(m.conv(x), 1), 2, None),
        (lambda m, x: torch.softmax(m.conv(x), 1), None, None),
    ],
)
def test_layers_tell_dimensions_and_channels(
    forward: Forward, rank: int | None, channels: int | None
) -> None:
    net, node = result(forward, None)
    assert net.rank(node) == rank
    assert net.channels(node, (rank or 2) - 2) == channels


def test_the_first_layer_tells_about_the_input() -> None:
    net, _ = result(lambda m, x: m.conv(x), None)
    x = next(iter(net.graph.nodes))
    assert (net.rank(x), net.channels(x, 2)) == (4, 4)


@pytest.mark.parametrize(
    "join",
    [
        torch.mul,
        torch.div,
        torch.maximum,
        torch.minimum,
        lambda a, b: torch.where(a > 0, a, b),
        lambda a, b: torch.where(a.le(0.5), b, a),
    ],
    ids=["mul", "div", "maximum", "minimum", "where", "where by method"],
)
def test_what_combines_alike_values_keeps_what_is_known_of_them(join: Any) -> None:
    model = ready(Apply(lambda m, x: join(m.a(x), m.b(x)), a=conv(), b=conv()))
    net = Net(rmfx.trace(model))
    node = net.graph.output_node().all_input_nodes[0]
    assert (net.rank(node), net.channels(node, 2)) == (4, 4)


@pytest.mark.parametrize(
    "join", [torch.mul, torch.maximum, lambda a, b: torch.maximum(-a, 2 * b) * b]
)
def test_the_number_of_dimensions_behind_a_join_is_known_where_calls_are_read(join: Any) -> None:
    def forward(m: Any, x: Any) -> Any:
        y = join(m.a(x), m.b(x))
        return m.c(y.view(y.size(0), -1)) * y.dim()

    model = ready(Apply(forward, a=conv(), b=conv(), c=nn.Linear(4 * 6 * 6, 3)))
    gm = rmfx.trace(model)
    assert any(isinstance(m, nn.Flatten) for m in gm.modules())
    assert not any(n.target == "dim" for n in gm.graph.nodes)
    torch.testing.assert_close(gm(image(2, 4, 6, 6)), model(image(2, 4, 6, 6)))


def test_the_first_operand_does_not_tell_the_number_of_dimensions_of_a_product() -> None:
    def forward(m: Any, x: Any) -> Any:
        y = m.a(x)
        z = torch.flatten(y, 1) * y
        return z * z.dim()

    model = ready(Apply(forward, a=conv(4, 1)))
    gm = rmfx.trace(model)
    assert any(n.target == "dim" for n in gm.graph.nodes)
    x = image(3, 4, 1, 3)
    torch.testing.assert_close(gm(x), model(x))


def test_layers_fix_numbers_and_channels_behind_slices_paddings_and_zeros() -> None:
    def forward(m: Any, x: Any) -> Any:
        y = m.conv(x)
        y = F.pad(y[:, 1:], (1, 1, 0, 0, 0, y.size(1) - x.shape[1:][0]))
        return torch.zeros_like(y).clone() + y.new_zeros(y.size(0), y.size(1), 1, 1)

    net, node = result(forward, None)
    assert (net.rank(node), net.channels(node, 2)) == (4, 7)


def test_a_size_that_inputs_change_is_not_fixed() -> None:
    gm = rmfx.trace(ready(chain(conv(4, 6))), image(2, 4, 6, 6))
    facts, node = facts_of(gm), gm.graph.output_node().all_input_nodes[0]
    assert [facts.size(node, dim) for dim in range(4)] == [None, 6, None, None]


@pytest.mark.parametrize(
    "join", [lambda y, c: torch.where(y > 0, y, c), lambda y, c: torch.where(y > c, y, 0.0)]
)
def test_a_constant_that_adds_a_dimension_is_not_looked_past(join: Any) -> None:
    def forward(m: Any, x: Any) -> Any:
        return join(m.a(x), m.c)

    model = Apply(forward, a=conv())
    model.register_buffer("c", torch.ones(2, 1, 4, 1, 1))
    net = Net(rmfx.trace(ready(model)))
    assert net.rank(net.graph.output_node().all_input_nodes[0]) is None


def test_features_have_no_known_rank() -> None:
    net, node = result(lambda m, x: m.linear(x), None)
    assert (net.rank(node), net.channels(node, 0)) == (None, 5)


@pytest.mark.parametrize("features", [3, 5])
def test_batch_norm_behind_features_names_no_others(features: int) -> None:
    """BatchNorm1d takes tokens for channels where the features come in tokens."""
    model = ready(chain(nn.Linear(4, 5), nn.BatchNorm1d(features)))
    net = Net(rmfx.trace(model))
    node = net.graph.output_node().all_input_nodes[0]
    assert net.channels(node, 0) in (None, model(image(2, features, 4)).shape[-1])


def test_sums_of_features_keep_them() -> None:
    net, node = result(lambda m, x: 2 * m.linear(x) + m.linear(x), None)
    assert (net.rank(node), net.channels(node, 0), net.channels(node, 1)) == (None, 5, None)


def test_shapes_tell_more() -> None:
    x = image(2, 3, 4)
    net, node = result(lambda m, x: torch.softmax(m.linear(x), 1), x)
    assert (net.rank(node), net.channels(node, 0), net.channels(node, 1)) == (3, 5, 3)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.one(x) + m.conv(x),
        lambda m, x: m.conv(x) - m.one(x),
        lambda m, x: m.wide(m.conv(x)),
    ],
    ids=["broadcast first", "broadcast second", "linear on the width"],
)
def test_wrong_channels_are_never_claimed(forward: Forward) -> None:
    net, node = result(forward, None)
    truth = net.source(image()).shape[1]
    assert net.channels(node, 2) in (None, truth)
    model = Apply(lambda m, x: (y := forward(m, x)) + 0.5 * F.relu(y), **parts()).double().eval()
    for inputs in (None, image()):
        gm = rmfx.remove_residuals(model, inputs)
        torch.testing.assert_close(gm(image()), model(image()))


def test_types_come_from_shapes_or_weights() -> None:
    for inputs in (None, image()):
        net, node = result(lambda m, x: F.relu(m.conv(x)), inputs)
        assert net.dtype(node) == (torch.float64, torch.device("cpu"))
    net, node = result(lambda m, x: F.relu(x), None)
    assert net.dtype(node) is None


def test_long_graphs_are_walked_once() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        x = m.conv(x)
        for _ in range(1500):
            x = F.relu(x)
        return x

    net, node = result(forward, None)
    assert (net.rank(node), net.channels(node, 2)) == (4, 6)
