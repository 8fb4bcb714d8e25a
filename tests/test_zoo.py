"""Whole networks of the model zoo, at small input sizes: exact at every join, plain, and cheap.

benchmarks/zoo.py makes the same comparison at full size and prints it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import rmfx
import rmfx.cost

pytest.importorskip("torchvision", reason="the zoo needs torchvision: pip install torchvision")
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import _zoo
import authors
import cost as cost_benchmark
import torchvision
import zoo

from rmfx.models.cifar import cifar_resnet

NETS = _zoo.zoo()
TESTED = [name for name in NETS if name != "cifar1202B"]  # as slow as cifar1202A, and like 110B


@pytest.mark.zoo
@pytest.mark.parametrize("name", TESTED)
def test_network_is_exact_at_every_join_and_two_sizes(name: str) -> None:
    net = NETS[name]
    outcome = zoo.evaluate(net, small=True)
    assert not zoo.failures(net, outcome)


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_cost_at_full_size_is_within_the_limit(name: str) -> None:
    (limit,) = cost_benchmark.limits([cost_benchmark.measure(name)])
    assert limit.holds, limit


@pytest.mark.parametrize(
    ("name", "giga"), [("resnet18", 3.21), ("resnet50", 46.07), ("mobilenet_v2", 0.848)]
)
def test_model_of_the_authors_conversion_gives_their_cost(name: str, giga: float) -> None:
    found = authors.count(torchvision.models.get_model(name, weights=None))
    assert found is not None
    assert found.macs / 1e9 == pytest.approx(giga, abs=0.005)


@pytest.mark.parametrize(
    ("depth", "parameters", "macs"),
    [(56, 853_018, 125_485_696), (110, 1_727_962, 252_887_680)],
)
def test_cifar_resnet_has_its_known_size(depth: int, parameters: int, macs: int) -> None:
    model = cifar_resnet(depth).eval()
    x = torch.zeros(1, 3, 32, 32)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert rmfx.cost.count(rmfx.trace(model, x), x).macs == macs


@pytest.mark.parametrize(("depth", "shortcut"), [(21, "A"), (2, "A"), (20, "C")])
def test_cifar_resnet_refuses_what_does_not_exist(depth: int, shortcut: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        cifar_resnet(depth, shortcut)  # type: ignore[arg-type]


def test_randomised_batch_norms_keep_a_thousand_layers_sane() -> None:
    """Exploding or vanishing activations would make a relative error meaningless."""
    model = _zoo.prepared(NETS["cifar1202A"])
    with torch.no_grad():
        logits = model(_zoo.random_input(NETS["cifar1202A"].small_odd))
    assert 1e-3 < float(logits.abs().max()) < 1e6
