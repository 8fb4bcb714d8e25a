"""Helpers for training around pruning."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import (
    Residual,
    assert_same,
    chain,
    conv,
    conv_bn,
    conv_branch,
    image,
    ready,
    snapshot,
    types,
)
from torch import nn
from torch.nn.utils import parametrize

import rmfx
from rmfx import training
from rmfx.errors import OptionError, WeightError


def test_inserted_batch_norms_change_nothing_and_train_from_where_they_are() -> None:
    model = ready(
        chain(conv(3, 4), nn.ReLU(), Residual(chain(conv_bn(4, 8), nn.ReLU(), conv(8, 4))))
    )
    data = [image(4, 3, 9, 9), 2 * image(4, 3, 9, 9) + 1]
    before = snapshot(model)
    made = rmfx.insert_batch_norm(model, data)
    assert_same(before, snapshot(model))
    assert types(made).count("BatchNorm2d") == 3
    torch.testing.assert_close(made(data[0]), model(data[0]), rtol=1e-12, atol=1e-12)
    norm: Any = made.get_submodule("0_norm")
    values = model[0](torch.cat(data)).transpose(0, 1).flatten(1)
    torch.testing.assert_close(norm.running_mean, values.mean(1).detach())
    torch.testing.assert_close(norm.running_var, values.var(1, correction=0).detach())
    assert types(rmfx.insert_batch_norm(made, data)) == types(made)


def test_a_plain_network_gets_its_batch_norms_back() -> None:
    model = ready(
        chain(conv_bn(3, 4), nn.ReLU(), Residual(chain(conv_bn(4, 4), nn.ReLU(), conv(4, 4))))
    )
    x = image(4, 3, 9, 9)
    plain = rmfx.remove_residuals(model, x)
    made = rmfx.insert_batch_norm(plain, [x], layers=("2.*",))
    assert types(made).count("BatchNorm2d") == 2
    torch.testing.assert_close(made(x), model(x), rtol=1e-11, atol=1e-11)
    assert rmfx.report(rmfx.remove_residuals(made, x)).rows == ()
    with pytest.raises(rmfx.ShapeError, match="no batch"):
        rmfx.insert_batch_norm(model, [])


def test_slimming_reaches_zero_and_what_is_zero_goes_for_nothing() -> None:
    model = chain(conv_bn(3, 8), nn.ReLU(), conv(8, 2))
    slimming = training.Slimming(model, strength=1.0)
    scale: Any = model[0][1].weight  # type: ignore[index]
    with torch.no_grad():
        scale.copy_(torch.tensor([-0.3, -0.05, 0.0, 0.05, 0.2, 1.0, -1.0, 0.1]))
    slimming.step(0.1)
    expected = torch.tensor([-0.2, 0.0, 0.0, 0.0, 0.1, 0.9, -0.9, 0.0])
    torch.testing.assert_close(scale.detach(), expected)
    assert slimming.zeros() == 4
    for strength, module in ((-1.0, model), (1.0, conv())):
        with pytest.raises(rmfx.RmfxError, match=r"strength|insert_batch_norm"):
            training.Slimming(module, strength)


def test_distillation_is_the_mean_of_both_losses() -> None:
    teacher, x = nn.Linear(4, 3), torch.randn(5, 4)
    output, target = torch.randn(5, 3, requires_grad=True), torch.tensor([0, 1, 2, 0, 1])
    own = F.cross_entropy(output, target)
    only_own = training.Distillation(teacher, weight=0.0)
    torch.testing.assert_close(only_own(x, output, target), own)
    only_taught = training.Distillation(teacher, weight=1.0, temperature=2.0)
    p, q = (F.softmax(logits / 2, 1) for logits in (teacher(x), output))
    expected = 4 * (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(only_taught(x, output, target), expected)
    torch.testing.assert_close(only_taught(x, teacher(x), target).detach(), torch.tensor(0.0))
    with pytest.raises(rmfx.RmfxError, match="temperature"):
        training.Distillation(teacher, temperature=0)
    with pytest.raises(rmfx.RmfxError, match="finite"):
        training.Distillation(teacher, temperature=float("inf"))


def test_targets_fall_to_the_last() -> None:
    shares = list(training.gradual_targets(0.25, 5))
    assert shares == sorted(shares, reverse=True)
    assert (len(shares), shares[-1]) == (5, 0.25)
    with pytest.raises(rmfx.RmfxError, match="steps=0 must be a whole number"):
        list(training.gradual_targets(0.5, 0))


@pytest.mark.parametrize("signed", [False, True])
def test_frozen_carries_can_be_closed_after_training(signed: bool) -> None:
    torch.manual_seed(0)
    block = Residual(chain(conv_bn(4, 6), nn.ReLU(), conv_bn(6, 4)))
    model = ready(chain(conv_bn(3, 4), nn.Identity() if signed else nn.ReLU(), block))
    x = image(4, 3, 9, 9)
    plain = rmfx.remove_residuals(model, x)
    for frozen, adds in ((True, 1), (False, 0)):
        trained: Any = rmfx.remove_residuals(model, x)
        assert (training.freeze_carries(trained) == 4) if frozen else True
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            trained(x).square().mean().backward()
            optimizer.step()
        training.thaw_carries(trained)
        assert float((trained(x) - plain(x)).detach().abs().max()) > 1e-3
        back = rmfx.close_carries(trained.eval(), x)
        assert rmfx.cost.count(back, x).adds == adds
        torch.testing.assert_close(back(x), trained(x), rtol=1e-11, atol=1e-11)


def test_copies_of_what_is_frozen_stay_frozen() -> None:
    plain = rmfx.remove_residuals(ready(Residual(conv_branch())), image())
    assert training.freeze_carries(plain) > 0
    other = copy.deepcopy(plain)
    training.thaw_carries(plain)
    assert torch.equal(other(image()), plain(image()))
    training.thaw_carries(other)
    assert list(other.state_dict()) == list(plain.state_dict())


def test_what_is_thawed_is_what_the_optimiser_knows() -> None:
    plain = rmfx.remove_residuals(ready(Residual(conv_branch())), image())
    before = [id(p) for p in plain.parameters()]
    training.freeze_carries(plain)
    assert {id(p) for p in plain.parameters()} == set(before)
    training.thaw_carries(plain)
    assert {id(p) for p in plain.parameters()} == set(before)


def test_other_parametrizations_stand_in_the_way_of_thawing() -> None:
    plain = rmfx.remove_residuals(ready(Residual(conv_branch())), image())
    training.freeze_carries(plain)
    held = next(m for m in plain.modules() if parametrize.is_parametrized(m, "weight"))
    parametrize.register_parametrization(held, "weight", nn.Tanh())
    with pytest.raises(WeightError, match="its weight is parametrized otherwise"):
        training.thaw_carries(plain)


@pytest.mark.parametrize("strength", [-1.0, float("inf"), float("nan"), "a"])
def test_a_strength_that_makes_no_sense(strength: Any) -> None:
    with pytest.raises(OptionError, match="strength="):
        training.Slimming(nn.BatchNorm2d(2), strength)


def test_a_rate_that_makes_no_sense() -> None:
    with pytest.raises(OptionError, match="learning_rate=-1"):
        training.Slimming(nn.BatchNorm2d(2), 0.1).step(-1)


def test_wrong_options_are_said_at_once() -> None:
    with pytest.raises(rmfx.RmfxError, match=r"steps=2\.5 must be a whole number"):
        training.gradual_targets(0.5, 2.5)  # type: ignore[arg-type]
    norm = nn.BatchNorm2d(3)
    with pytest.raises(rmfx.RmfxError, match="scales is a tensor"):
        training.Slimming(norm, 0.1, scales=norm.weight)
    with pytest.raises(rmfx.RmfxError, match="must be a finite number"):
        training.Slimming(norm, 0.1).step(float("inf"))
