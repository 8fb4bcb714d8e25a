"""The demo's network and digits. The command itself is tested in tests/cli."""

from __future__ import annotations

import torch

from rmfx.demo import load_digits, load_model


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
