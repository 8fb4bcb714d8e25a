"""How deep networks of RepVGG blocks can be trained, with and without channels that pass.

RepVGG networks of 21, 37, 69 and 133 blocks on Fashion-MNIST, as they are and with a quarter, half
and three quarters of the channels reserved in every second block by `rmfx.reserve`; beside them a
ResNet of as many layers. All see the same images in one cycle of the learning rate. What was
trained is deployed (`rmfx.merge_branches`, for the ResNet `rmfx.fold_batch_norm`), and the accuracy
is that of the deployed network on the test images.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from _fashion import load
from _study import Found, Job, Record, Setting, Study, label_axes, look_at, main, spread, table
from _training import Recipe, train
from torch import nn

import rmfx
from rmfx.files.figures import write_figure
from rmfx.models import rmrep
from rmfx.models.cifar import BasicBlock

DEPTHS = (21, 37, 69, 133)
RESNET = "ResNet"
RATIOS = {"RepVGG": 0.0, "reserving 0.25": 0.25, "reserving 0.5": 0.5, "reserving 0.75": 0.75}
WIDTHS, STRIDES = (16, 24, 48, 64), (1, 2, 1, 2, 1)  # maps of 28, 14, 14, 7 and 7 pixels
RECIPE = Recipe(22_000, rate=0.1, batch=64, bfloat16=True)
QUICK = Recipe(6_400, rate=0.1, batch=64, bfloat16=True)
PAPER = """The RMNet paper (arXiv 2111.00687) has, on ImageNet at the same four depths, for RepVGG
72.51, 74.41, 74.53 and 70.91 %, and with 0.25, 0.25, 0.5 and 0.75 of the channels reserved 72.59,
74.48, 75.09 and 74.56 %; on CIFAR-100 at depth 133, for RepVGG 41.38 % and for a ResNet 79.57 %."""


def network(arm: str, depth: int) -> nn.Module:
    """What is trained."""
    repvgg = rmrep(depth, 0.0, 10, widths=WIDTHS, strides=STRIDES, image_channels=1)
    if arm == RESNET:
        return resnet(repvgg)
    if not RATIOS[arm]:
        return repvgg
    reserving: nn.Module
    reserving, _ = rmfx.reserve(repvgg.eval(), RATIOS[arm])
    return reserving


def resnet(repvgg: Any) -> nn.Module:
    """Two layers and a skip for every two blocks, with the same channels and sizes."""
    stem, *others = (block.conv3[0] for block in repvgg.blocks)
    width = stem.out_channels
    layers: list[nn.Module] = [stem, nn.BatchNorm2d(width), nn.ReLU()]
    for channels, stage in groupby(others, lambda conv: conv.out_channels):
        first, *rest = stage
        layers.append(BasicBlock(width, channels, first.stride[0], "B"))
        layers += [BasicBlock(channels, channels, 1, "B") for _ in range(len(rest) // 2)]
        width = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def work(job: Job, setting: Setting) -> Found:
    """Trains one network, deploys it and looks."""
    torch.manual_seed(job.seed)
    data, recipe = load(setting.data), QUICK if setting.quick else RECIPE
    net = network(job.arm, int(job.size))
    net = train(net, data.training, recipe, range(recipe.steps), job.seed)
    x = data.test.images[:1]
    deploy = rmfx.fold_batch_norm if job.arm == RESNET else rmfx.merge_branches
    final = deploy(net, x)
    return look_at(final, data) | {"parameters trained": rmfx.cost.count(net, x).parameters}


def phases(seeds: int, quick: bool) -> Sequence[Sequence[Job]]:
    """All networks, seed by seed."""
    depths, arms = (DEPTHS[:1], ["RepVGG", RESNET]) if quick else (DEPTHS, [*RATIOS, RESNET])
    return [[Job(arm, n, seed) for n in reversed(depths) for arm in arms] for seed in range(seeds)]


def summary(record: Record) -> tuple[str, list[dict[str, Any]]]:
    """The table, and a plot beside it."""
    arms = [arm for arm in (*RATIOS, RESNET) if record.sizes(arm)]
    rows = [
        {"network": arm}
        | {f"{n:g} blocks": spread(record.values(arm, n, "test")) for n in record.sizes(arm)}
        for arm in arms
    ]
    plot(record, arms, record.path.with_suffix(".svg"))
    left = sum(found["adds"] for job, found in record.found.items() if job.arm != RESNET)
    page = [
        "Accuracy on the test images in %: mean (least to most) of the seeds.",
        table(rows),
        f"Deployed, all but the ResNets are plain: {left:g} additions are left in them.",
        PAPER,
        f"![accuracy against depth]({record.path.stem}.svg)",
    ]
    return "\n\n".join(page), rows


def plot(record: Record, arms: Sequence[str], path: Path) -> None:
    """Accuracy against depth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    panel = figure.subplots()
    for arm in arms:
        depths = record.sizes(arm)
        found = [record.values(arm, depth, "test") for depth in depths]
        means = [statistics.fmean(values) for values in found]
        ends = [[m - min(v), max(v) - m] for m, v in zip(means, found, strict=True)]
        style = "k--" if arm == RESNET else "-"
        below, above = zip(*ends, strict=True)
        panel.errorbar(depths, means, yerr=[below, above], fmt=style, marker="o", label=arm)
    panel.set_xscale("log")
    panel.set_xticks(DEPTHS, [str(depth) for depth in DEPTHS])
    panel.minorticks_off()
    label_axes(panel, "blocks")
    panel.legend()
    figure.suptitle("Fashion-MNIST, equal training, deployed")
    write_figure(figure, path, "svg")


if __name__ == "__main__":
    sys.exit(main(Study("depth", str(__doc__), phases, work, summary)))
