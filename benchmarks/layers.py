"""Layers that go whole (ResConv), beside filters and beside whole blocks, at equal multiply-adds.

A ResNet-56 on Fashion-MNIST is trained twice in one cycle of the learning rate: as it is, and with
`rmfx.insert_resconv` and L1 on the factors of its layers. Of the first, filters go (least L1 norm,
the same share of each layer) or blocks (always the one that the loss misses least); of the second,
layers, by `rmfx.prune_layers`. Each at three shares of the multiply-adds, the least of them that of
ResConv's paper; each is looked at before and after some more training, the same for all and for the
whole network. At the least share every architecture is trained from scratch as well, with as many
images in all. What is looked at, and timed in turn with the whole network under inductor and ONNX
Runtime, is the deployed network: factors and batch norm are fused.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _blocks import multiply_adds, shortened
from _fashion import Split, load
from _study import (
    FROM_SCRATCH,
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
from _training import Recipe, accuracy, renew, train
from torch import nn

import rmfx
from rmfx.files.figures import write_figure
from rmfx.models import cifar_resnet
from rmfx.modules.factors import Carried, ResConv
from rmfx.training import Slimming

SHARES = (0.7, 0.5, 0.345)
LOOKED_AT = 256  # training images by which blocks are judged
# Of L1 on the factors of layers. A pilot (one seed, validation images, before more training): 0.005
# gave 87.4 % whole and 85.1, 70.2 at the first two shares, 0.02 gave 87.0 and 86.5, 82.1, 0.05 gave
# 87.5 and 87.5, 87.4, 36.6 at all three, 0.1 gave 87.0 and 87.0, 87.0, 80.5.
STRENGTH = 0.1
FIRST = Recipe(44_000, rate=0.05, batch=32, bfloat16=True)
MORE = replace(FIRST, images=22_000, rate=0.02)
AT_ONCE = replace(FIRST, images=66_000)
WHOLE, TRAINED, FACTORS, SHORTENED = "whole", "trained", "trained with factors", "shortened"
LAYERS, FILTERS, BLOCKS = "layers (ResConv)", "filters (L1)", "blocks"
ARMS = (LAYERS, FILTERS, BLOCKS)
PAPER = -0.13  # points, at the least share, of ResNet-110 on CIFAR-10


def work(job: Job, setting: Setting) -> Found:
    """Trains the whole network; or prunes what is trained, and trains it on."""
    data = load(setting.data)
    if job.arm in (TRAINED, FACTORS):
        net = _trained(job, data.training, _recipe(FIRST, setting))
        save(setting.file(job), net)
        if job.arm == TRAINED:
            _take_blocks(net, job.seed, data.training, setting)
        return {"test": accuracy(net, data.test)}
    net = _pruned(job, data.training, setting)
    pruned = accuracy(_deployed(net, data.training), data.test)
    recipe = _recipe(MORE, setting)
    if job.arm.endswith(FROM_SCRATCH):
        recipe = _recipe(AT_ONCE, setting)
        torch.manual_seed(job.seed)
        renew(net)
        renew_factors(net)
    net = train(net, data.training, recipe, range(recipe.steps), job.seed)
    final = _deployed(net, data.training)
    save(setting.file(job), final)
    return look_at(final, data) | {"pruned": pruned}


def _recipe(usual: Recipe, setting: Setting) -> Recipe:
    return replace(usual, images=usual.images // 20) if setting.quick else usual


def _trained(job: Job, split: Split, recipe: Recipe) -> nn.Module:
    """The whole network, with factors or without."""
    torch.manual_seed(job.seed)
    net: nn.Module = cifar_resnet(56, "B", 10, image_channels=1).eval()
    if job.arm == TRAINED:
        return train(net, split, recipe, range(recipe.steps), job.seed)
    net, _ = rmfx.insert_resconv(net, split.images[:1])
    return train(net, split, recipe, range(recipe.steps), job.seed, slimming)


def renew_factors(net: nn.Module) -> None:
    """Factors as `rmfx.insert_resconv` sets them."""
    new = ResConv((1, 1), scale=1.0, carry=0.5).state_dict()
    for factors in net.modules():
        if isinstance(factors, Carried):
            factors.load_state_dict(new, strict=isinstance(factors, ResConv))


def slimming(net: nn.Module) -> Callable[[float], object]:
    """L1 on the factors of layers, after each step."""
    return Slimming(net, STRENGTH, scales=rmfx.layer_scales(net)).step


def _take_blocks(net: nn.Module, seed: int, split: Split, setting: Setting) -> None:
    """Writes what is left without blocks at each share, in one walk through all of them."""
    looked_at = split.first(16 if setting.quick else LOOKED_AT)
    whole = multiply_adds(net, split.images[:1])
    for share in SHARES:
        net = shortened(net, looked_at, share * whole)
        save(setting.file(Job(SHORTENED, share, seed)), net)


def _pruned(job: Job, split: Split, setting: Setting) -> nn.Module:
    """What an arm leaves of what is trained."""
    x, arm = split.images[:1], job.arm.removesuffix(FROM_SCRATCH)
    if arm == BLOCKS:
        return load_network(setting.file(Job(SHORTENED, job.size, job.seed))).eval()
    whole = load_network(setting.file(Job(TRAINED, 1.0, job.seed)))
    budget = job.size * multiply_adds(whole, x)
    net = whole
    if arm == FILTERS:
        options = {"importance": "l1", "multiple": lambda n: min(16, n // 2), "floor": 0.1}
        net, _ = rmfx.prune_channels(whole, x, budget=budget, **options)
    elif arm == LAYERS:
        factors = load_network(setting.file(Job(FACTORS, 1.0, job.seed)))
        net, _ = rmfx.prune_layers(factors, x, budget=budget)
    return net.eval()


def _deployed(net: nn.Module, split: Split) -> nn.Module:
    """What runs: factors, shortcuts around layers and batch norm fused."""
    x = split.images[:1]
    fused: nn.Module = rmfx.fold_batch_norm(rmfx.fuse_resconv(net, x), x)
    return fused


def phases(seeds: int, quick: bool) -> Sequence[Sequence[Job]]:
    """What is trained, then what is made of it, seed by seed."""
    shares = SHARES[-1:] if quick else SHARES
    found = [[Job(arm, 1.0, seed) for seed in range(seeds) for arm in (TRAINED, FACTORS)]]
    for seed in range(seeds):
        scratch = [Job(arm + FROM_SCRATCH, SHARES[-1], seed) for arm in ARMS]
        pruned = [Job(arm, share, seed) for share in shares for arm in ARMS]
        found.append([Job(WHOLE, 1.0, seed), *([] if quick else scratch), *pruned])
    return found


def summary(record: Record) -> tuple[str, list[dict[str, Any]]]:
    """Accuracy and cost, what the paper has beside what we have, and a plot."""
    arms = [WHOLE, *ARMS, *(arm + FROM_SCRATCH for arm in ARMS)]
    rows = [_row(record, arm, size) for arm in arms for size in reversed(record.sizes(arm))]
    page = [
        "Accuracy on the test images in %, deployed: mean (least to most) of the seeds, before and "
        "after more training. Cost over that of the whole network.",
        table(rows),
    ]
    if losses := _losses(record):
        page.append(
            f"At {SHARES[-1]:g} of the multiply-adds ResConv loses {spread(losses)} points against "
            f"the whole network. The paper reports {-PAPER:.2f} for ResNet-110 on CIFAR-10."
        )
    plot(record, record.path.with_suffix(".svg"))
    page.append(f"![accuracy against cost]({record.path.stem}.svg)")
    return "\n\n".join(page), rows


def _losses(record: Record) -> list[float]:
    whole, short = (
        record.values(arm, size, "test") for arm, size in ((WHOLE, 1.0), (LAYERS, SHARES[-1]))
    )
    return [a - b for a, b in zip(whole, short, strict=False)]


def _row(record: Record, arm: str, size: float) -> dict[str, Any]:
    scratch = arm.endswith(FROM_SCRATCH)
    row: dict[str, Any] = {
        "arm": arm,
        "share": f"{size:g}",
        "before": "" if scratch else spread(record.values(arm, size, "pruned")),
        "after": spread(record.values(arm, size, "test")),
        "layers": f"{statistics.fmean(record.values(arm, size, 'layers')):.1f}",
    }
    for name, title in (("macs", "multiply-adds"), ("parameters", "parameters")):
        share = _over_whole(record, arm, size, name)
        row[title] = "" if share is None else f"{share:.3f}"
    return row | record.time_cells(arm.removesuffix(FROM_SCRATCH), size)


def _over_whole(record: Record, arm: str, size: float, name: str) -> float | None:
    whole, own = record.values(WHOLE, 1.0, name), record.values(arm, size, name)
    return statistics.fmean(own) / whole[0] if whole else None


def plot(record: Record, path: Path) -> None:
    """Accuracy against multiply-adds and times, before and after more training."""
    from matplotlib.figure import Figure

    axes = {"": "multiply-adds", **RUNTIMES}
    figure = Figure(figsize=(13.0, 4.2), layout="constrained")
    for panel, (runtime, title) in zip(figure.subplots(1, 3), axes.items(), strict=True):
        for i, arm in enumerate(ARMS):
            known = [(_cost(record, arm, s, runtime), s) for s in record.sizes(arm)]
            points = sorted((cost, s) for cost, s in known if cost is not None)
            for name, style in (("test", "-o"), ("pruned", ":o")):
                means = [statistics.fmean(record.values(arm, s, name)) for _, s in points]
                label = arm if name == "test" else f"{arm}, before"
                panel.plot([c for c, _ in points], means, style, color=f"C{i}", label=label)
        label_axes(panel, f"{title}, over the whole network's")
    figure.axes[0].legend()
    figure.suptitle("ResNet-56 on Fashion-MNIST: before (dotted) and after more training")
    write_figure(figure, path, "svg")


def _cost(record: Record, arm: str, size: float, runtime: str) -> float | None:
    if runtime:
        return record.time(arm, size, runtime)
    return _over_whole(record, arm, size, "macs")


if __name__ == "__main__":
    timed = {WHOLE, *ARMS}.__contains__
    study = Study("layers", str(__doc__), phases, work, summary, Job(WHOLE, 1.0), timed)
    sys.exit(main(study))
