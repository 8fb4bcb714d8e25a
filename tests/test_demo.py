"""The demo's network, digits and stop-watch. The command itself is tested in test_cli.py."""

from __future__ import annotations

import torch

from rmfx.demo import load_digits, load_model
from rmfx.demo.latency import measure


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


def test_latency_is_measured_on_one_thread_and_threads_come_back() -> None:
    seen = set()
    threads = torch.get_num_threads()
    found = measure({"probe": lambda: seen.add(torch.get_num_threads())}, rounds=3, seconds=0.001)
    assert seen == {1}
    assert torch.get_num_threads() == threads
    assert 0 < found["probe"].low <= found["probe"].median <= found["probe"].high
