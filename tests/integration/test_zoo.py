"""Whole networks of the model zoo, at small input sizes: exact at every join, plain, and cheap.

benchmarks/zoo.py makes the same comparison with larger inputs and with many more networks.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import rmfx
import rmfx.cost

pytest.importorskip("torchvision", reason="the zoo needs torchvision: pip install torchvision")
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import _blocked
import _randomise
import _zoo
import authors
import cost as cost_benchmark
import torchvision
import zoo
from _common import Limit
from _records import Outcome, Store, markdown, share, summary
from _worker import Worker, WorkerError

from rmfx.models import C2fNet, Edsr, InceptionResNet, cifar_resnet, preactivation_resnet

NETS = _zoo.zoo()
# Left to benchmarks/zoo.py: a minute each, and like 110A and 110B; and like resnet50; and what
# tests/test_models.py has smaller ones of.
SLOW = ("cifar1202A", "cifar1202B", "resnet101", "resnet152", "wide_resnet50_2", "fcn_resnet50")
SLOW += ("mobilenet_v2_free",)
SLOW += tuple(name for name in NETS if name.startswith(("rmrep", "rmnext")))
TESTED = [name for name, net in NETS.items() if net.kind == "whole" and name not in SLOW]
CONTROLS = ["convnext_tiny", "squeezenet1_1", "densenet121"]  # quick, and without timm


@pytest.mark.slow
@pytest.mark.zoo
@pytest.mark.parametrize("name", TESTED)
def test_network_is_exact_at_every_join_and_two_sizes(name: str) -> None:
    net = NETS[name]
    outcome = zoo.evaluate(net, small=True)
    assert not zoo.failures(net, outcome)


@pytest.mark.slow
@pytest.mark.zoo
@pytest.mark.parametrize("name", CONTROLS)
def test_what_must_be_left_alone_is(name: str) -> None:
    outcome = zoo.evaluate(NETS[name], small=True)
    assert not zoo.failures(NETS[name], outcome)


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
        logits = model(_zoo.random_input(NETS["cifar1202A"].shapes.small_odd))
    assert 1e-3 < float(logits.abs().max()) < 1e6


# ---- the networks of rmfx.models ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "shape", "adds"),
    [
        (Edsr(blocks=3, features=8), (1, 3, 24, 18), 4),
        (C2fNet((16, 32), (1, 2)), (1, 10), 3),
        (preactivation_resnet(20), (1, 10), 9),
        (InceptionResNet(blocks=2, channels=16, width=8), (1, 10), 2),
    ],
    ids=lambda x: type(x).__name__,
)
def test_own_network_has_its_shape_and_additions(
    model: nn.Module, shape: tuple[int, ...], adds: int
) -> None:
    model = model.eval()
    x = torch.randn(1, 3, 12, 9)
    with torch.no_grad():
        assert model(x).shape == shape
    assert rmfx.cost.count(model, x).adds == adds


def test_preactivation_resnet_has_the_depth_it_says() -> None:
    convs = [m for m in preactivation_resnet(110).modules() if isinstance(m, nn.Conv2d)]
    projections = sum(conv.kernel_size == (1, 1) for conv in convs)
    assert (len(convs) - projections, projections) == (109, 2)  # and one linear layer


@pytest.mark.parametrize("depth", [2, 21])
def test_preactivation_resnet_refuses_what_does_not_exist(depth: int) -> None:
    with pytest.raises(ValueError, match="6n \\+ 2"):
        preactivation_resnet(depth)


# ---- random values ------------------------------------------------------------------------------


class Scaled(nn.Module):
    """x + gamma * f(x), with a gamma that starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gamma = nn.Conv2d(2, 2, 1), nn.Parameter(torch.zeros(2, 1, 1))
        self.act = nn.PReLU()
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gamma * self.act(self.conv(x))


def test_no_constant_parameter_stays_and_no_branch_is_dead() -> None:
    model = Scaled()
    weight = model.conv.weight.clone()
    _randomise.randomise_constants(model)
    assert (model.gamma.abs() >= 0.5).all()
    assert (model.conv.bias != 0).all()
    assert torch.equal(model.conv.weight, weight)
    assert (model.act.weight == 0.25).all()  # a choice, not a start


# ---- what counts as blocked ---------------------------------------------------------------------


class Site(nn.Module):
    """conv(x) + conv(f(conv(x)))."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.convs[1](self.function(self.convs[0](x)))


def _permuted_norm(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (nn.GroupNorm(2, 4), "layer or group norm"),
        (_permuted_norm, "layer or group norm"),
        (lambda x: x.softmax(-1), "attention"),
        (lambda x: x @ x.transpose(2, 3), "attention"),
        (lambda x: nn.functional.interpolate(x, scale_factor=1.0), "resize"),
        (nn.MaxPool2d(3, 1, 1), "max pool"),
        (lambda x: x.sort(1)[0], None),
    ],
)
def test_refusal_is_sorted_by_what_stands_between(
    function: Callable[[torch.Tensor], torch.Tensor], expected: str | None
) -> None:
    model, x = Site(function).eval(), torch.randn(1, 4, 8, 8)
    report = rmfx.report(rmfx.remove_residuals(model, x))
    (row,) = report.rows
    assert row.status == "refused"
    assert _blocked.blocker(row, report, rmfx.trace(model, x).graph) == expected


def test_general_reason_names_no_node_and_no_number() -> None:
    reason = "conv_1, add: the operands have 64 and 1 channels: the add broadcasts"
    assert _blocked.general(reason) == "the operands have N and N channels: the add broadcasts"
    assert _blocked.general("both branches have activations") == "both branches have activations"


# ---- files, workers, the command ----------------------------------------------------------------


def test_store_keeps_outcomes_and_knows_the_code_they_are_of(tmp_path: Path) -> None:
    outcome = Outcome("net", adds=2, removed=1, open_reasons={"why": 1}, code="old")
    Store(tmp_path / "zoo.json").add(outcome)
    store = Store(tmp_path / "zoo.json")
    assert store.outcomes == {"net": outcome}
    assert store.has("net", "old")
    assert not store.has("net", "new")
    assert not store.has("other", "old")


def test_share_leaves_out_what_is_blocked() -> None:
    one = Outcome("a", adds=10, removed=6, blocked={"max pool": 2}, open_reasons={"why": 2})
    other = Outcome("b", adds=2, blocked={"max pool": 2})
    assert share([one, other]) == 0.75
    assert share([other]) == 1
    assert "12 additions: 6 removed, 4 blocked, 2 open" in summary([one, other])


def test_markdown_tells_of_a_network_that_raised() -> None:
    text = markdown([Outcome("net", "failed", "ValueError: a | b")], [Limit("limit", 1, 0)])
    assert "failed: ValueError: a \\| b" in text
    assert "NO" in text


@pytest.mark.parametrize(
    ("outcome", "what"),
    [
        (Outcome("resnet18", "failed", "TypeError: x"), "TypeError: x"),
        (Outcome("resnet18", adds=8, left=1, error_even=0.0), "1 additions left"),
        (Outcome("dla34", adds=8, error_even=1e-9), "relative error"),
        (Outcome("dla34", adds=8, error_even=1e-9, noise=5e-11), "relative error"),
        (Outcome("dla34", error_even=0.0, reasons={"no reason given": 1}), "without a reason"),
        (Outcome("vgg11_bn", error_even=0.0, identical=False), "not identical"),
        (Outcome("convnext_tiny", adds=1, blocked={"max pool": 1}), "left alone for max pool"),
    ],
)
def test_demands_can_fail(outcome: Outcome, what: str) -> None:
    assert any(what in problem for problem in zoo.failures(NETS[outcome.network], outcome))


def test_an_error_that_any_rounding_makes_is_allowed() -> None:
    outcome = Outcome("dla34", adds=8, error_even=1e-9, error_odd=1e-11, noise=2e-10)
    assert not zoo.failures(NETS["dla34"], outcome)
    small = Outcome("vgg11_bn", error_even=3e-13)
    assert zoo.limits([outcome, small], [])[1].value == 3e-13


@pytest.mark.slow
def test_worker_survives_the_end_of_its_process() -> None:
    with pytest.raises(WorkerError, match="exit code 3"):
        Worker(os._exit, seconds=60, gigabytes=4)(3)
    with pytest.raises(WorkerError, match="after 1 seconds"):
        Worker(time.sleep, seconds=1, gigabytes=4)(60)
    worker = Worker(math.sqrt, seconds=60, gigabytes=4)
    with pytest.raises(WorkerError, match="died"):
        worker(-1.0)
    assert worker(4.0) == 2
    worker.close()


def test_run_does_what_is_missing_and_goes_on_after_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    class Fake:
        def __init__(self, *_: object) -> None: ...

        def __call__(self, name: str, *_: object) -> Outcome:
            done.append(name)
            if name == "resnet34":
                raise WorkerError("it died")
            return Outcome(name, code=zoo.code_version())

        def close(self) -> None: ...

    monkeypatch.setattr(zoo, "Worker", Fake)
    here = {"jobs": 1, "backend": "loky", "address": None}
    bounds = {"seconds": 1, "memory": 1, "most_parameters": 1}
    options = argparse.Namespace(fresh=False, small=True, **bounds, **here)
    store = Store(tmp_path / "zoo.json")
    zoo.run(["resnet18", "resnet34", "resnet50"], store, options)
    zoo.run(["resnet18", "resnet34", "vgg11_bn"], Store(tmp_path / "zoo.json"), options)
    assert done == ["resnet18", "resnet34", "resnet50", "vgg11_bn"]
    assert store.outcomes["resnet34"].note == "it died"


@pytest.mark.parametrize(("limit", "suitable"), [(1e9, True), (1e3, False)])
def test_large_networks_are_skipped(limit: float, suitable: bool) -> None:
    net = NETS["resnet18"]
    if suitable:
        zoo.check_size(net, limit)
    else:
        with pytest.raises(zoo.UnsuitableError, match="12 million parameters"):
            zoo.check_size(net, limit)


def test_original_that_explodes_is_unsuitable() -> None:
    class Loud(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 1e12

    shapes = NETS["cifar20A"].shapes
    with pytest.raises(zoo.UnsuitableError, match="outputs reach"):
        zoo.evaluate(_zoo.ZooNet("loud", Loud, shapes))
