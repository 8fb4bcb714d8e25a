"""Relevance by captum and zennit: plain networks keep it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from builders import Residual, basic_branch, chain, conv, ready
from torch import Tensor, nn

import rmfx

captum = pytest.importorskip("captum.attr", reason="pip install 'rmfx[attribution]'")
attribution = pytest.importorskip("rmfx.attribution")


def small(act: type[nn.Module] = nn.ReLU) -> nn.Module:
    return ready(
        chain(
            *(conv(3, 4), act(), Residual(basic_branch(act=act())), act(), nn.MaxPool2d(2)),
            *(Residual(basic_branch(4, 8, stride=2, act=act()), conv(4, 8, 1, stride=2)), act()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
        ),
        torch.float32,
    )


@pytest.fixture
def photo() -> Tensor:
    return torch.rand(1, 3, 16, 12, generator=torch.Generator().manual_seed(0))


def share_of_biases(network: nn.Module, x: Tensor) -> float:
    network.requires_grad_(True)
    network(x)[0, 2].backward()
    biases = (getattr(layer, "bias", None) for layer in network.modules())
    return sum((b.detach() @ b.grad).item() for b in biases if isinstance(b, nn.Parameter))


WAYS: dict[str, Any] = {
    "auto": "auto",
    "relu": "relu",
    "odd pairs": {"odd-pair"},
    "masks": {"identity", "masked"},
    "a range": {"identity", "per-channel"},
}


@pytest.mark.parametrize("way", WAYS)
def test_pixels_and_biases_make_the_score(way: str, photo: Tensor) -> None:
    model = small()
    plain = rmfx.remove_residuals(model, photo, activation=WAYS[way])
    relevance = attribution.LRP(plain).attribute(photo, target=2)
    assert relevance.shape == photo.shape
    share = share_of_biases(rmfx.to_sequential(plain), photo)
    score = float(model(photo)[0, 2].detach())
    assert float(relevance.sum()) + share == pytest.approx(score, rel=1e-3)


def test_the_residual_network_loses_the_sum(photo: Tensor) -> None:
    """Without a word: captum follows gradients at an addition."""
    residual = rmfx.fold_batch_norm(small(), photo)
    for layer in residual.modules():
        if isinstance(getattr(layer, "bias", None), nn.Parameter):
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    plain = rmfx.remove_residuals(residual, photo)
    score = float(residual(photo)[0, 2].detach())
    kept = float(attribution.LRP(plain).attribute(photo, target=2).sum())
    assert kept == pytest.approx(score, rel=1e-3)
    for layer in residual.modules():
        if isinstance(layer, nn.Flatten):
            layer.rule = attribution.EpsilonRule()
    lost = captum.LRP(residual).attribute(photo.clone().requires_grad_(), target=2)
    assert abs(lost.sum().item() - score) > 0.1 * abs(score)


@pytest.mark.parametrize("act", [nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Tanh])
def test_other_activations_hand_relevance_on(act: type[nn.Module], photo: Tensor) -> None:
    plain = rmfx.remove_residuals(small(act), photo)
    lrp = attribution.LRP(plain)
    relevance = lrp.attribute(photo, target=2)
    assert relevance.isfinite().all()
    assert torch.equal(lrp.attribute(photo, target=2), relevance)  # the second call has rules, too


def test_the_network_stays_as_it_is(photo: Tensor) -> None:
    network = rmfx.to_sequential(rmfx.remove_residuals(small(), photo))
    before = copy.deepcopy(network.state_dict())
    attribution.LRP(network).attribute(photo, target=2)
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(hasattr(layer, "rule") for layer in network)


def test_what_has_no_rule_is_named(photo: Tensor) -> None:
    plain = rmfx.remove_residuals(nn.Sequential(small(), nn.Softmax(1)).eval(), photo)
    with pytest.raises(rmfx.RmfxError, match=r"Softmax; leave it off: network\[:-1\]"):
        attribution.LRP(plain)
    with pytest.raises(rmfx.NotPlainError, match="is read by"):
        attribution.LRP(small())


def test_what_other_tools_left_on_a_network_is_in_nobodys_way() -> None:
    """Captum's own LRP knows no Flatten, and where it fails it leaves hooks and rules."""
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).eval()
    x = torch.rand(1, 1, 4, 4)
    expected = attribution.LRP(network).attribute(x, target=0)
    with pytest.raises(TypeError):
        captum.LRP(network).attribute(x, target=0)
    assert torch.equal(attribution.LRP(network).attribute((x,), target=0), expected)


def test_half_types_are_refused_instead_of_nan() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).eval()
    with pytest.raises(rmfx.RmfxError, match="float16"):
        attribution.LRP(network.half()).attribute(torch.rand(1, 1, 4, 4).half(), target=0)
