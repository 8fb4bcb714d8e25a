"""Odd pairs beside activations with a slope for each channel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import Residual, assert_refused, assert_removed, chain, conv, image, ready
from torch import Tensor, nn

import rmfx


def slopes(count: int, low: float = -2.0, high: float = 2.0) -> nn.PReLU:
    layer = nn.PReLU(count)
    nn.init.uniform_(layer.weight, low, high)
    return layer


def branch(*activations: nn.Module, channels: int = 6) -> nn.Sequential:
    """Convolutions with activations between them."""
    inner: list[nn.Module] = []
    for act in activations[1:]:
        inner += [conv(channels, channels), act]
    return chain(conv(4, channels), activations[0], *inner, conv(channels, 4))


@pytest.mark.parametrize(
    ("activations", "exactness"),
    [
        ([slopes(6)], "bit-exact"),
        ([slopes(6, -1.0, -1.0)], "bit-exact"),  # of which none has an odd part of its own
        ([slopes(6), slopes(6)], "bit-exact"),
        ([slopes(6), nn.ReLU()], "bit-exact"),
        ([nn.LeakyReLU(0.3), slopes(6)], "rounding"),
        ([nn.SiLU(), slopes(6)], "rounding"),
    ],
)
@pytest.mark.parametrize("option", ["odd-pair", "relu"])
def test_a_pair_passes_slopes_that_differ(
    activations: list[nn.Module], exactness: str, option: str
) -> None:
    model = ready(Residual(branch(*activations)))
    converted = assert_removed(model, image(), strategy="odd-pair", activation=option)
    assert [row.exactness for row in rmfx.report(converted).rows] == [exactness]


def test_a_site_around_one_that_has_a_pair_has_one_too() -> None:
    inner = Residual(branch(slopes(6)))
    model = ready(Residual(chain(conv(), slopes(4), inner, nn.ReLU(), conv())))
    assert_removed(model, image(), sites=2, strategy="odd-pair", activation="odd-pair")


def test_features_have_slopes_of_their_own() -> None:
    model: Any = ready(Residual(chain(nn.Linear(4, 6), slopes(6), nn.Linear(6, 4))))
    x: Tensor = torch.randn(3, 4, dtype=torch.float64)
    assert_removed(model, x, strategy="odd-pair", activation="odd-pair", without_inputs=False)


def test_for_gradients_a_pair_is_none() -> None:
    model = ready(Residual(branch(slopes(6))))
    reason = "for gradients"
    assert_refused(model, image(), reason=reason, activation="odd-pair", differentiable=True)
