"""`differentiable=True`: weights as functions of the original parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import (
    Apply,
    Residual,
    adds,
    basic_branch,
    chain,
    conv,
    conv_bn,
    conv_branch,
    image,
    ready,
)
from hypothesis import given, settings
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import rmfx
from rmfx.testing import NetworkSpec, assert_equivalent, residual_networks


def network() -> Any:
    return ready(
        chain(
            conv_bn(),
            nn.ReLU(),
            Residual(basic_branch()),
            nn.ReLU6(),
            Residual(basic_branch(act=nn.PReLU(4))),
            Residual(conv_branch(nn.SiLU())),
            nn.GroupNorm(2, 4),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        )
    )


def perturb(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.3 * torch.rand_like(tensor))
                tensor.add_(0.1 * torch.rand_like(tensor))


def gradients(model: nn.Module, inputs: tuple[Any, ...], weights: list[Tensor]) -> list[Tensor]:
    """Gradients of the outputs' sum of squares; zeros where there are none."""
    copied = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)
    leaves = [y for y in pytree.tree_leaves(model(*copied)) if isinstance(y, Tensor)]
    total = sum(y.square().sum() for y in leaves if y.requires_grad)
    if not isinstance(total, Tensor) or not total.requires_grad:
        return [torch.zeros_like(w) for w in weights]
    return list(torch.autograd.grad(total, weights, allow_unused=True, materialize_grads=True))


def assert_same_gradients(model: nn.Module, linked: nn.Module, inputs: tuple[Any, ...]) -> None:
    weights = [w for w in model.parameters() if w.requires_grad]
    expected = gradients(model, inputs, weights)
    actual = gradients(linked, inputs, weights)
    scale = max((float(g.abs().max()) for g in expected if g.numel()), default=0.0)
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).abs().max() <= 1e-9 * scale


def test_parameters_are_shared_and_nothing_else_can_be_trained() -> None:
    model = network()
    linked = rmfx.remove_residuals(model, image(), differentiable=True)
    assert adds(linked) == 0
    assert rmfx.report(linked).removed == 3
    own = {id(p) for p in model.parameters()}
    trained = [p for p in linked.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == own


def test_values_and_gradients_follow_the_parameters() -> None:
    model = network()
    linked = rmfx.remove_residuals(model, image(), differentiable=True)
    for _ in range(3):
        assert_equivalent(model, linked, image())
        assert_same_gradients(model, linked, (image(),))
        perturb(model)


@pytest.mark.parametrize("minimise", ["time", "macs", "onnxruntime"])
def test_layouts_of_every_target_follow_the_parameters(minimise: str) -> None:
    branches = [conv_branch(channels=8), chain(conv(8, 4, 1), nn.ReLU(), conv(4, 8, 1))]
    model, x = ready(chain(conv(3, 8), *map(Residual, branches))), image(2, 3, 7, 6)
    options = {"differentiable": True, "minimise": minimise, "strict": True}
    linked = rmfx.remove_residuals(model, x, **options)
    assert adds(linked) == 0
    perturb(model)
    torch.testing.assert_close(linked(x), model(x), rtol=1e-10, atol=1e-10)
    assert_same_gradients(model, linked, (x,))


def test_training_both_gives_the_same_network() -> None:
    losses = []
    first = network()
    for differentiable in (False, True):
        model = copy.deepcopy(first)
        trained = model
        if differentiable:
            trained = rmfx.remove_residuals(model, image(), differentiable=True)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(5):
            optimiser.zero_grad()
            loss = trained(image()).square().mean()
            loss.backward()
            optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)


@pytest.mark.slow
@settings(max_examples=12)
@given(residual_networks())
def test_random_networks(spec: NetworkSpec) -> None:
    model, inputs = spec.build(seed=0), spec.inputs(seed=0)
    linked = rmfx.remove_residuals(model, inputs, differentiable=True)
    perturb(model)
    assert_equivalent(model, linked, inputs)
    try:
        gradients(model, inputs, [w for w in model.parameters() if w.requires_grad])
    except RuntimeError:  # it writes over values that its own backward needs
        return
    assert_same_gradients(model, linked, inputs)


# What decisions must not rest on: each of these is special with today's weights only.


def test_a_bias_that_is_zero_today() -> None:
    model = ready(Residual(chain(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())))
    model.branch[0].bias.data.zero_()
    linked = rmfx.remove_residuals(model, image(), differentiable=True)
    perturb(model)
    assert_equivalent(model, linked, image())


def test_a_range_that_todays_weights_prove() -> None:
    stem = nn.Conv2d(4, 4, 1)
    model = ready(chain(nn.ReLU(), stem, Residual(conv_branch())))
    with torch.no_grad():
        stem.weight.abs_()
        stem.bias.abs_()
    assert rmfx.report(rmfx.remove_residuals(model, image())).rows[0].strategy == "identity"
    linked = rmfx.remove_residuals(model, image(), differentiable=True)
    assert rmfx.report(linked).rows[0].strategy == "per-channel"
    with torch.no_grad():
        stem.weight.neg_()
    assert_equivalent(model, linked, image())


def test_a_slope_that_is_negative_today() -> None:
    prelu = nn.PReLU(init=-0.5)  # max(x, 0) - 0.5·min(x, 0) is never negative
    model = ready(chain(nn.Conv2d(4, 4, 1), prelu, Residual(conv_branch())))
    linked = rmfx.remove_residuals(model, image(), differentiable=True)
    with torch.no_grad():
        prelu.weight.fill_(0.5)
    assert_equivalent(model, linked, image())


def test_a_detached_branch_stays_detached() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = conv_branch()

        def forward(self, x: Tensor) -> Tensor:
            y = self.branch[0](x)
            return y + self.branch(y.detach())

    model = ready(Detached())
    linked = rmfx.remove_residuals(model, image(), differentiable=True)
    assert_equivalent(model, linked, image())
    assert_same_gradients(model, linked, (image(),))


def test_it_excludes_kept_batch_norms() -> None:
    with pytest.raises(rmfx.RmfxError, match="differentiable=True needs fold_batch_norm=True"):
        rmfx.remove_residuals(network(), differentiable=True, fold_batch_norm=False)


MADE_OF_PARAMETERS: dict[str, Any] = {
    "a temperature": lambda m, y, x: y * m.t.exp(),
    "a power": lambda m, y, x: y.clamp(min=1e-6).pow(m.t.exp()),
    "weights between": lambda m, y, x: torch.lerp(x, y, torch.sigmoid(m.g)[:, None, None]),
    "a cosine": lambda m, y, x: F.linear(F.normalize(y.mean((2, 3))), F.normalize(m.h)),
    "an einsum": lambda m, y, x: torch.einsum("bchw,c->bchw", y, m.g.view(-1)),
    "a tied kernel": lambda m, y, x: F.linear(y.mean((2, 3)), m.b.weight.mean((2, 3))),
    "a quotient": lambda m, y, x: y / F.softplus(m.t),
}


@pytest.mark.parametrize("name", MADE_OF_PARAMETERS)
def test_what_is_made_of_parameters_elsewhere_follows_them(name: str) -> None:
    function = MADE_OF_PARAMETERS[name]

    def forward(m: Any, x: Tensor) -> Tensor:
        return function(m, x + m.a(torch.relu(m.b(x))), x)  # type: ignore[no-any-return]

    parts = {"g": nn.Parameter(torch.randn(4)), "t": nn.Parameter(torch.randn(1))}
    parts |= {"h": nn.Parameter(torch.randn(3, 4))}
    model: Any = ready(Apply(forward, a=conv(), b=conv(kernel=1), **parts))
    x = image()
    linked = rmfx.remove_residuals(model, x, differentiable=True)
    assert rmfx.report(linked).removed == 1
    for _ in range(2):
        assert_equivalent(model, linked, x)
        assert_same_gradients(model, linked, (x,))
        perturb(model)


# What the model's own code makes of its weights keeps the gradients that it has there.


class WithWeight(nn.Module):
    """x + conv2(act(conv1(x))), conv2's weight made by a function of it."""

    def __init__(self, make: Any, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.make, self.act = make, act or nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        made = self.make(self.conv2.weight)
        return x + F.conv2d(self.act(self.conv1(x)), made, padding=1)


WEIGHTS: dict[str, Any] = {
    "straight-through rounding": lambda w: w + (torch.round(w * 8) / 8 - w).detach(),
    "a sign with a scale": lambda w: w + (w.sign() * w.abs().mean() - w).detach(),
    "fixed by detach": lambda w: w.detach(),
    "fixed by data": lambda w: w.data,
    "half of it fixed": lambda w: torch.cat([w[:2], w[2:].detach()]),
    "what is positive": lambda w: torch.where(w > 0, w, 0.0 * w),
    "standardised": lambda w: (w - w.mean((1, 2, 3), keepdim=True)) / w.std(),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("front_end", ["verb", "torch.compile"])
def test_gradients_of_a_weight_that_the_model_computes(name: str, front_end: str) -> None:
    model, x = ready(WithWeight(WEIGHTS[name])), image()
    linked = rmfx.remove_residuals(model, x, differentiable=True)
    assert rmfx.report(linked).removed == 1
    if front_end == "torch.compile":
        torch._dynamo.reset()
        options = {"backend": "eager", "differentiable": True, "strict": True}
        linked = torch.compile(model, backend="rmfx", options=options)
    for _ in range(2):
        torch.testing.assert_close(linked(x), model(x), rtol=1e-10, atol=1e-10)
        assert_same_gradients(model, linked, (x,))
        perturb(model)


# No number leaves a weight.


class Scaled(nn.Module):
    """x + slope-dependent branches, by which functions of Python numbers could be tried."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv1, self.conv2, self.act = conv(), conv(), act

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.act(self.conv1(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("way", "strategy"),
    [("relu", None), (("odd-pair", "masked"), "masked"), ("auto", "per-channel")],
)
def test_a_slope_is_no_factor_of_an_odd_pair(way: Any, strategy: str | None) -> None:
    model, x = ready(Scaled(nn.PReLU())), image()
    assert rmfx.report(rmfx.remove_residuals(model, x, activation=way)).removed == 1
    linked = rmfx.remove_residuals(model, x, activation=way, differentiable=True)
    (row,) = rmfx.report(linked).rows
    assert row.strategy == strategy if strategy else "odd pair" in str(row.reason)
    for slope in (0.25, -1.0, 3.0):
        with torch.no_grad():
            model.act.weight.fill_(slope)
        assert_equivalent(model, linked, x)
        assert_same_gradients(model, linked, (x,))


def test_an_odd_pair_of_a_smooth_activation_stays() -> None:
    model, x = ready(Scaled(nn.GELU())), image()
    linked = rmfx.remove_residuals(model, x, activation="odd-pair", differentiable=True)
    assert rmfx.report(linked).rows[0].strategy == "odd-pair"
    perturb(model)
    assert_equivalent(model, linked, x)
    assert_same_gradients(model, linked, (x,))


def input_gradient(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    weights = torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x)
    return torch.autograd.grad((model(x) * weights).sum(), x)[0]


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(), nn.LeakyReLU(0.1)])
@pytest.mark.parametrize("way", ["auto", "relu"])
def test_gradients_where_an_activation_has_a_kink(act: nn.Module, way: str) -> None:
    """At 0 and 1, the ends of the range, a slope jumps; the shortcut's gradient does not."""
    model = ready(Scaled(act))
    x = image().round().clamp(0, 1)
    linked = rmfx.remove_residuals(
        model, x, activation=way, input_range=(0.0, 1.0), differentiable=True
    )
    assert way != "auto" or rmfx.report(linked).removed == 1
    for _ in range(2):
        torch.testing.assert_close(input_gradient(linked, x), input_gradient(model, x))
        nn.init.zeros_(model.conv1.bias)
        nn.init.zeros_(model.conv1.weight)  # now the branch stands at a kink everywhere
        assert_same_gradients(model, linked, (x,))


def test_decisions_that_a_module_calls_for_are_refused_with_the_reason() -> None:
    model = ready(
        Apply(
            lambda m, x: x + m.a(torch.relu(m.b(x)))[:, m.order],
            a=conv(),
            b=conv(),
        )
    )
    model.register_buffer("order", torch.tensor([2, 0, 3, 1]))
    x = image()
    assert rmfx.report(rmfx.remove_residuals(model, x)).removed == 1
    linked = rmfx.remove_residuals(model, x, differentiable=True)
    assert "may change" in str(rmfx.report(linked).rows[0].reason)
    model.order.copy_(torch.tensor([0, 1, 2, 3]))
    assert_equivalent(model, linked, x)


@pytest.mark.parametrize("take", [lambda w: w.detach().exp(), lambda w: w.item()])
def test_a_parameter_in_a_list_is_not_baked(take: Any) -> None:
    model = ready(
        Apply(lambda m, x: x + take(m.held[0]) * m.a(torch.relu(m.b(x))), a=conv(), b=conv())
    )
    model.held = [nn.Parameter(torch.tensor(0.3, dtype=torch.float64))]
    with pytest.raises(rmfx.OptionError, match="a list or a dict"):
        rmfx.remove_residuals(model, image(), differentiable=True)


# The result is a module like others.


def test_a_batch_norm_called_twice() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.bn = conv(), conv(), conv(), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = x + self.bn(self.b(torch.relu(self.bn(self.a(x)))))
            return y + self.c(torch.relu(y))  # type: ignore[no-any-return]

    model, x = ready(Shared()), image()
    torch._dynamo.reset()
    options = {"backend": "eager", "differentiable": True}
    for linked in (
        rmfx.remove_residuals(model, x, differentiable=True),
        torch.compile(model, backend="rmfx", options=options),
    ):
        torch.testing.assert_close(linked(x), model(x))
        assert_same_gradients(model, linked, (x,))
        perturb(model)
        torch.testing.assert_close(linked(x), model(x))


@pytest.mark.parametrize("made", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cast", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_result_of_another_type(made: torch.dtype, cast: torch.dtype) -> None:
    model, x = network().to(made), image(3, 4, 7, 7, dtype=cast)
    linked = rmfx.remove_residuals(model, image(dtype=made), differentiable=True)
    other = copy.deepcopy(linked).to(cast)
    expected = copy.deepcopy(model).to(cast).double()(x.double())
    y = other(x)
    assert y.dtype is cast
    error = (y.double() - expected).abs().max() / expected.abs().max()
    assert error <= 50 * torch.finfo(cast).eps


def test_statistics_that_a_training_mode_forward_moves() -> None:
    model, x = network(), image()
    linked = rmfx.remove_residuals(model, x, differentiable=True)
    before = linked(x)
    model.train()
    model(image())
    model.eval()
    assert not torch.allclose(linked(x), before)
    assert_equivalent(model, linked, x)
    assert_same_gradients(model, linked, (x,))


def test_weights_that_are_all_zero_or_of_another_sign() -> None:
    model, x = network(), image()
    linked = rmfx.remove_residuals(model, x, differentiable=True)
    for factor in (-1.0, 0.0):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(factor).add_(0.0)
        torch.testing.assert_close(linked(x), model(x), rtol=1e-10, atol=1e-12)
        for a, b in zip(
            gradients(linked, (x,), list(model.parameters())),
            gradients(model, (x,), list(model.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_second_derivatives_and_other_parameters() -> None:
    model, x = network(), image()
    linked = rmfx.remove_residuals(model, x, differentiable=True)
    norms = []
    for net in (model, linked):
        weights = list(model.parameters())
        first = torch.autograd.grad(net(x).square().sum(), weights, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), weights)
        norms.append(torch.stack([g.norm() for g in second]))
    torch.testing.assert_close(norms[1], norms[0])
    own = {id(p): name for name, p in model.named_parameters()}
    given = {n: (own[id(p)], 0.9 * p) for n, p in linked.named_parameters() if id(p) in own}
    y = torch.func.functional_call(linked, {n: p for n, (_, p) in given.items()}, (x,))
    z = torch.func.functional_call(model, dict(given.values()), (x,))
    torch.testing.assert_close(y, z)


@pytest.mark.parametrize("kink", [torch.relu, lambda x: F.leaky_relu(x, 0.1)])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)])
def test_a_pruned_neuron_stays_pruned(kink: Any, shape: tuple[int, ...]) -> None:
    """At 0 the gradient of torch's activations is the slope of what is below."""
    parts = {name: nn.Linear(8, 8) for name in "abc"}
    model = ready(Apply(lambda m, x: m.c(m.b(kink(m.a(x))) + x), **parts))
    with torch.no_grad():
        model.a.weight[3], model.a.bias[3] = 0, 0
    x = image(*shape)
    linked = rmfx.remove_residuals(model, x, differentiable=True)
    assert rmfx.report(linked).removed == 1
    assert_same_gradients(model, linked, (x,))


# ---- activations that hold tensors ---------------------------------------------------------------
OF_TENSORS: dict[str, tuple[Any, Any]] = {
    "a bound": (lambda m, y: torch.clamp(y, min=m.q), ()),
    "a bound per channel": (lambda m, y: torch.clamp(y, min=m.q), (4, 1, 1)),
    "a power": (lambda m, y: (torch.relu(y) + 0.1) ** m.q, ()),
    "a threshold": (lambda m, y: y * (y > m.q), ()),
    "a fill": (lambda m, y: y.masked_fill(y < 0, m.q), ()),
    "a blend": (lambda m, y: torch.lerp(y, y.sin(), m.q), ()),
    "a blend by what is computed": (lambda m, y: torch.lerp(y, y.sin(), m.q * m.q), ()),
    "a slope, of a node that is called where": (lambda m, y: torch.where(y > 0, y, m.q * y), ()),
}


@pytest.mark.parametrize("name", OF_TENSORS)
@pytest.mark.parametrize("made", [nn.Parameter, nn.Buffer])
def test_activations_read_their_tensors_as_they_are(name: str, made: Any) -> None:
    activation, shape = OF_TENSORS[name]
    q = made(torch.rand(shape, generator=torch.Generator().manual_seed(1)) / 2 + 0.2)

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.c(torch.relu(x + m.b(activation(m, m.a(x)))))

    model = ready(Apply(forward, a=conv(), b=conv(), c=conv(), q=q))
    linked = rmfx.remove_residuals(model, image(), differentiable=True)
    report = rmfx.report(linked)
    assert report.removed == (not shape), str(report)  # bounds per channel are weights, too
    for _ in range(2):
        assert_equivalent(model, linked, image())
        assert_same_gradients(model, linked, (image(3, 4, 7, 8),))
        with torch.no_grad():
            model.q.add_(0.1)
            model.a.weight.mul_(0.9)


def test_bounds_per_channel_of_a_result_follow_it() -> None:
    model = ready(chain(Residual(basic_branch(act=nn.ReLU6())), Residual(basic_branch())))
    plain = rmfx.remove_residuals(model, image())
    assert any("low" in name for name, _ in plain.named_buffers())
    linked = rmfx.remove_residuals(plain, image(), differentiable=True)
    assert_equivalent(model, linked, image())


# ---- names ---------------------------------------------------------------------------------------
def test_code_that_makes_weights_takes_no_name_of_a_sum() -> None:
    """Both call `add`, and a check finds sums by their names."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.conv2d(x, m.a.weight + 1, padding=1)
        return x + y.softmax(1)

    model = ready(Apply(forward, a=conv()))
    linked = rmfx.remove_residuals(model, image(), differentiable=True)
    assert rmfx.report(linked).verification is not None
    assert_equivalent(model, linked, image(3, 4, 7, 8))
    assert_same_gradients(model, linked, (image(),))


@pytest.mark.parametrize(
    "before",
    [
        lambda model: rmfx.close_carries(rmfx.remove_residuals(model, image()), image()),
        lambda model: rmfx.remove_residuals(model, image(), differentiable=True),
        lambda model: rmfx.remove_residuals(model, image()),
    ],
)
def test_a_result_can_be_converted_again(before: Any) -> None:
    earlier = before(network())
    linked = rmfx.remove_residuals(earlier, image(), differentiable=True)
    again = rmfx.remove_residuals(linked, image(), differentiable=True)
    for result in (linked, again):
        assert_equivalent(earlier, result, image(3, 4, 7, 8))
        assert_same_gradients(earlier, result, (image(),))
