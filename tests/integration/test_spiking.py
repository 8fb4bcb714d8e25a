"""Plain networks as spiking ones: simulated, and as the mapper of a chip reads them."""

from __future__ import annotations

import copy
import sys
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from builders import ready
from torch import Tensor, nn

import rmfx
from rmfx.demo import load_digits, load_model

pytestmark = pytest.mark.bench
INSTALL = "pip install 'rmfx[spiking]'"
DRIVER = ("samna", "samnagui", *(f"samna.{chip}" for chip in ("dynapcnn", "speck2e", "speck2f")))


class Small(nn.Module):
    """A residual network of the layers that a chip of spiking neurons has, and one addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool1 = nn.Conv2d(1, 8, 3, padding=1), nn.AvgPool2d(2)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.pool2, self.head = nn.AvgPool2d(2), nn.Linear(8 * 7 * 7, 10)
        self.relu1, self.relu2, self.relu3, self.relu4 = (nn.ReLU() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu1(self.stem(x)))
        x = self.pool2(self.relu3(x + self.b(self.relu2(self.a(x)))))
        return self.relu4(self.head(x.flatten(1)))  # type: ignore[no-any-return]


def plain_of(model: nn.Module, x: Tensor) -> nn.Sequential:
    network = rmfx.to_sequential(rmfx.remove_residuals(model, x, activation="relu"))
    activations = [m for m in network if not isinstance(m, (nn.Conv2d, nn.Linear))]
    kinds = {type(m) for m in activations}
    assert kinds <= {nn.ReLU, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten}
    return network


def test_a_spiking_network_answers_like_the_residual_one() -> None:
    from_torch = pytest.importorskip("sinabs.from_torch", reason=INSTALL)
    images, _ = (x[:10] for x in load_digits())
    model = load_model()
    network, steps = plain_of(model, images[:1]), 24
    made = from_torch.from_model(copy.deepcopy(network), batch_size=10, min_v_mem=None)
    assert not any(isinstance(m, (nn.ReLU, nn.ReLU6)) for m in made.spiking_model.modules())
    with torch.no_grad():
        shown = made.spiking_model(images.repeat_interleave(steps, 0))
        outputs = shown.reshape(10, steps, -1).mean(1)
        assert torch.equal(outputs.argmax(1), model(images).argmax(1))


def test_spikingjelly_takes_the_plain_network_alone() -> None:
    ann2snn = pytest.importorskip("spikingjelly.activation_based.ann2snn", reason=INSTALL)
    images, labels = (x[:4] for x in load_digits())
    model = load_model()

    def spiking(network: nn.Module) -> Any:
        recipe = ann2snn.RateCodingRecipe(dataloader=[(images, labels)], mode="max")
        return ann2snn.Converter(recipe).convert(copy.deepcopy(network)).eval()

    made = spiking(plain_of(model, images[:1]))
    with torch.no_grad():
        outputs = sum(made(images) for _ in range(256))
        assert torch.equal(outputs.argmax(1), model(images).argmax(1))
    with pytest.raises(ValueError, match="ReLU6"):
        spiking(model)


def test_the_mapper_of_a_chip_reads_the_plain_network_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What sinabs checks before it talks to a DYNAP-CNN; the driver is not there."""
    from_torch = pytest.importorskip("sinabs.from_torch", reason=INSTALL)
    for name in (*DRIVER, *(f"{name}.configuration" for name in DRIVER[2:])):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    dynapcnn = pytest.importorskip("sinabs.backend.dynapcnn", reason=INSTALL)
    model, x = ready(Small(), torch.float32), torch.rand(1, 1, 28, 28)

    def mapped(network: nn.Module) -> Any:
        made = from_torch.from_model(copy.deepcopy(network), input_shape=(1, 28, 28), batch_size=1)
        return dynapcnn.DynapcnnNetwork(made, input_shape=(1, 28, 28), discretize=False)

    assert len(mapped(plain_of(model, x)).dynapcnn_layers) == 4
    with pytest.raises((RuntimeError, ValueError)):
        mapped(model)
