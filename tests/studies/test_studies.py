"""What the studies share, and what each reads off its record, on numbers checked by hand."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import depth
import families
import layers
import rings
from _blocks import multiply_adds, shortened
from _fashion import Split
from _study import Job, Record, in_parallel
from _training import Recipe, train
from builders import mark

from rmfx.models import cifar_resnet
from rmfx.testing.jobs import Jobs


def images(count: int) -> Split:
    generator = torch.Generator().manual_seed(0)
    return Split(torch.randn(count, 1, 28, 28, generator=generator), torch.arange(count) % 10)


def test_the_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    saved = Record(tmp_path / "study.json", machine={"CPU": "x"})
    saved.found = {Job("a", 0.5, 1): {"test": 90.0}, Job("a", 0.5, 0): {"test": 91.0}}
    saved.times = {("a", 0.5, "inductor"): [1.0, 0.9, 1.1]}
    saved.save()
    again = Record.read(saved.path)
    assert again == saved
    assert again.values("a", 0.5, "test") == [91.0, 90.0]  # seed by seed
    assert again.sizes("a") == [0.5]
    assert Record.read(tmp_path / "none.json").found == {}


@pytest.mark.slow
def test_a_phase_ends_before_the_next_one_begins(tmp_path: Path) -> None:
    """What the first phase leaves behind is there for the second."""
    marks = [[tmp_path / "1", tmp_path / "2"], [tmp_path / "3"]]
    seen: list[tuple[Path, int]] = []
    in_parallel(marks, partial(mark, folder=tmp_path), seen.append, Jobs(2))
    assert sorted(path.name for path, _ in seen) == ["1", "2", "3"]
    assert dict(seen)[tmp_path / "3"] == 2


# ---- training -----------------------------------------------------------------------------------


def test_what_is_not_trained_stays() -> None:
    net = rings.with_ring(8, 0.1, seed=0)
    recipe = Recipe(images=256, batch=64)
    trained = train(net, images(128), recipe, range(recipe.steps), 0)
    before, after = net.state_dict(), trained.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert any("parameter_rings" in key for key in changed)
    assert not any("original" in key for key in changed)  # the scales of layers


def test_the_rate_of_each_step_is_told() -> None:
    told: list[float] = []
    recipe = Recipe(images=256, batch=64)
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    train(net, images(128), recipe, range(recipe.steps), 0, lambda _: told.append)
    assert told == [recipe.rate_at(step) for step in range(4)]


# ---- the studies --------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", depth.DEPTHS)
def test_the_resnet_is_as_deep_as_the_repvgg(deep: int) -> None:
    with torch.device("meta"):
        repvgg, resnet = depth.network("RepVGG", deep), depth.network(depth.RESNET, deep)
    convolutions = [
        m for m in resnet.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] > 1
    ]
    assert abs(len(convolutions) - deep) <= 4
    assert len(repvgg.blocks) == deep


def test_what_reserves_is_a_repvgg_of_which_half_the_blocks_pass_channels() -> None:
    net = depth.network("reserving 0.5", 21)
    widths = [m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert {8, 12, 24} <= set(widths)


@pytest.mark.parametrize("wanted", [2_000, 30_000, 10**6])
def test_the_narrower_network_has_the_nearest_number(wanted: int) -> None:
    found = rings.numbers(rings.narrower(8, wanted))
    whole = rings.numbers(rings.network(8))
    assert abs(found - min(wanted, whole)) < 0.1 * min(wanted, whole)


def test_a_line_is_fitted_exactly() -> None:
    a, b, explained = rings.fit([(10.0, 21.0), (100.0, 22.0), (1000.0, 23.0)])
    assert (a, b, explained) == pytest.approx((20.0, 1.0, 1.0))


def test_families_are_compared_at_equal_time(tmp_path: Path) -> None:
    record = Record(tmp_path / "families.json")
    points = {
        "ResNet": ((8, 1.0, 80.0), (20, 2.0, 90.0)),
        "RMNeXt": ((1, 1.5, 84.0), (2, 3.0, 90.0)),
    }
    for arm, sizes in points.items():
        for size, time, accuracy in sizes:
            record.times[arm, size, "inductor"] = [time, time, time]
            for seed in range(2):
                record.found[Job(arm, size, seed)] = {
                    **dict.fromkeys(("layers", "adds", "macs"), 1.0),
                    **dict.fromkeys(("parameters", "parameters trained"), 1.0),
                    "test": accuracy + seed,
                }
    page, rows = families.summary(record)
    assert len(rows) == 4
    # At 2.0 RMNeXt lies a third of the way from 84 to 90; at 1.0 it has no network.
    assert "| 1.00   | 80.50 (80.00 to 81.00) |" in page
    assert "86.50 (86.00 to 87.00)" in page


def test_losses_of_layers_are_taken_seed_by_seed(tmp_path: Path) -> None:
    record = Record(tmp_path / "layers.json")
    costs = {"pruned": 50.0, "layers": 57.0, "macs": 100.0, "parameters": 10.0}
    for seed, (whole, short) in enumerate([(90.0, 89.0), (91.0, 90.5)]):
        record.found[Job(layers.WHOLE, 1.0, seed)] = costs | {"test": whole}
        record.found[Job(layers.LAYERS, 0.345, seed)] = costs | {"macs": 34.0, "test": short}
    page, rows = layers.summary(record)
    assert "0.75 (0.50 to 1.00) points" in page
    assert [row["multiply-adds"] for row in rows] == ["1.000", "0.340"]


def test_blocks_go_until_the_budget_is_met() -> None:
    net = cifar_resnet(20, "B", 10, image_channels=1).eval()
    split = images(4)
    x = split.images[:1]
    short = shortened(net, split, 0.6 * multiply_adds(net, x))
    assert 0.4 < multiply_adds(short, x) / multiply_adds(net, x) <= 0.6
    assert short(x).shape == (1, 10)
