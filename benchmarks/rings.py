"""Accuracy against the numbers that are trained: weights from a ring, and narrower networks.

CIFAR ResNets of two depths on Fashion-MNIST. `rmfx.share_parameters` lets all convolutions but the
first draw from one ring, of eight sizes over three decades, from as many numbers as they need to a
thousandth. For each ring an ordinary network of the same depth that is narrower, so that it has as
many parameters in all, batch norms and classifier among them. All see the same images in one cycle
of the learning rate. Rings are deployed by `rmfx.materialize`, as ordinary weights.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _fashion import load
from _study import Found, Job, Record, Setting, Study, label_axes, look_at, main, spread, table
from _training import Recipe, train
from torch import nn

import rmfx
from rmfx.files.figures import write_figure
from rmfx.models import cifar_resnet

DEPTHS = (20, 38)
KINDS = ("ring", "narrower")
WIDTHS = (16, 32, 64)
SHARES = tuple(10 ** (-3 * i / 7) for i in range(8))
RECIPE = Recipe(33_000, rate=0.05, batch=32, bfloat16=True)
QUICK = Recipe(6_400, batch=64, bfloat16=True)
PAPER = """The RPG paper (arXiv 2107.07110) reports for ImageNet 67.2 % with ResNet-18 and a ring of
21.1 % of what is drawn from it, and 41.6 % with ResNet-34 and less than a 400th."""


def network(depth: int, widths: Sequence[int] = WIDTHS) -> nn.Module:
    """An ordinary network."""
    return cifar_resnet(depth, "B", 10, widths=widths, image_channels=1)


def numbers(model: nn.Module) -> int:
    """Numbers that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def with_ring(depth: int, share: float, seed: int) -> nn.Module:
    """A network that draws from a ring."""
    made: nn.Module = rmfx.share_parameters(network(depth), ratio=share, seed=seed)
    return made


def narrower(depth: int, wanted: int) -> nn.Module:
    """The network of this depth whose number of parameters is nearest to a number."""
    steps = range(1, max(WIDTHS) + 1)
    widths = [tuple(max(1, round(w * i / max(WIDTHS))) for w in WIDTHS) for i in steps]
    with torch.device("meta"):
        sizes = {one: numbers(network(depth, one)) for one in widths}
    nearest = min(widths, key=lambda one: abs(sizes[one] - wanted))
    return network(depth, nearest)


def work(job: Job, setting: Setting) -> Found:
    """Trains one network, deploys it and looks."""
    data, recipe = load(setting.data), QUICK if setting.quick else RECIPE
    kind, _, depth = job.arm.rpartition(" ")
    torch.manual_seed(job.seed)
    net = with_ring(int(depth), job.size, job.seed)
    if kind == "narrower":
        net = narrower(int(depth), numbers(net))
    net = train(net, data.training, recipe, range(recipe.steps), job.seed)
    final = rmfx.materialize(net) if kind == "ring" else net
    final = rmfx.fold_batch_norm(final, data.test.images[:1])
    return look_at(final, data) | {"numbers": numbers(net)}


def phases(seeds: int, quick: bool) -> Sequence[Sequence[Job]]:
    """All networks, seed by seed."""
    shares, depths = (SHARES[::7], DEPTHS[:1]) if quick else (SHARES, DEPTHS)
    arms = [f"{kind} {depth}" for depth in reversed(depths) for kind in KINDS]
    return [[Job(arm, share, seed) for share in shares for arm in arms] for seed in range(seeds)]


def summary(record: Record) -> tuple[str, list[dict[str, Any]]]:
    """A table for each depth, the fits, and a plot."""
    arms = [f"{kind} {depth}" for depth in DEPTHS for kind in KINDS]
    arms = [arm for arm in arms if record.sizes(arm)]
    rows = [_row(record, arm, share) for arm in arms for share in reversed(record.sizes(arm))]
    plot(record, arms, record.path.with_suffix(".svg"))
    page = [
        "Accuracy on the test images in %: mean (least to most) of the seeds. Share: of a ring in "
        "the numbers that are drawn.",
        table(rows),
        "Fitted by least squares: accuracy = a + b·log10(numbers trained), and how much of the "
        "variance that explains.",
        table([_fit_row(record, arm) for arm in arms]),
        PAPER,
        f"![accuracy against numbers]({record.path.stem}.svg)",
    ]
    return "\n\n".join(page), rows


def _row(record: Record, arm: str, share: float) -> dict[str, Any]:
    (trained, *_), (macs, *_) = (record.values(arm, share, name) for name in ("numbers", "macs"))
    return {
        "network": arm,
        "share": f"{share:.4f}",
        "numbers": f"{trained:,.0f}",
        "multiply-adds": f"{macs / 1e6:.2f} M",
        "test": spread(record.values(arm, share, "test")),
    }


def points_of(record: Record, arm: str) -> list[tuple[float, float]]:
    """Numbers trained and accuracy of each network."""
    return [
        (found["numbers"], found["test"]) for job, found in record.found.items() if job.arm == arm
    ]


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """a and b of accuracy = a + b·log10(numbers), and the share of the variance explained."""
    x, y = np.log10([n for n, _ in points]), np.array([accuracy for _, accuracy in points])
    b, a = np.polyfit(x, y, 1)
    return float(a), float(b), float(1 - np.var(y - a - b * x) / np.var(y))


def _fit_row(record: Record, arm: str) -> dict[str, Any]:
    a, b, explained = fit(points_of(record, arm))
    return {"network": arm, "a": f"{a:.1f}", "b": f"{b:.2f}", "explained": f"{explained:.3f}"}


def plot(record: Record, arms: Sequence[str], path: Path) -> None:
    """Accuracy against the numbers that are trained, with the fits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    panel = figure.subplots()
    for i, arm in enumerate(arms):
        points = sorted(points_of(record, arm))
        x = [n for n, _ in points]
        style = "o" if arm.startswith("ring") else "x"
        panel.plot(x, [y for _, y in points], style, color=f"C{i}", markersize=4, label=arm)
        a, b, _ = fit(points)
        ends = [x[0], x[-1]]
        panel.plot(ends, [a + b * math.log10(n) for n in ends], color=f"C{i}", linewidth=0.8)
    panel.set_xscale("log")
    label_axes(panel, "numbers trained")
    panel.legend()
    figure.suptitle("CIFAR ResNets on Fashion-MNIST: kind and depth, every seed")
    write_figure(figure, path, "svg")


if __name__ == "__main__":
    sys.exit(main(Study("rings", str(__doc__), phases, work, summary)))
