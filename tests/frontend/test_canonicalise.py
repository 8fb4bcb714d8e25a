"""Every way to call a layer becomes the same module, through both front-ends."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, called, conv, image, ready
from torch import Tensor, nn

import rmfx
from rmfx.frontend.calls import CALLS
from rmfx.ir.kinds import ARITHMETIC
from rmfx.testing import random_statistics

Forward = Callable[[Any, Tensor], Any]


class Holder(nn.Module):
    """Tensors for functional calls, named like the arguments."""

    def __init__(self, forward: Forward, *, dims: int) -> None:
        super().__init__()
        self.body = forward
        self.w = nn.Parameter(torch.randn(6, 2, *[3] * dims))
        self.dense = nn.Parameter(torch.randn(5, 4))
        self.b = nn.Parameter(torch.randn(6))
        self.slopes = nn.Parameter(torch.rand(4))
        self.slope = nn.Parameter(torch.rand(1))
        self.mean = nn.Buffer(torch.randn(4))
        self.variance = nn.Buffer(torch.rand(4) + 0.5)
        self.gamma = nn.Parameter(torch.randn(4))
        self.beta = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def check(forward: Forward, x: Tensor, expected: list[str], *, exported: bool = True) -> None:
    """The calls that are left, and equal values, through every front-end."""
    model = Holder(forward, dims=max(x.dim() - 2, 1)).double().eval()
    wanted = model(x.clone())
    traced = [rmfx.trace(model, x)]
    if exported:
        program = torch.export.export(model, (x,), strict=False)
        traced.append(rmfx.trace(program))
    for gm in traced:
        assert called(gm) == expected
        torch.testing.assert_close(gm(x.clone()), wanted, rtol=1e-12, atol=1e-12)


def tensor(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 4, 7, 6)), dtype=torch.float64)


# ---- activations --------------------------------------------------------------------------------

ACTIVATIONS: list[tuple[str, Forward]] = [
    ("ReLU", lambda m, x: F.relu(x)),
    ("ReLU", lambda m, x: torch.relu(x)),
    ("ReLU", lambda m, x: x.relu()),
    ("ReLU", lambda m, x: F.relu(input=x)),
    ("ReLU", lambda m, x: x.clamp(min=0)),
    ("ReLU", lambda m, x: torch.clamp(x, 0)),
    ("ReLU6", lambda m, x: F.relu6(x)),
    ("Hardtanh", lambda m, x: F.hardtanh(x, -0.5, 2.0)),
    ("Hardtanh", lambda m, x: F.hardtanh(x, max_val=0.5)),
    ("Hardtanh", lambda m, x: torch.clamp(x, -1, 0.5)),
    ("Hardtanh", lambda m, x: x.clamp(max=0.5)),
    ("Hardtanh", lambda m, x: torch.clip(x, min=-0.5, max=0.5)),
    ("LeakyReLU", lambda m, x: F.leaky_relu(x, 0.2)),
    ("LeakyReLU", lambda m, x: F.leaky_relu(x, negative_slope=0.3)),
    ("PReLU", lambda m, x: F.prelu(x, m.slopes)),
    ("PReLU", lambda m, x: torch.prelu(x, m.slope)),
    ("RReLU", lambda m, x: F.rrelu(x, 0.1, 0.3)),
    ("ELU", lambda m, x: F.elu(x, 0.7)),
    ("CELU", lambda m, x: F.celu(x, alpha=0.7)),
    ("SELU", lambda m, x: F.selu(x)),
    ("GELU", lambda m, x: F.gelu(x)),
    ("GELU", lambda m, x: F.gelu(x, approximate="tanh")),
    ("SiLU", lambda m, x: F.silu(x)),
    ("Mish", lambda m, x: F.mish(x)),
    ("Softplus", lambda m, x: F.softplus(x, 2.0, 5.0)),
    ("Tanh", lambda m, x: torch.tanh(x)),
    ("Tanh", lambda m, x: x.tanh()),
    ("Sigmoid", lambda m, x: x.sigmoid()),
    ("Sigmoid", lambda m, x: F.sigmoid(x)),
    ("Hardsigmoid", lambda m, x: F.hardsigmoid(x)),
    ("Hardswish", lambda m, x: F.hardswish(x)),
    ("Hardshrink", lambda m, x: F.hardshrink(x, 0.3)),
    ("Softshrink", lambda m, x: F.softshrink(x, 0.3)),
    ("Threshold", lambda m, x: F.threshold(x, 0.1, -2.0)),
    ("Pointwise", lambda m, x: torch.abs(x)),
    ("Pointwise", lambda m, x: abs(x)),
    ("Pointwise", lambda m, x: x**2),
    ("Pointwise", lambda m, x: torch.pow(x, exponent=3)),
    ("Pointwise", lambda m, x: x.square()),
    ("Pointwise", lambda m, x: torch.sin(x)),
    ("Pointwise", lambda m, x: x.exp()),
]


@pytest.mark.parametrize(("name", "forward"), ACTIVATIONS)
def test_activations_become_modules(name: str, forward: Forward) -> None:
    check(forward, tensor(), [name])


@pytest.mark.parametrize(
    ("name", "forward"),
    [
        ("Softsign", lambda m, x: F.softsign(x)),
        ("LogSigmoid", lambda m, x: F.logsigmoid(x)),
        ("Tanhshrink", lambda m, x: F.tanhshrink(x)),
    ],
)  # torch.export takes these apart
def test_composed_activations_become_modules_in_symbolic_traces(
    name: str, forward: Forward
) -> None:
    check(forward, tensor(), [name], exported=False)


@pytest.mark.parametrize(
    "split",
    [
        lambda x: torch.split(x, 3, 1),
        lambda x: torch.split(x, [1, 2, 2], dim=1),
        lambda x: torch.split(tensor=x, split_size_or_sections=[1, 2, 2], dim=-3),
        lambda x: x.split(2, 1),
        lambda x: x.split(split_size=2, dim=1),
        lambda x: x.split_with_sizes([2, 3], 1),
        lambda x: x.chunk(2, 1),
        lambda x: x.chunk(3, 1),
        lambda x: torch.chunk(x, chunks=4, dim=1),
        lambda x: torch.unsafe_chunk(x, 2, 1),
        lambda x: x.tensor_split(3, 1),
        lambda x: torch.tensor_split(x, indices=(1, 4), dim=-3),
    ],
)
def test_parts_of_a_split_are_slices(split: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    x = torch.randn(2, 5, 4, 3)
    weight = torch.randn(5, 5, 1, 1)  # fixes how many channels there are
    count = len(split(x))
    for index in (0, count - 1, -1):
        model = Holder(lambda m, x, i=index: F.relu(split(F.conv2d(x, weight))[i]), dims=2).eval()
        gm = rmfx.trace(model, x)
        assert "split" not in gm.code
        assert "chunk" not in gm.code
        assert torch.equal(gm(x), model(x))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: torch.cat(x.chunk(2, 1), 1),
        lambda m, x: torch.cat(torch.split(x, [1, 2, 2], 1), dim=1),
        lambda m, x: torch.concat(tensors=x.tensor_split(2, 1), dim=1),
        lambda m, x: torch.cat(x.chunk(3, dim=1), 1),
    ],
)
def test_all_parts_of_a_split_at_once_are_slices_too(forward: Forward) -> None:
    weight, x = torch.randn(5, 5, 1, 1), torch.randn(2, 5, 4, 3)
    model = Holder(lambda m, x: forward(m, F.conv2d(x, weight)), dims=2).eval()
    for gm in (
        rmfx.trace(model),
        rmfx.trace(model, x),
        rmfx.trace(torch.export.export(model, (x,))),
    ):
        assert not any(name in gm.code for name in ("split", "chunk"))
        assert torch.equal(gm(x), model(x))


def test_parts_of_known_amounts_need_no_sizes() -> None:
    gm = rmfx.trace(Holder(lambda m, x: torch.split(x, 2, 1)[1], dims=2).eval())
    assert "split" not in gm.code
    x = torch.randn(2, 5, 4, 3)
    assert torch.equal(gm(x), x[:, 2:4])


@pytest.mark.parametrize("dim", [1, -1])
def test_splits_of_unknown_sizes_stay(dim: int) -> None:
    gm = rmfx.trace(Holder(lambda m, x: x.chunk(2, dim)[0], dims=2).eval())
    assert "chunk" in gm.code


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: torch.clamp(x, max=x.mean()),
        lambda m, x: F.prelu(x, m.slopes * x.mean()),
        lambda m, x: F.conv2d(x, m.w * x.mean(), groups=2),
        lambda m, x: F.dropout(x, 0.0, True),
        lambda m, x: F.max_pool2d(x, 2, return_indices=True),
        lambda m, x: F.batch_norm(x, None, None, training=True),
    ],
)
def test_calls_without_a_fixed_module_stay(forward: Forward) -> None:
    model = Holder(forward, dims=2).double().eval()
    x = tensor()
    gm = rmfx.trace(model, x)
    assert not [n for n in gm.graph.nodes if n.op == "call_module"]
    torch.testing.assert_close(gm(x), model(x))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: x.clamp(m.slope),
        lambda m, x: F.hardtanh(x, 1.0, 1.0),
        lambda m, x: x.clamp(2, 1),
        lambda m, x: (x * x) ** m.slope,
        lambda m, x: 2.0**x,
    ],
)
def test_calls_on_each_value_alone_are_activations_of_their_own(forward: Forward) -> None:
    model = Holder(forward, dims=2).double().eval()
    x = tensor()
    gm = rmfx.trace(model, x)
    assert called(gm)[-1] == "Composed"
    torch.testing.assert_close(gm(x), model(x), rtol=0, atol=0)


# ---- layers -------------------------------------------------------------------------------------

SHAPES = {1: (2, 4, 9), 2: (2, 4, 9, 8), 3: (2, 4, 6, 7, 5)}


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"groups": 2},
        {"groups": 2, "stride": 2, "padding": 1},
        {"groups": 2, "padding": "same", "dilation": 2},
        {"groups": 2, "padding": "valid"},
    ],
    ids=str,
)
@pytest.mark.parametrize("space", [F, torch], ids=["functional", "torch"])
def test_convolutions_become_modules(dims: int, options: dict[str, Any], space: Any) -> None:
    function = getattr(space, f"conv{dims}d")
    check(lambda m, x: function(x, m.w, m.b, **options), tensor(*SHAPES[dims]), [f"Conv{dims}d"])
    check(lambda m, x: function(input=x, weight=m.w, **options), tensor(*SHAPES[dims]),
          [f"Conv{dims}d"])  # fmt: skip


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("max_pool", (3, 2, 1)),
        ("max_pool", (2,)),
        ("avg_pool", (3, 2, 1, True, False)),
        ("avg_pool", (2,)),
        ("adaptive_avg_pool", (2,)),
    ],
    ids=str,
)
def test_pools_become_modules(dims: int, name: str, args: tuple[Any, ...]) -> None:
    function = getattr(F, f"{name}{dims}d")
    kind = "".join(part.capitalize() for part in name.split("_")) + f"{dims}d"
    check(lambda m, x: function(x, *args), tensor(*SHAPES[dims]), [kind])


def test_adaptive_max_pools_become_modules_in_symbolic_traces() -> None:
    check(lambda m, x: F.adaptive_max_pool2d(x, 2), tensor(), ["AdaptiveMaxPool2d"], exported=False)


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda m, x: F.linear(x, m.dense), ["Linear"]),
        (lambda m, x: F.linear(x, m.dense, bias=m.b[:5]), None),
        (lambda m, x: torch.flatten(x, 1), ["Flatten"]),
        (lambda m, x: x.flatten(1), ["Flatten"]),
        (lambda m, x: x.view(x.size(0), -1), ["Flatten"]),
        (lambda m, x: x.reshape(x.shape[0], -1), ["Flatten"]),
        (lambda m, x: torch.reshape(x, (x.size()[0], -1)), ["Flatten"]),
        (lambda m, x: x.view(x.size(1), -1), None),
        (lambda m, x: x.view(-1, x.size(0)), None),
        (lambda m, x: F.dropout(x, 0.5, m.training), ["Dropout"]),
        (lambda m, x: F.dropout2d(x[:, :, None], training=False)[:, :, 0], None),
    ],
)
def test_features_and_shapes(forward: Forward, expected: list[str] | None) -> None:
    model = Holder(forward, dims=1).double().eval()
    x = tensor(3, 4, 4)
    gm = rmfx.trace(model, x)
    torch.testing.assert_close(gm(x), model(x))
    if expected:
        left = [n for n in called(gm) if n not in ("size", "getattr", "getitem")]
        assert left == expected


BATCHES: dict[str, tuple[Any, bool]] = {
    "of the input": (lambda m, x: F.relu(m.c(x)).view(x.size(0), -1), True),
    "of the input's shape": (lambda m, x: m.c(x).reshape(x.shape[0], -1), True),
    "behind a sum": (lambda m, x: (m.c(x) + m.c(F.relu(x))).view(x.size()[0], -1), True),
    "behind channels side by side": (
        lambda m, x: torch.cat([m.c(x), x], 1).reshape(x.size(0), -1),
        True,
    ),
    "of batches side by side": (lambda m, x: torch.cat([x, x], 0).reshape(x.size(0), -1), False),
    "of a value beside it": (lambda m, x: m.c(x.repeat(2, 1, 1, 1)).view(x.size(0), -1), False),
    "of another place": (lambda m, x: m.c(x).view(x.size(2), -1), False),
    "of rows": (lambda m, x: m.c(x.transpose(0, 2)).reshape(x.size(0), -1), False),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("known", [True, False], ids=["with inputs", "without inputs"])
def test_a_view_to_the_batch_flattens(name: str, known: bool) -> None:
    forward, flattens = BATCHES[name]
    model = ready(Apply(forward, c=conv(4, 4)))
    gm = rmfx.trace(model, *([image(2, 4, 2, 6)] if known else []))
    found = any(isinstance(m, nn.Flatten) for m in gm.modules())
    assert found == (flattens and (known or "side by side" not in name))  # of unknown dimensions
    for x in (image(2, 4, 2, 6), image(3, 4, 3, 5)):
        torch.testing.assert_close(gm(x), model(x))


@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 5), (2, 4, 5, 6), (2, 4, 3, 2, 5)], ids=len)
@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: F.batch_norm(x, m.mean, m.variance, m.gamma, m.beta, False, 0.1, 1e-3),
        lambda m, x: F.batch_norm(x, m.mean, m.variance, eps=1e-3),
        lambda m, x: torch.batch_norm(
            x, m.gamma, m.beta, m.mean, m.variance, False, 0.1, 1e-3, False
        ),
    ],
)
def test_batch_norm_becomes_the_module_of_its_rank(
    shape: tuple[int, ...], forward: Forward
) -> None:
    check(forward, tensor(*shape), [f"BatchNorm{max(len(shape) - 2, 1)}d"])


def test_batch_norm_of_unknown_rank_stays() -> None:
    model = Holder(lambda m, x: F.batch_norm(x, m.mean, m.variance), dims=2).double().eval()
    assert called(rmfx.trace(model)) == ["batch_norm"]


def test_the_layer_before_tells_the_rank() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        return F.batch_norm(2 * F.relu(F.max_pool2d(x, 2)), m.mean, m.variance)

    model = Holder(forward, dims=2).double().eval()
    assert called(rmfx.trace(model))[-1] == "BatchNorm2d"


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "forward",
    [
        lambda f, m, x: f(x, m.w, padding=1),
        lambda f, m, x: f(x, m.w, None, stride=2, output_padding=1, dilation=2),
        lambda f, m, x: f(input=x, weight=m.w, bias=m.b[:4], groups=2),
    ],
)
def test_transposed_convolutions_become_modules(dims: int, forward: Callable[..., Any]) -> None:
    for owner in (F, torch):
        function = getattr(owner, f"conv_transpose{dims}d")
        x = tensor(2, 6, *(7, 6, 5)[:dims])
        check(lambda m, x, f=function: forward(f, m, x), x, [f"ConvTranspose{dims}d"])


# ---- arithmetic ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "forward"),
    [
        ("add", lambda m, x: x + x),
        ("add", lambda m, x: x.add(other=x)),
        ("add", lambda m, x: torch.add(x, x, alpha=2)),
        ("add", lambda m, x: 1 + x),
        ("sub", lambda m, x: x - 1),
        ("sub", lambda m, x: x.sub(x, alpha=0.5)),
        ("sub", lambda m, x: torch.subtract(x, x)),
        ("mul", lambda m, x: 2 * x),
        ("mul", lambda m, x: torch.multiply(x, m.slope)),
        ("div", lambda m, x: x / 2),
        ("div", lambda m, x: torch.true_divide(x, m.slope)),
        ("neg", lambda m, x: -x),
        ("neg", lambda m, x: x.neg()),
    ],
)
def test_arithmetic_has_one_name(name: str, forward: Forward) -> None:
    check(forward, tensor(), [name])


def test_rounded_division_is_an_activation() -> None:
    check(lambda m, x: torch.div(x, 2, rounding_mode="floor"), tensor(), ["Composed"])
    check(lambda m, x: x.div(2, rounding_mode="floor"), tensor(), ["Composed"])


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: x[:, :, ::2, ::2],
        lambda m, x: x[:, 1:3],
        lambda m, x: x[:, :, 1:-1],
        lambda m, x: F.pad(x, (1, 2)),
        lambda m, x: F.pad(x, (-1, 0, 1, 1, 0, 2), value=0.0),
        lambda m, x: F.pad(x, [1, 1], "constant", 3.0),
        lambda m, x: F.pad(x, (1, 1, 0, 0), mode="reflect"),
    ],
)
def test_slices_and_pads_keep_their_values(forward: Forward) -> None:
    x = tensor()
    model = Holder(forward, dims=2).double().eval()
    for gm in (rmfx.trace(model, x), rmfx.trace(torch.export.export(model, (x,), strict=False))):
        torch.testing.assert_close(gm(x), model(x), rtol=0, atol=0)
        assert all("aten" not in str(n.target) for n in gm.graph.nodes if "reflect" not in str(n))


# ---- the table itself ---------------------------------------------------------------------------


def test_every_row_names_its_arguments_from_the_input_on() -> None:
    for target, call in CALLS.items():
        assert call.names[0] == "input", target
        assert len(set(call.names)) == len(call.names), target


def test_arithmetic_leads_to_five_functions() -> None:
    assert set(ARITHMETIC.values()) == {torch.add, torch.sub, torch.mul, torch.div, torch.neg}
    assert ARITHMETIC[operator.iadd] is torch.add


def test_weights_are_shared_with_the_model() -> None:
    model = Holder(lambda m, x: F.conv2d(x, m.w, m.b, groups=2), dims=2).eval()
    gm = rmfx.trace(model)
    assert next(gm.parameters()) is model.w


def test_modules_made_from_calls_stand_where_the_call_was() -> None:
    inner = Apply(lambda m, x: torch.relu(torch.relu(x)))
    model = random_statistics(
        Apply(lambda m, x: m.inner(x) + F.relu(x), inner=inner), seed=0
    ).eval()
    targets = [str(n.target) for n in rmfx.trace(model).graph.nodes if n.op == "call_module"]
    assert targets == ["inner.relu", "inner.relu_1", "relu"]
