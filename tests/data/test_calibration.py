"""Statistics of values, and batch norms that are the identity whatever the statistics."""

from __future__ import annotations

import pytest
import torch
from builders import Apply, Residual, basic_branch, chain, conv, image, ready
from torch import nn

import rmfx
from rmfx.passes.calibration import Moments, identity_norm, measure


def test_moments_are_those_of_all_batches_together() -> None:
    stem = ready(chain(conv(4, 6), nn.ReLU()))
    gm = rmfx.trace(ready(chain(*stem, Residual(conv(6, 6)))))
    batches = [image(2, 4, 5, 6), 2 + image(3, 4, 8, 8)]
    found = measure(gm, batches).moments
    assert "_1" in found  # the fork; values that are read once are no fork
    with torch.no_grad():
        values = torch.cat([stem(b).transpose(0, 1).flatten(1) for b in batches], 1)
    assert torch.allclose(found["_1"].mean, values.mean(1))
    assert torch.allclose(found["_1"].variance, values.var(1, unbiased=False))
    assert found["_1"].mean.dtype == torch.float64


def test_a_batch_may_be_a_tuple_of_arguments() -> None:
    gm = rmfx.trace(ready(chain(conv(), Residual(conv()))))
    one, other = measure(gm, [image()]).moments, measure(gm, [(image(),)]).moments
    assert torch.equal(one["_0"].mean, other["_0"].mean)


def test_an_empty_loader_is_an_error() -> None:
    model = ready(Residual(basic_branch()))
    with pytest.raises(rmfx.ShapeError, match="holds no batch"):
        rmfx.remove_residuals(model, fold_batch_norm=False, calibration=[])


def test_batches_that_do_not_fit_are_an_error_of_rmfx() -> None:
    model = ready(Residual(basic_branch()))
    with pytest.raises(rmfx.RmfxError):
        rmfx.remove_residuals(model, fold_batch_norm=False, calibration=[image(1, 5, 8, 8)])


def test_values_whose_channels_change_with_the_size_do_not_disturb() -> None:
    tokens = Apply(lambda m, x: x.flatten(2).transpose(1, 2))
    model = ready(chain(Residual(basic_branch()), tokens))
    batches = [image(1, 4, 8, 8), image(1, 4, 6, 6)]
    converted = rmfx.remove_residuals(model, fold_batch_norm=False, calibration=batches)
    assert rmfx.report(converted).removed == 1


def test_values_without_numbers_do_not_disturb() -> None:
    """Such as what a slice leaves of a map that is too small."""
    network = Apply(lambda m, x: (x + m.conv(x), x[..., 9:]), conv=basic_branch())
    batches = [image(1, 4, 8, 8), image(1, 4, 12, 12), image(2, 4, 8, 8)]
    for names in ("auto", ("shift",)):
        converted = rmfx.remove_residuals(
            ready(network), batches[0], fold_batch_norm=False, activation=names, calibration=batches
        )
        assert rmfx.report(converted).removed == (names == "auto")
    found = measure(rmfx.trace(ready(network)), batches, extremes=True, wanted=lambda node: True)
    assert found.moments["getitem"].count == 12 * 3
    assert found.extremes["getitem"][0].low.isfinite().all()


def test_extremes_of_values_that_change_their_channels_hold_all_of_them() -> None:
    """Those of the last batch alone are no bound for what came before."""
    gm = rmfx.trace(ready(chain(conv(), nn.Flatten(2))))
    found = measure(gm, [100 * image(1, 4, 6, 6), image(1, 4, 8, 8)], extremes=True).extremes
    channels, tokens = found["_1"]
    assert channels.high.numel() == 4
    assert tokens.high.tolist() == [float(channels.high.max())]
    assert tokens.high.max() > 20


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 30.0])
def test_widened_norm_is_the_identity_on_the_carry(dtype: torch.dtype, scale: float) -> None:
    norm = ready(nn.BatchNorm2d(3), dtype)
    carry = scale * image(2, 2, 4, 4, dtype=dtype) + scale
    rows = carry.double().transpose(0, 1).flatten(1)
    wide = identity_norm(norm, 2, Moments(1, rows.mean(1), rows.var(1, unbiased=False)))
    x = image(2, 3, 4, 4, dtype=dtype)
    with torch.no_grad():
        out = wide(torch.cat([x, carry], 1))
    bound = {torch.float64: 1e-14, torch.float32: 1e-5, torch.float16: 1e-2}[dtype]
    assert torch.allclose(out[:, :3], norm(x), rtol=bound, atol=bound)
    assert float((out[:, 3:] - carry).abs().max()) <= bound * float(carry.abs().max())


def test_widened_norm_without_statistics_is_the_identity_too() -> None:
    wide = identity_norm(ready(nn.BatchNorm1d(3)), 2, None)
    x = image(4, 5)
    assert torch.allclose(wide(x)[:, 3:], x[:, 3:])
    assert wide.running_mean[3:].eq(0).all()
    assert wide.running_var[3:].eq(1).all()


def test_statistics_cover_zero_padded_carries() -> None:
    moments = Moments(1, torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64) * 4)
    wide = identity_norm(ready(nn.BatchNorm2d(3)), 4, moments)
    assert wide.running_mean[3:].tolist() == [1, 1, 0, 0]
    assert wide.running_var[3:].tolist() == [4, 4, 1, 1]


def test_widened_norm_keeps_momentum_eps_and_own_statistics() -> None:
    norm = ready(nn.BatchNorm2d(3, eps=0.01, momentum=0.3))
    wide = identity_norm(norm, 2, None)
    assert (wide.eps, wide.momentum, wide.num_features) == (0.01, 0.3, 5)
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(wide, name)[:3], getattr(norm, name))
    assert not wide.training


def test_norm_without_weight_gets_one_for_the_carry() -> None:
    norm = ready(nn.BatchNorm2d(3, affine=False))
    wide = identity_norm(norm, 1, None)
    x = image(2, 4, 3, 3)
    assert torch.allclose(wide(x)[:, :3], norm(x[:, :3]))
    assert torch.allclose(wide(x)[:, 3:], x[:, 3:])
