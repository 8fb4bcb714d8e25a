"""Dense layers taken apart: each part is exact, whatever is taken apart, and carries pass it."""

from __future__ import annotations

import random

import pytest
import torch
from builders import Residual, assert_removed, chain, conv, conv_bn, image, ready
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import rmfx
from rmfx.algebra.activation import Activation
from rmfx.algebra.affine import AffineConv
from rmfx.removal.order import Order
from rmfx.removal.site import Chain, Step
from rmfx.removal.tiling import in_any_order, taken_apart
from rmfx.testing import assert_equivalent

F64 = torch.float64


@st.composite
def layers(draw: st.DrawFn, dims: int, n_in: int) -> AffineConv:
    """A linear layer of any window."""
    n_out, groups = draw(st.sampled_from([(8, 1), (4, 1), (16, 1), (12, 1), (8, 4)]))
    kernel = tuple(draw(st.sampled_from([1, 2, 3])) for _ in range(dims))
    pads = tuple((draw(st.integers(-1, 2)), draw(st.integers(0, 2))) for _ in range(dims))
    stride, dilation = (tuple(draw(st.integers(1, 2)) for _ in range(dims)) for _ in range(2))
    weight = torch.randn(n_out, n_in // groups, *kernel, dtype=F64)
    bias = torch.randn(n_out, dtype=F64)
    return AffineConv(weight, bias, stride, pads, dilation, groups)


@st.composite
def chains(draw: st.DrawFn) -> tuple[Chain, Tensor]:
    """Linear layers and ReLU in turn, and an input for them."""
    dims, width = draw(st.integers(1, 3)), 8
    x = torch.randn(2, width, *[draw(st.integers(14, 19)) for _ in range(dims)], dtype=F64)
    steps: list[Step] = []
    size = tuple(x.shape[2:])
    for _ in range(draw(st.integers(2, 3))):
        layer = draw(layers(dims, width))
        width, size = layer.out_channels, layer.output_size(size)
        assume(min(size) > 0)
        relu = Activation(nn.ReLU())
        steps += [Step(layer, (), None, width), Step(relu, (), None, width)]
    return tuple(steps[:-1]), x


def run(steps: Chain, x: Tensor) -> Tensor:
    """What a chain computes."""
    for step in steps:
        if isinstance(step.layer, Order):
            x = x if step.layer.rows is None else x[:, step.layer.rows]
        elif isinstance(step.layer, AffineConv):
            x = step.layer(x)
        else:
            x = x.relu()
        assert x.shape[1] == step.channels
    return x


@given(chains(), st.integers(0, 2**32))
def test_any_chain_taken_apart_in_any_way_computes_the_same(
    case: tuple[Chain, Tensor], seed: int
) -> None:
    steps, x = case
    prices = random.Random(seed)
    apart = taken_apart(in_any_order(steps), lambda _: prices.random())
    expected = run(steps, x)
    torch.testing.assert_close(run(apart, x), expected, rtol=1e-12, atol=1e-12)


def test_all_ways_are_met() -> None:
    layer = AffineConv(torch.randn(8, 8, 3, 3), torch.randn(8), (1, 1), ((1, 1),) * 2, (1, 1))
    steps = tuple(Step(layer, (), None, 8) for _ in range(3))
    found = set()
    for seed in range(200):
        prices = random.Random(seed)
        for step in taken_apart(steps, lambda _: prices.random()):  # noqa: B023
            assert isinstance(step.layer, AffineConv | Order)
            if isinstance(step.layer, AffineConv):
                found.add((step.layer.kernel, step.layer.groups > 1))
    assert found >= {
        ((3, 3), True),
        ((3, 3), False),
        ((1, 1), True),
        ((1, 3), True),
        ((3, 1), True),
    }
    assert ((1, 1), False) in found


@pytest.mark.parametrize("shape", [(2, 16, 9, 7), (1, 16, 5, 12), (3, 16, 1, 1)])
@pytest.mark.parametrize(
    "branch",
    [
        pytest.param(lambda: (*conv_bn(16, 16), nn.ReLU(), *conv_bn(16, 16)), id="basic"),
        pytest.param(
            lambda: (*conv_bn(16, 8, 1), nn.SiLU(), *conv_bn(8, 8), nn.SiLU(), *conv_bn(8, 16, 1)),
            id="bottleneck",
        ),
        pytest.param(
            lambda: (
                *conv_bn(16, 16, groups=16),
                nn.ReLU6(),
                *conv_bn(16, 32, 1),
                nn.PReLU(32),
                *conv_bn(32, 16, 1),
                nn.Tanh(),
            ),
            id="act last",
        ),
    ],
)
def test_sites_are_exact_and_cheaper(branch: object, shape: tuple[int, ...]) -> None:
    model = ready(chain(conv_bn(16, 16), Residual(chain(*branch())), nn.ReLU()))  # type: ignore[operator]
    plain = assert_removed(model, image(*shape), minimise="macs")
    default = assert_removed(model, image(*shape))
    work = [rmfx.cost.count(one, image(*shape)).macs for one in (plain, default)]
    assert work[0] < 0.9 * work[1]
    (row,) = rmfx.report(plain).rows
    assert row.macs_after is not None
    assert row.macs_after < 0.9 * (rmfx.report(default).rows[0].macs_after or 0)


class Nested(nn.Module):
    """A long skip around a basic block."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Residual(chain(conv(16, 16), nn.ReLU(), conv(16, 16)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.inner(x)) + x


def test_what_is_taken_apart_inside_of_a_long_skip_is_no_loss() -> None:
    model, x = ready(Nested()), image(1, 16, 9, 9)
    work = {}
    for target in ("time", "macs"):
        plain = assert_removed(model, x, sites=2, minimise=target)
        work[target] = rmfx.cost.count(plain, x).macs
    assert work["macs"] <= work["time"]


@pytest.mark.parametrize("minimise", ["time", "macs", "onnxruntime"])
def test_the_report_tells_what_is_left_once_layers_are_merged(minimise: str) -> None:
    branch = chain(conv(24, 48, 1), conv(48, 24, 1), nn.SiLU(), conv(24, 24))
    shortcut = chain(conv(24, 24, groups=24), conv(24, 24, 1))
    model, x = ready(Residual(branch, shortcut)), image(2, 24, 9, 7)
    plain = assert_removed(model, x, minimise=minimise)
    (row,) = rmfx.report(plain).rows
    count = rmfx.cost.count(plain, x)
    assert (row.macs_after, row.params_after) == (count.macs, count.parameters)


def test_carries_of_layers_taken_apart_are_closed_again() -> None:
    model = ready(
        chain(Residual(chain(*conv_bn(16, 16), nn.ReLU(), *conv_bn(16, 16))), conv(16, 16))
    )
    plain = assert_removed(model, image(1, 16, 9, 9), minimise="macs")
    closed = rmfx.close_carries(plain, image(1, 16, 9, 9))
    for x in (image(1, 16, 9, 9), image(2, 16, 5, 8)):
        assert_equivalent(model, closed, [x])
    work = [rmfx.cost.count(one, image(1, 16, 9, 9)).macs for one in (closed, plain)]
    assert work[0] < work[1]
