"""RMNeXt and RMRep beside ResNet and RepVGG, small ones, at equal time as deployed.

Four families on Fashion-MNIST, each at three or four sizes, of 16, 32 and 64 channels; all see the
same images in one cycle of the learning rate. Each is deployed as it is meant to be: RMNeXt without
residual connections (`rmfx.remove_residuals`), RepVGG and RMRep with one convolution a block
(`rmfx.merge_branches`), ResNet with its batch norm folded; RMNeXt with its skips, too. The networks
of the first seed are timed under inductor and ONNX Runtime, in turn with ResNet-20, which wants an
idle machine.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _fashion import load
from _study import (
    RUNTIMES,
    Found,
    Job,
    Record,
    Setting,
    Study,
    label_axes,
    load_network,
    look_at,
    main,
    save,
    spread,
    table,
)
from _training import Recipe, train
from torch import nn

import rmfx
from rmfx.files.figures import write_figure
from rmfx.models import RMNeXt, cifar_resnet, rmrep

WIDTHS = (16, 32, 64)
RECIPE = Recipe(33_000, rate=0.05, batch=32, bfloat16=True)
QUICK = Recipe(6_400, batch=64, bfloat16=True)
KEPT = "RMNeXt, skips kept"
REFERENCE = Job("ResNet", 20)


def _repvgg(depth: int, ratio: float) -> nn.Module:
    widths = (*WIDTHS, WIDTHS[-1])
    return rmrep(depth, ratio, 10, widths=widths, strides=(1, 1, 2, 2, 1), image_channels=1)


def _rmnext(blocks: int) -> nn.Module:
    """Groups of half a stage's width, so that a carry fills two."""
    strides, stages = (1, 1, 1, 2, 2), (blocks,) * 3
    return RMNeXt(stages, 5, 8, 10, widths=WIDTHS, strides=strides, image_channels=1)


# family -> (its sizes, what makes a network of one, how it is deployed)
Family = tuple[tuple[int, ...], Callable[[int], nn.Module], Callable[..., nn.Module]]
FAMILIES: dict[str, Family] = {
    "ResNet": (
        (8, 14, 20, 32),
        lambda depth: cifar_resnet(depth, "B", 10, widths=WIDTHS, image_channels=1),
        rmfx.fold_batch_norm,
    ),
    "RepVGG": ((9, 13, 21, 33), lambda depth: _repvgg(depth, 0.0), rmfx.merge_branches),
    "RMRep": ((9, 13, 21, 33), lambda depth: _repvgg(depth, 0.25), rmfx.merge_branches),
    "RMNeXt": ((1, 2, 3), _rmnext, rmfx.remove_residuals),
}


def work(job: Job, setting: Setting) -> Found:
    """Trains one network, or takes one that is trained, and deploys it."""
    data, recipe = load(setting.data), QUICK if setting.quick else RECIPE
    x = data.test.images[:1]
    trained = setting.file(replace(job, arm="RMNeXt, trained"))
    if job.arm == KEPT:
        net, deploy = load_network(trained), rmfx.merge_branches
    else:
        torch.manual_seed(job.seed)
        _, make, deploy = FAMILIES[job.arm]
        net = train(make(int(job.size)), data.training, recipe, range(recipe.steps), job.seed)
    if job.arm == "RMNeXt":
        save(trained, net)
    final = deploy(net, x)
    save(setting.file(job), final)
    return look_at(final, data) | {"parameters trained": rmfx.cost.count(net, x).parameters}


def phases(seeds: int, quick: bool) -> Sequence[Sequence[Job]]:
    """All networks, seed by seed, then those that only have to be deployed otherwise."""
    sizes = {arm: known[1:3] if quick else known for arm, (known, *_) in FAMILIES.items()}
    jobs = [
        [Job(arm, size, seed) for arm, known in sizes.items() for size in reversed(known)]
        for seed in range(seeds)
    ]
    return [*jobs, [Job(KEPT, size, seed) for size in sizes["RMNeXt"] for seed in range(seeds)]]


def summary(record: Record) -> tuple[str, list[dict[str, Any]]]:
    """Every network, what families have at equal time, and a plot."""
    arms = [arm for arm in (*FAMILIES, KEPT) if record.sizes(arm)]
    rows = [_row(record, arm, size) for arm in arms for size in record.sizes(arm)]
    page = [
        "Accuracy on the test images in %: mean (least to most) of the seeds. Numbers in millions; "
        "as deployed, but for the second one of parameters. Times over that of ResNet-20.",
        table(rows),
    ]
    for runtime, title in RUNTIMES.items():
        if equal := _at_equal_time(record, arms, runtime):
            page += [f"{title}, at the time of each ResNet, by lines between networks:"]
            page += [table(equal)]
    if record.times:
        plot(record, arms, record.path.with_suffix(".svg"))
        page.append(f"![accuracy against time]({record.path.stem}.svg)")
    return "\n\n".join(page), rows


def _row(record: Record, arm: str, size: float) -> dict[str, Any]:
    found = next(f for job, f in record.found.items() if (job.arm, job.size) == (arm, size))
    row = {"family": arm, "size": f"{size:g}", "test": spread(record.values(arm, size, "test"))}
    row |= {"layers": f"{found['layers']:g}", "adds": f"{found['adds']:g}"}
    row |= {"multiply-adds": f"{found['macs'] / 1e6:.1f}"}
    numbers = (found["parameters"], found["parameters trained"])
    row |= {"parameters, trained": ", ".join(f"{n / 1e6:.3f}" for n in numbers)}
    return row | record.time_cells(arm, size)


def _at_equal_time(record: Record, arms: Sequence[str], runtime: str) -> list[dict[str, Any]]:
    """What each family has at the times of the ResNets, where its networks reach from there."""
    rows = []
    for size in record.sizes("ResNet"):
        time = record.time("ResNet", size, runtime)
        if time is not None:
            row = {"time": f"{time:.2f}"}
            rows.append(row | {arm: spread(_at(record, arm, runtime, time)) for arm in arms})
    return rows


def _at(record: Record, arm: str, runtime: str, time: float) -> list[float]:
    """Accuracy of each seed of a family at a time, nothing outside of its networks' times."""
    known = sorted(
        (t, record.values(arm, size, "test"))
        for size in record.sizes(arm)
        if (t := record.time(arm, size, runtime)) is not None
    )
    times = [t for t, _ in known]
    if not times or not times[0] <= time <= times[-1]:
        return []
    seeds = range(min(len(values) for _, values in known))
    return [float(np.interp(time, times, [values[s] for _, values in known])) for s in seeds]


def plot(record: Record, arms: Sequence[str], path: Path) -> None:
    """Accuracy against time, a panel for each runtime."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 4.2), layout="constrained")
    for panel, (runtime, title) in zip(figure.subplots(1, 2), RUNTIMES.items(), strict=True):
        for arm in arms:
            points = sorted(
                (time, statistics.fmean(record.values(arm, size, "test")))
                for size in record.sizes(arm)
                if (time := record.time(arm, size, runtime)) is not None
            )
            if points:
                panel.plot(*zip(*points, strict=True), "--o" if arm == KEPT else "-o", label=arm)
        label_axes(panel, f"time, {title}, over that of ResNet-20")
    figure.axes[0].legend()
    figure.suptitle("Fashion-MNIST, equal training, as deployed")
    write_figure(figure, path, "svg")


if __name__ == "__main__":
    study = Study("families", str(__doc__), phases, work, summary, REFERENCE)
    sys.exit(main(study))
