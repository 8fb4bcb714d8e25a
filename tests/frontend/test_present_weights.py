"""Weights that layers compute at every call: read as they are, told in the report, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import (
    Residual,
    adds,
    assert_refused,
    assert_removed,
    assert_same,
    chain,
    conv,
    conv_branch,
    image,
    ready,
    snapshot,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import rmfx
from rmfx.testing import assert_equivalent

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export"),
]


class Scaled(nn.Module):
    """A parametrization as a user writes it."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / (1 + weight.abs().amax())


class EveryOther(prune.BasePruningMethod):
    """A way to prune as a user writes it."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        mask = default_mask.clone()
        mask.view(-1)[::2] = 0
        return mask


def pruned_twice(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.3)
    prune.random_unstructured(layer, "weight", 0.3)
    prune.l1_unstructured(layer, "bias", 0.5)


def normed_and_pruned(layer: nn.Module) -> None:
    nn.utils.weight_norm(layer)
    prune.l1_unstructured(layer, "bias", 0.5)


HOOKS: dict[str, Callable[[nn.Module], object]] = {
    "remove_weight_norm": nn.utils.weight_norm,
    "remove_spectral_norm": nn.utils.spectral_norm,
    "prune.remove": pruned_twice,
    "remove_weight_norm and torch.nn.utils.prune.remove": normed_and_pruned,
}
COMPUTED: dict[str, Callable[[nn.Module], object]] = {
    **HOOKS,
    "own pruning": lambda layer: EveryOther.apply(layer, "weight"),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", Scaled()),
}
every_kind = pytest.mark.parametrize("kind", COMPUTED.values(), ids=[*COMPUTED])


def network(kind: Callable[[nn.Module], object], dims: int = 2) -> Any:
    model = chain(conv(dims=dims), Residual(chain(conv(dims=dims), nn.ReLU(), conv(dims=dims))))
    for layer in (model[0], model[1].branch[0], model[1].branch[2]):
        kind(layer)
    return ready(model)


@every_kind
def test_computed_weights_are_read_and_told(kind: Callable[[nn.Module], object]) -> None:
    model = network(kind)
    before = snapshot(model)
    converted = assert_removed(model, image())
    assert_same(before, snapshot(model))
    report = rmfx.report(converted)
    assert [row.place for row in report.held] == ["0", "1.branch.0", "1.branch.2"]
    assert all("at every call" in row.what for row in report.held)
    assert str(report.held[0]) in str(report)
    assert report.to_dict()["held"][0]["place"] == "0"
    assert not any(m._forward_pre_hooks for m in converted.modules())
    assert not any(parametrize.is_parametrized(m) for m in converted.modules())


@every_kind
@pytest.mark.parametrize("differentiable", [True, False])
def test_what_hooks_set_holds_numbers_after_a_conversion(kind: Any, differentiable: bool) -> None:
    for inputs, verify in ((image(), True), (image(), False), (None, True)):
        model = network(kind)
        held = [{name: type(value) for name, value in vars(m).items()} for m in model.modules()]
        rmfx.remove_residuals(model, inputs, differentiable=differentiable, verify=verify)
        for module, before in zip(model.modules(), held, strict=True):
            assert {name: type(value) for name, value in vars(module).items()} == before
            tensors = [value for value in vars(module).values() if isinstance(value, Tensor)]
            assert not any(tensor.is_meta for tensor in tensors)


@every_kind
def test_other_ways_to_hold_the_model_give_the_same(kind: Callable[[nn.Module], object]) -> None:
    model = network(kind, dims=1)
    x = torch.randn(2, 4, 9, dtype=torch.float64)
    assert_removed(torch.fx.symbolic_trace(model), x)
    assert_equivalent(model, rmfx.remove_residuals(torch.export.export(model, (x,)), x), (x,))
    found: list[rmfx.Report] = []
    torch._dynamo.reset()
    options = {"backend": "eager", "on_report": found.append}
    compiled: Any = torch.compile(model, backend="rmfx", options=options)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert [report.removed for report in found] == [1]


@pytest.mark.parametrize("kind", [nn.utils.weight_norm, parametrizations.weight_norm, pruned_twice])
def test_a_compiled_network_notices_what_its_weights_are_computed_of(kind: Any) -> None:
    model = network(kind, dims=1)
    x = torch.randn(2, 4, 9, dtype=torch.float64)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="rmfx", options={"backend": "eager"})
    with torch.no_grad():
        before = compiled(x)
        for p in model.parameters():
            p.mul_(1.5)
        torch.testing.assert_close(compiled(x), model(x))
        assert not torch.allclose(compiled(x), before)


def test_pruning_reads_computed_weights_too() -> None:
    x = image()
    smaller, report = rmfx.prune_channels(
        network(parametrizations.weight_norm), x, target=0.8, importance="l2"
    )
    assert report.macs_after < report.macs_before
    assert smaller(x).shape == x.shape


@pytest.mark.parametrize("remedy", HOOKS)
def test_where_weights_must_follow_the_remedy_is_named(remedy: str) -> None:
    """Straight after the hook was put there: its weight has a gradient, and no copy."""
    model = ready(Residual(conv_branch()))
    HOOKS[remedy](model.branch[2])
    assert_refused(model, image(), reason=remedy, differentiable=True)


def test_the_remedy_against_parametrizations_is_named_and_works() -> None:
    model = ready(Residual(conv_branch()))
    parametrizations.weight_norm(model.branch[0])
    reason = "remove_parametrizations"
    assert_refused(model, image(), reason=reason, differentiable=True)
    parametrize.remove_parametrizations(model.branch[0], "weight")
    assert rmfx.report(rmfx.remove_residuals(model, differentiable=True)).removed == 1


class Counting(nn.Module):
    """A parametrization that gives another weight each time."""

    calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return weight * self.calls


def test_a_weight_that_is_another_each_time_is_not_read() -> None:
    model = ready(Residual(conv_branch()))
    counting = Counting()
    parametrize.register_parametrization(model.branch[0], "weight", counting)
    calls = counting.calls
    (row,) = rmfx.report(rmfx.remove_residuals(model)).rows
    assert "remove_parametrizations" in row.reason
    assert counting.calls == calls


def test_spectral_norm_that_still_iterates_is_not_read() -> None:
    model = ready(Residual(conv_branch()))
    parametrizations.spectral_norm(model.branch[0])
    model.branch[0].parametrizations.train()
    before = copy.deepcopy(model.state_dict())
    (row,) = rmfx.report(rmfx.remove_residuals(model)).rows
    assert "remove_parametrizations" in row.reason
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_other_hooks_beside_a_computed_weight_are_kept() -> None:
    model = ready(Residual(conv_branch()))
    nn.utils.weight_norm(model.branch[2])
    model.branch[2].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert_refused(model, image(), reason="has hooks")


def test_a_computed_batch_norm_is_folded() -> None:
    model = ready(Residual(chain(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv())))
    parametrize.register_parametrization(model.branch[1], "weight", Scaled())
    parametrize.register_parametrization(model.branch[1], "running_mean", Scaled())
    assert adds(assert_removed(model, image())) == 0
