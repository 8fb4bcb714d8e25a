"""What a node means to the algebra, and why some nodes mean nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, conv, image
from torch import Tensor, fx, nn

import rmfx
from rmfx.algebra.activation import Activation
from rmfx.algebra.affine import AffineConv
from rmfx.errors import Refusal
from rmfx.ir.joins import operands, read_join
from rmfx.ir.net import Net
from rmfx.ir.nodes import input_of
from rmfx.ir.reading import read, read_affine

Forward = Callable[[Any, Tensor], Any]


def last_node(forward: Forward, x: Tensor | None, **parts: Any) -> tuple[Net, fx.Node]:
    """The net of a function and the node of its result."""
    parts.setdefault("c", nn.Parameter(torch.rand(4, 1, 1) + 0.5))
    parts.setdefault("many", nn.Parameter(torch.rand(2, 4, 1, 1)))
    net = Net(rmfx.trace(Apply(forward, **parts).double().eval(), x))
    output = next(n for n in net.graph.nodes if n.op == "output")
    return net, output.all_input_nodes[0]


def norm(kind: type[nn.Module] = nn.BatchNorm2d, **options: Any) -> nn.Module:
    bn = kind(4, **options)
    for value in (bn.weight, bn.bias, bn.running_mean):
        if value is not None:
            nn.init.normal_(value)
    return bn


LINEAR: list[Forward] = [
    lambda m, x: 2 * x,
    lambda m, x: x * -0.5,
    lambda m, x: x / 4,
    lambda m, x: -x,
    lambda m, x: x * m.c,
    lambda m, x: m.c * x,
    lambda m, x: torch.mul(x, other=m.c),
    lambda m, x: x / m.c,
    lambda m, x: x + 1,
    lambda m, x: 3 - x,
    lambda m, x: x - m.c,
    lambda m, x: m.c - x,
    lambda m, x: torch.add(x, m.c, alpha=2),
    lambda m, x: torch.sub(m.c, x, alpha=2),
    lambda m, x: x[:, :, ::2, 1::3],
    lambda m, x: x[:, :, 1:-2],
    lambda m, x: x[..., 2:-1],
    lambda m, x: x[:, 1:3],
    lambda m, x: x[:, ::2, 1:],
    lambda m, x: x[:, -1:],
    lambda m, x: F.pad(x, (1, 2)),
    lambda m, x: F.pad(x, (1, -2, -1, 0)),
    lambda m, x: F.pad(x, pad=(0, 0, 0, 0, 1, 2)),
    lambda m, x: F.pad(x, (1, 0, 0, 0, -1, 1), "constant", 0.0),
    lambda m, x: F.avg_pool2d(x, 3, 2, 1),
    lambda m, x: F.avg_pool2d(x, (2, 3), divisor_override=5),
    lambda m, x: F.conv2d(x, m.w, stride=2),
    lambda m, x: x.contiguous(),
]


@pytest.mark.parametrize("forward", LINEAR)
def test_linear_nodes_are_read_as_what_they_compute(forward: Forward) -> None:
    net, node = last_node(forward, image(), w=nn.Parameter(torch.randn(5, 4, 2, 2)))
    layer = read_affine(net, node)
    assert isinstance(layer, AffineConv), layer
    torch.testing.assert_close(layer(image()), net.source(image()).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv1d(4, 2, 3, padding=1), (2, 4, 7)),
        (nn.Conv2d(4, 2, 3, stride=2), (2, 4, 7, 6)),
        (nn.Conv3d(4, 2, 2, groups=2), (2, 4, 3, 4, 5)),
        (nn.Linear(4, 3), (2, 4)),
        (nn.Linear(4, 3), (2, 5, 4)),
        (norm(), (2, 4, 5, 5)),
        (norm(nn.BatchNorm2d, affine=False), (2, 4, 5, 5)),
        (norm(nn.BatchNorm1d), (2, 4, 5)),
        (norm(nn.BatchNorm1d), (2, 4)),
        (norm(nn.BatchNorm3d), (2, 4, 2, 3, 4)),
        (nn.AvgPool1d(3, 2), (2, 4, 8)),
        (nn.AvgPool2d(2), (2, 4, 8, 7)),
        (nn.AvgPool3d(2, 1, 1), (2, 4, 3, 4, 5)),
        (nn.ZeroPad2d((1, 0, 2, -1)), (2, 4, 8, 7)),
        (nn.ConstantPad1d((1, 2), 0.0), (2, 4, 8)),
    ],
    ids=repr,
)
def test_linear_modules_are_read_as_what_they_compute(
    module: nn.Module, shape: tuple[int, ...]
) -> None:
    x = image(*shape)
    net, node = last_node(lambda m, x: m.layer(x), x, layer=module)
    layer = read_affine(net, node)
    if isinstance(module, nn.Linear) or len(shape) == 2:
        layer = read(net, node) if isinstance(module, nn.Linear) else layer
    assert isinstance(layer, AffineConv), layer
    torch.testing.assert_close(layer(x), net.source(x).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: x * m.many, "sample to sample"),
        (lambda m, x: x * torch.sigmoid(x), "both depend on the input"),
        (lambda m, x: m.c / x, "division by a tensor"),
        (lambda m, x: x * x.shape[0], "neither a number nor a real tensor"),
        (lambda m, x: x * float("inf"), "not finite"),
        (lambda m, x: x / 0, "not finite"),
        (lambda m, x: x * m.wide, "one number per channel"),
        (lambda m, x: x + m.whole, "one number per channel"),
        (lambda m, x: torch.div(x, 2, rounding_mode="floor"), "not linear"),
        (lambda m, x: x[1:, :], "slice of the batch"),
        (lambda m, x: x[:, :, :3], "depends on the input size"),
        (lambda m, x: x[:, :, -3:], "depends on the input size"),
        (lambda m, x: x[:, 0], "not made of slices"),
        (lambda m, x: x[:, 4:], "without channels"),
        (lambda m, x: x[:, :, : x.shape[0]], "run time"),
        (lambda m, x: F.pad(x, (1, 1), value=1.0), "not linear"),
        (lambda m, x: F.pad(x, (1, 1, 0, 0), mode="reflect"), "not linear"),
        (lambda m, x: F.pad(x, (x.shape[0], 1)), "not constant"),
        (lambda m, x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0)), "beyond the channels"),
        (lambda m, x: F.pad(x, (0, 0, 0, 0, 0, -4)), "removes every channel"),
        (lambda m, x: torch.softmax(x, 1), "softmax"),
        (lambda m, x: x.mean(1), "mean"),
        (lambda m, x: x.cumsum(2), "cumsum"),
        (lambda m, x: x, "the network's input"),
        (lambda m, x: m.pad(x), "not linear"),
        (lambda m, x: m.layer_norm(x), "LayerNorm"),
        (lambda m, x: m.no_statistics(x), "running statistics"),
        (lambda m, x: m.ceil(x), "ceil_mode"),
        (lambda m, x: m.transposed(x), "ConvTranspose2d"),
        (lambda m, x: F.relu(x), "not linear"),
    ],
)
def test_what_is_not_linear_is_refused(forward: Forward, reason: str) -> None:
    parts = {
        "wide": nn.Parameter(torch.rand(7)),
        "whole": nn.Parameter(torch.rand(4, 9, 7)),
        "pad": nn.ConstantPad2d(1, 1.0),
        "layer_norm": nn.LayerNorm(7),
        "no_statistics": nn.BatchNorm2d(4, track_running_stats=False),
        "ceil": nn.AvgPool2d(2, 2, ceil_mode=True),
        "transposed": nn.ConvTranspose2d(4, 4, 2, 2),
    }
    net, node = last_node(forward, image(), **parts)
    found = read_affine(net, node)
    assert isinstance(found, Refusal), found
    assert reason in found.reason
    assert found.nodes == (node.name,)


def test_without_shapes_a_scale_of_the_input_is_refused() -> None:
    found = read_affine(*last_node(lambda m, x: 2 * x, None))
    assert isinstance(found, Refusal)
    assert "example_inputs" in found.reason


def test_batch_norm_of_tokens_is_refused_among_linear_layers() -> None:
    x = image(2, 4, 4)
    net, node = last_node(lambda m, x: m.bn(x), x, bn=norm(nn.BatchNorm1d))
    found = read(net, node)
    assert not isinstance(found, (Refusal, AffineConv, Activation))
    built = found.build(4, 0)  # type: ignore[union-attr]
    assert isinstance(built, Refusal)
    assert "dimension 1" in built.reason


def test_activations_are_read_as_activations() -> None:
    net, node = last_node(lambda m, x: F.silu(x), image())
    found = read(net, node)
    assert isinstance(found, Activation)
    assert isinstance(found.module, nn.SiLU)


def test_a_shared_activation_is_still_read() -> None:
    net, node = last_node(lambda m, x: m.act(m.act(x)), image(), act=nn.PReLU())
    assert isinstance(read(net, node), Activation)


@pytest.mark.parametrize("name", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("module", [nn.ReLU(), nn.Conv2d(4, 4, 1), nn.AvgPool2d(1)], ids=repr)
def test_a_hooked_layer_is_not_read(module: nn.Module, name: str) -> None:
    handle = getattr(module, name)(lambda *args: None)
    net, node = last_node(lambda m, x: m.layer(x), image(), layer=module)
    found = read(net, node)
    assert isinstance(found, Refusal)
    assert "hooks" in found.reason
    handle.remove()
    net, node = last_node(lambda m, x: m.layer(x), image(), layer=module)
    assert not isinstance(read(net, node), Refusal)


# ---- joins --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forward", "factors"),
    [
        (lambda m, x: m.a(x) + x, (1, 1)),
        (lambda m, x: m.a(x) - x, (1, -1)),
        (lambda m, x: torch.add(m.a(x), x, alpha=3), (1, 3)),
        (lambda m, x: m.a(x).sub(x, alpha=0.5), (1, -0.5)),
        (lambda m, x: torch.add(m.a(x), other=x), (1, 1)),
    ],
)
def test_joins_have_two_operands_with_factors(
    forward: Forward, factors: tuple[float, float]
) -> None:
    _, node = last_node(forward, image(), a=conv())
    terms = read_join(node)
    assert isinstance(terms, tuple)
    assert [n.name for n, _ in terms] == ["a", "x"]
    assert tuple(c for _, c in terms) == factors
    assert not isinstance(operands(node), Refusal)
    assert input_of(node) is None


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: x + 1,
        lambda m, x: x + m.c,
        lambda m, x: x + x.shape[0],
        lambda m, x: x * x,
        lambda m, x: torch.cat([x, x]),
    ],
)
def test_other_nodes_join_nothing(forward: Forward) -> None:
    _, node = last_node(forward, image())
    assert read_join(node) is None


def test_an_alpha_that_is_computed_is_refused() -> None:
    _, node = last_node(lambda m, x: torch.add(m.a(x), x, alpha=x.shape[0]), None, a=conv())
    found = read_join(node)
    assert isinstance(found, Refusal)
    assert "alpha" in found.reason


def test_a_value_added_to_itself_is_a_join() -> None:
    _, node = last_node(lambda m, x: x + x, image())
    terms = read_join(node)
    assert isinstance(terms, tuple)
    assert [n.name for n, _ in terms] == ["x", "x"]
    assert input_of(node) is not None
