"""The demo's network and digits. The command itself is tested in tests/cli."""

from __future__ import annotations

import torch

from rmfx.demo import load_digits, load_model
from rmfx.demo.run import Speed


def test_digits_are_500_images_of_ten_kinds() -> None:
    images, labels = load_digits()
    assert images.shape == (500, 1, 28, 28)
    assert images.dtype == torch.float32
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)
    assert labels.bincount().tolist() == [50] * 10


def test_model_is_trained_and_ready_for_inference() -> None:
    model, (images, labels) = load_model(), load_digits()
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert float((model(images).argmax(1) == labels).double().mean()) > 0.97


def test_batch_norm_statistics_are_not_fresh() -> None:
    """A network with mean 0 and variance 1 everywhere would hide errors of a conversion."""
    for name, buffer in load_model().named_buffers():
        if name.endswith("running_var"):
            assert (buffer - 1).abs().max() > 0.1, name


def test_speeds_agree_with_their_ratio() -> None:
    """The median of the rounds after is 2, and that of the ratios 0.9."""
    found = Speed("eager", (1.0, 1.0, 3.0, 3.0, 1.0), (0.9, 0.9, 2.0, 2.0, 2.0)).to_dict()
    assert found["before"] == {"median": 1.0, "low": 1.0, "high": 3.0}
    assert found["after"]["median"] == found["ratio"]["median"] == 0.9
    assert not found["ratio"]["beyond_noise"]
    assert set(Speed("inductor", note="no compiler").to_dict()) == {"runtime", "note"}
