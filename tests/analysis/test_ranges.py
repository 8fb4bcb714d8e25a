"""Interval analysis never promises more than is true, and proves what it is there for."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from rmfx import trace
from rmfx.algebra.activation import TABLE, Activation
from rmfx.algebra.affine import AffineConv
from rmfx.analysis.ranges import Range, Ranges, affine_range
from rmfx.ir.net import Net
from rmfx.modules.activations import NAMELESS, Composed, Pointwise

F64 = torch.float64
INF = math.inf


class Function(nn.Module):
    """A network written as `forward(self, x)` over named modules."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.body = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


class Values(fx.Interpreter):
    """Keeps the value of every node."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op != "output":
            self.values[n.name] = value.detach().clone()
        return value


def analyse(
    forward: Callable[[Any, Tensor], Tensor],
    x: Tensor,
    *,
    input_range: tuple[float, float] | None = None,
    **modules: nn.Module,
) -> tuple[Net, Ranges, fx.Node]:
    """The net, its ranges and the node that is its output."""
    net = Net(trace(Function(forward, **modules).double().eval(), x))
    output = next(n for n in net.graph.nodes if n.op == "output")
    return net, Ranges(net, input_range), output.all_input_nodes[0]


def check(net: Net, ranges: Ranges, inputs: list[Tensor], *, axis: int | None = 1) -> None:
    """Demand that every node's value lies in its range; `axis` is that of the channels."""
    for x in inputs:
        run = Values(net.source)
        run.run(x)
        for node in net.graph.nodes:
            if node.name not in run.values or node.op == "get_attr":
                continue
            value, found = run.values[node.name].double(), ranges.of(node)
            slack = 1e-9 * (1 + value.abs().max())
            if axis is None:
                assert value.min() >= found.low.min() - slack, node
                assert value.max() <= found.high.max() + slack, node
                continue
            by_channel = value.movedim(axis, 0).flatten(1)
            assert (by_channel.amin(1) >= found.low - slack).all(), node
            assert (by_channel.amax(1) <= found.high + slack).all(), node


# ---- soundness ----------------------------------------------------------------------------------

ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    *(kind for kind in TABLE if kind not in (nn.Threshold, *NAMELESS)),
    *(functools.partial(Pointwise, name) for name in ("abs", "sin", "erf", "atan")),
    lambda: Composed(fx.symbolic_trace(lambda x: torch.floor(x) * (x > 0))),
    lambda: nn.Threshold(0.5, -1.0),
    lambda: nn.LeakyReLU(-0.5),
    lambda: nn.LeakyReLU(2.0),
    lambda: nn.Hardtanh(-3.0, 0.5),
    lambda: nn.Softplus(1.0, -5.0),
    lambda: nn.GELU(approximate="tanh"),
)


def slopes(channels: int) -> nn.PReLU:
    module = nn.PReLU(channels)
    nn.init.normal_(module.weight)
    return module


def norm(channels: int, dims: int) -> nn.Module:
    bn = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)[dims](channels)
    for value in (bn.weight, bn.bias, bn.running_mean):
        nn.init.normal_(value)
    bn.running_var.uniform_(0.1, 2)
    return bn


LAYERS: tuple[Callable[[], nn.Module], ...] = (
    lambda: nn.Conv2d(4, 4, 3, padding=1),
    lambda: nn.Conv2d(4, 4, 1, bias=False),
    lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
    lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2),
    lambda: norm(4, 2),
    lambda: slopes(4),
    lambda: nn.MaxPool2d(3, 1, 1),
    lambda: nn.AvgPool2d(3, 1, 1),
    lambda: nn.AvgPool2d(3, 1, 1, divisor_override=2),
    lambda: nn.AdaptiveAvgPool2d(5),
    lambda: nn.AdaptiveMaxPool2d(5),
    lambda: nn.ZeroPad2d((1, 0, -1, 2)),
    lambda: nn.ConstantPad2d((1, 0, 0, 2), -1.5),
    lambda: nn.ReflectionPad2d((1, 0, 1, 2)),
    lambda: nn.CircularPad2d(1),
    lambda: nn.Dropout(),
    lambda: nn.Identity(),
    lambda: nn.Upsample(scale_factor=2),  # not known to the analysis
)
FEATURE_LAYERS: tuple[Callable[[], nn.Module], ...] = (
    lambda: nn.Linear(4, 4),
    lambda: nn.Linear(4, 4, bias=False),
    lambda: norm(4, 1),
    lambda: slopes(4),
    lambda: nn.Dropout(),
    lambda: nn.LayerNorm(4),  # not known to the analysis
)
JOINS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda a, b: a + b,
    lambda a, b: a - b,
    lambda a, b: torch.add(a, b, alpha=-0.5),
    lambda a, b: 3 - 2 * a + b / -4,
    lambda a, b: -a - 1,
    lambda a, b: a * b,
)


@st.composite
def networks(draw: st.DrawFn, layers: tuple[Callable[[], nn.Module], ...]) -> nn.Module:
    """Up to six layers; between two of them a value may be joined with an earlier one."""
    torch.manual_seed(draw(st.integers(0, 999)))
    kinds = draw(st.lists(st.sampled_from((*layers, *ACTIVATIONS)), min_size=1, max_size=6))
    modules = [kind() for kind in kinds]
    plan = [draw(st.sampled_from((None, None, *JOINS))) for _ in modules]
    keep = [draw(st.booleans()) for _ in modules]

    def forward(self: Any, x: Tensor) -> Any:
        kept = x
        for i, (join, save) in enumerate(zip(plan, keep, strict=True)):
            y = getattr(self, f"m{i}")(x)
            shapes_agree = not isinstance(self.get_submodule(f"m{i}"), SIZE_CHANGING)
            if not shapes_agree:
                kept = y
            x = join(y, kept) if join else y
            kept = x if save else kept
        return x

    return Function(forward, **{f"m{i}": m for i, m in enumerate(modules)}).double().eval()


SIZE_CHANGING = (
    *(nn.ZeroPad2d, nn.Upsample, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    *(nn.AvgPool2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.CircularPad2d),
)
INPUT_RANGES = st.sampled_from((None, (0.0, 1.0), (-2.0, 3.0), (0.0, INF), (-INF, 0.0), (1.0, 1.0)))


def samples(shape: tuple[int, ...], input_range: tuple[float, float] | None) -> list[Tensor]:
    low, high = input_range or (-INF, INF)
    drawn = [
        scale * torch.randn(shape, dtype=F64) + shift for scale in (1, 20) for shift in (0, 3, -3)
    ]
    ends = [torch.full(shape, end, dtype=F64) for end in (low, high) if math.isfinite(end)]
    return [*(x.clamp(low, high) for x in drawn), *ends]


@given(networks(LAYERS), INPUT_RANGES)
def test_values_lie_in_their_ranges(
    model: nn.Module, input_range: tuple[float, float] | None
) -> None:
    inputs = samples((2, 4, 5, 5), input_range)
    net = Net(trace(model, inputs[0]))
    check(net, Ranges(net, input_range), inputs)


@given(networks(LAYERS), INPUT_RANGES)
def test_values_lie_in_their_ranges_where_shapes_are_unknown(
    model: nn.Module, input_range: tuple[float, float] | None
) -> None:
    net = Net(trace(model))
    check(net, Ranges(net, input_range), samples((2, 4, 5, 5), input_range))


@given(networks(FEATURE_LAYERS), INPUT_RANGES)
def test_features_lie_in_their_ranges(
    model: nn.Module, input_range: tuple[float, float] | None
) -> None:
    inputs = samples((3, 4), input_range)
    net = Net(trace(model, inputs[0]))
    check(net, Ranges(net, input_range), inputs)


SIGNS = torch.tensor([1.0, -1.0, 1.0, -1.0])


def mirror() -> nn.Linear:
    """Negates every other feature."""
    linear = nn.Linear(4, 4, bias=False)
    linear.weight = nn.Parameter(torch.diag(SIGNS))
    return linear


def mirror_norm() -> nn.BatchNorm1d:
    bn = nn.BatchNorm1d(4)
    bn.weight = nn.Parameter(SIGNS.clone())
    return bn


def mirror_conv() -> nn.Conv2d:
    conv = nn.Conv2d(4, 4, 1, bias=False, groups=4)
    conv.weight = nn.Parameter(SIGNS.reshape(4, 1, 1, 1).clone())
    return conv


@pytest.mark.parametrize(
    ("forward", "modules", "shape"),
    [
        (lambda s, x: s.b(s.a(F.relu(x))), {"a": mirror_conv(), "b": mirror()}, (2, 4, 6, 4)),
        (lambda s, x: s.b(s.p(s.a(F.relu(x)))),
         {"a": mirror(), "p": nn.MaxPool1d(3, 1, 1), "b": mirror()}, (2, 5, 4)),
        (lambda s, x: s.n(s.a(F.relu(x))), {"a": mirror(), "n": mirror_norm()}, (2, 4, 4)),
        (lambda s, x: s.b(s.n(F.relu(x))), {"b": mirror(), "n": mirror_norm()}, (2, 4, 4)),
        (lambda s, x: s.p(-F.relu(s.a(x))), {"a": mirror(), "p": slopes(4)}, (2, 4, 4)),
        (lambda s, x: s.b(s.a(F.relu(x)) + s.b(F.relu(x))[0, 0, 0]),
         {"a": mirror_conv(), "b": mirror()}, (2, 4, 6, 4)),
    ],
    ids=["width", "pooled features", "norm over tokens", "linear after norm", "slopes", "add"],
)  # fmt: skip
@pytest.mark.parametrize("shapes", [True, False])
def test_channels_of_two_axes_are_not_confused(
    forward: Any, modules: dict[str, nn.Module], shape: tuple[int, ...], shapes: bool
) -> None:
    model = Function(forward, **modules).double().eval()
    inputs = samples(shape, None)
    net = Net(trace(model, inputs[0] if shapes else None))
    check(net, Ranges(net), inputs, axis=None)


def test_padding_lets_zeros_in() -> None:
    one = AffineConv(torch.ones(1, 1, 3), torch.zeros(1), (1,), ((0, 0),), (1,))
    padded = AffineConv(torch.ones(1, 1, 3), torch.zeros(1), (1,), ((1, 0),), (1,))
    x = Range.of(1, 2)
    assert [(float(r.low), float(r.high)) for r in (affine_range(f, x) for f in (one, padded))] == [
        (3, 6),
        (0, 6),
    ]


@pytest.mark.parametrize(
    ("weights", "x", "expected"),
    [
        ([1.0, -1.0], (0.0, INF), (-INF, INF)),
        ([1.0, 1.0], (0.0, INF), (0.5, INF)),
        ([-1.0, 0.0], (0.0, INF), (-INF, 0.5)),
        ([0.0, 0.0], (0.0, INF), (0.5, 0.5)),
        ([0.0, 2.0], (-INF, 1.0), (-INF, 2.5)),
        ([1.0, -2.0], (-1.0, 3.0), (-6.5, 5.5)),
    ],
)
def test_infinite_ends_and_zero_weights_meet(
    weights: list[float], x: tuple[float, float], expected: tuple[float, float]
) -> None:
    layer = AffineConv(torch.tensor([weights]), torch.tensor([0.5]), (), (), ())
    found = affine_range(layer, Range.of(*x))
    assert (float(found.low), float(found.high)) == expected


# ---- what it proves -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forward", "modules", "low", "high"),
    [
        (lambda s, x: F.relu(x), {}, 0, INF),
        (lambda s, x: F.relu6(x), {}, 0, 6),
        (lambda s, x: F.max_pool2d(F.relu(x), 2), {}, 0, INF),
        (lambda s, x: F.avg_pool2d(F.relu6(x), 2, padding=1), {}, 0, 6),
        (lambda s, x: F.adaptive_avg_pool2d(torch.sigmoid(x), 1), {}, 0, 1),
        (lambda s, x: F.relu(x) + torch.tanh(x), {}, -1, INF),
        (lambda s, x: 3 - torch.sigmoid(x) / 2, {}, 2.5, 3),
        (lambda s, x: F.leaky_relu(torch.tanh(x), 0.5), {}, -0.5, 1),
        (lambda s, x: F.softsign(x), {}, -1, 1),
        (lambda s, x: torch.flatten(F.relu(x), 1), {}, 0, INF),
        (lambda s, x: s.conv(torch.sigmoid(x)), {"conv": mirror_conv()}, -1, 1),
    ],
)
def test_bounds_are_proven(
    forward: Any, modules: dict[str, nn.Module], low: float, high: float
) -> None:
    _, ranges, output = analyse(forward, torch.randn(1, 4, 4, 4).double(), **modules)
    found = ranges.of(output)
    assert (float(found.low.min()), float(found.high.max())) == pytest.approx((low, high))


def test_each_channel_has_bounds_of_its_own() -> None:
    x = torch.randn(1, 4, 4, 4).double()
    _, ranges, output = analyse(lambda s, x: s.c(torch.sigmoid(x)), x, c=mirror_conv())
    found = ranges.of(output)
    assert found.low.tolist() == [0, -1, 0, -1]
    assert found.high.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(("input_range", "proven"), [(None, False), ((0.0, 1.0), True)])
def test_an_input_range_is_taken_at_its_word(
    input_range: tuple[float, float] | None, proven: bool
) -> None:
    x = torch.rand(1, 4, 4, 4).double()
    _, ranges, output = analyse(lambda s, x: x + 1, x, input_range=input_range)
    assert ranges.fixed_by(output, Activation(nn.ReLU())) is proven


@pytest.mark.parametrize(
    ("forward", "activation", "fixed"),
    [
        (lambda s, x: F.relu(x), nn.ReLU(), True),
        (lambda s, x: F.max_pool2d(F.dropout(F.relu(x), 0.5, False), 2), nn.ReLU(), True),
        (lambda s, x: F.relu6(x), nn.ReLU6(), True),
        (lambda s, x: F.relu(x), nn.ReLU6(), False),
        (lambda s, x: F.relu6(x), nn.Hardtanh(0, 5), False),
        (lambda s, x: torch.sigmoid(x) + F.relu(x), nn.ELU(), True),
        (lambda s, x: F.silu(x), nn.ReLU(), False),
        (lambda s, x: x, nn.ReLU(), False),
        (lambda s, x: F.relu(x), nn.SiLU(), False),
        (lambda s, x: -F.relu(x), nn.ReLU(), False),
        (lambda s, x: -s.conv(F.softsign(x)), nn.ReLU(), False),
        (lambda s, x: F.hardtanh(x, 1.0, 6.0), nn.Threshold(1.0, 0.0), False),
        (lambda s, x: F.hardtanh(x, 1.0, 6.0), nn.Threshold(1.0, 1.0), True),
    ],
)
def test_fixed_by_is_what_the_carry_needs(forward: Any, activation: nn.Module, fixed: bool) -> None:
    x = torch.randn(1, 4, 4, 4).double()
    _, ranges, output = analyse(forward, x, conv=nn.Conv2d(4, 4, 1))
    assert ranges.fixed_by(output, Activation(activation)) is fixed


def test_a_hooked_module_is_not_trusted() -> None:
    pool = nn.MaxPool2d(3, 1, 1)
    pool.register_forward_hook(lambda module, args, output: -output)
    x = torch.randn(1, 4, 4, 4).double()
    _, ranges, output = analyse(lambda s, x: s.pool(F.relu(x)), x, pool=pool)
    assert not ranges.fixed_by(output, Activation(nn.ReLU()))
    assert ranges.of(output).unbounded


def test_a_value_that_is_written_in_place_is_not_trusted() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        y = F.relu(x)
        view = y.view(-1)
        y.sub_(1)
        return view.sum() + y

    net = Net(trace(Function(forward), torch.randn(2, 4)))
    relu = next(n for n in net.graph.nodes if "relu" in n.name)
    assert Ranges(net).of(relu).unbounded


def test_ranges_can_be_set_for_new_nodes() -> None:
    _, ranges, output = analyse(lambda s, x: F.relu(x), torch.randn(1, 4))
    assert ranges.known(output) is None
    ranges.set(output, Range.of(1, 2))
    assert ranges.of(output) is ranges.known(output)
    assert float(ranges.of(output).low) == 1


def test_long_graphs_do_not_recurse() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        for _ in range(1500):
            x = x * 1.0
        return F.relu(x)

    _, ranges, output = analyse(forward, torch.randn(1, 4))
    assert float(ranges.of(output).low) == 0
