"""Trained networks on real photos: nothing changes. Needs `python benchmarks/fetch_weights.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import rmfx
from rmfx.testing import assert_equivalent

pytest.importorskip("PIL", reason="photos need pillow: pip install pillow")
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import _weights
import real_weights

pytestmark = pytest.mark.weights

JOIN_TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=sorted(real_weights.CASES))
def name(request: pytest.FixtureRequest) -> str:
    """Each network in turn; skips where it or its photos are not installed."""
    case = real_weights.CASES[request.param]
    try:
        case.load(), case.photos()
    except _weights.MissingWeightsError as error:
        pytest.skip(str(error))
    return str(request.param)


def test_original_network_is_has_its_known_accuracy(name: str) -> None:
    """Guards the loader and the preprocessing: a wrong one would make the rest meaningless."""
    case = real_weights.CASES[name]
    images, labels = case.photos()
    with torch.no_grad():
        predicted = case.load()(images).argmax(1)
    assert int((predicted == labels).sum()) == case.correct


def test_converted_network_answers_the_same_on_every_photo(name: str) -> None:
    outcome = real_weights.evaluate(name)
    assert outcome.adds_before == real_weights.CASES[name].adds
    assert outcome.adds_left == 0
    assert outcome.changed == 0
    assert outcome.correct_after == outcome.correct_before
    assert outcome.relative_error <= real_weights.ERROR_LIMIT


def test_every_join_keeps_its_value(name: str) -> None:
    case = real_weights.CASES[name]
    images = case.photos().images[:4]
    model = case.load()
    converted = rmfx.remove_residuals(model, images[:1], strict=True)
    assert_equivalent(model, converted, images, tolerance=JOIN_TOLERANCE)


def test_lite0_carries_values_that_relu6_would_clip() -> None:
    """The reason this network is here: a carry through a plain ReLU6 would be wrong on it."""
    try:
        model = _weights.load_efficientnet_lite0()
        images = _weights.imagenet_photos().images[:4]
    except _weights.MissingWeightsError as error:
        pytest.skip(str(error))
    seen: list[float] = []
    for block in model.get_submodule("_blocks").children():
        block.register_forward_hook(lambda *call: seen.append(float(call[-1].abs().max())))
    with torch.no_grad():
        model(images)
    assert max(seen) > 6.0
