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
