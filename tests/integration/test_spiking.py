"""Plain networks as spiking ones: simulated, and as the mapper of a chip reads them."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from builders import variables_of
from torch import Tensor, nn

import rmfx
from rmfx.demo import load_digits, load_model

pytestmark = pytest.mark.bench
INSTALL = "pip install 'rmfx[spiking]'"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "spiking.md"


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


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The variables that the page's code leaves behind; the chip's driver never runs."""
    pytest.importorskip("spikingjelly", reason=INSTALL)
    pytest.importorskip("sinabs", reason=INSTALL)
    with patch.dict(sys.modules):
        yield variables_of(PAGE, tmp_path_factory.mktemp("spiking"))


@pytest.mark.slow
def test_the_code_of_the_page_runs_as_it_stands_there(page: dict[str, Any]) -> None:
    answers = page["model"](page["shown"]).argmax(1)
    assert torch.equal(page["spikes"].mean(1).argmax(1), answers)
    assert torch.equal(page["rates"].argmax(1), answers[:4])


def test_the_mapper_of_a_chip_reads_the_plain_network(page: dict[str, Any]) -> None:
    """What sinabs checks before it talks to a DYNAP-CNN."""
    layers = page["mapped"](plain_of(page["small"], page["image"])).dynapcnn_layers
    assert [layer.conv_layer.out_channels for layer in layers.values()] == [8, 16, 8, 10]


def test_the_mapper_lacks_nothing_of_the_residual_network_but_the_addition(
    page: dict[str, Any],
) -> None:
    mapped, small = page["mapped"], page["Small"]
    assert len(mapped(small(lambda x, y: y)).dynapcnn_layers) == 4
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        mapped(small())
    with pytest.raises(Exception, match="Invalid edge"):
        mapped(small(importlib.import_module("sinabs.layers").Merge()))
