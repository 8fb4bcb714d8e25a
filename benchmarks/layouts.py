"""What the layouts of main block and carry cost: multiply-adds, converted over original.

Networks whose blocks are no plain bottlenecks: depthwise layers, gates, shortcuts of several
layers, blocks under a long skip; and four others. One image of 224x224 (edsr: 32x32), batch norm
folded, in float32, verified. "time" and "macs" are the option `minimise`; seconds are CPU time of
the pass without verification. Limits: each network's ratio, as reached when this was written.

`--export FOLDER` writes the converted networks, `--against FOLDER` times those that another version
wrote beside this one's and the originals, in four runtimes, one thread: medians of rounds in turn.
`--named` times what `minimise` makes of them with each runtime's name, beside "time".
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import _zoo
import torch
from _common import Limit, Spread, choose_models, each, parser, show
from torch import Tensor, nn

import rmfx
import rmfx.cost
from rmfx.timing.runtimes import RUNTIMES, Form, times_of, torch_threads

ROUNDS = 5

LIMITS = {
    "timm:starnet_s1": 2.0,
    "timm:darknet53": 2.17,
    "timm:xception41p": 2.25,
    "timm:ghostnet_100": 2.4,
    "timm:repghostnet_050": 2.6,
    "timm:seresnet50": 5.1,
    "timm:ecaresnet26t": 3.6,
    "timm:nf_resnet26": 3.9,
    "timm:resnetrs50": 5.2,
    "timm:convmixer_768_32": 1.2,
    "timm:mixnet_s": 1.65,
    "edsr": 3.7,
    "torchvision:resnet18": 1.78,
    "torchvision:resnet50": 3.93,
    "torchvision:resnext50_32x4d": 2.42,
    "torchvision:mobilenet_v2": 1.1,
    "timm:mobilenetv4_conv_small": 1.23,
}


@torch.no_grad()
def measure(name: str) -> dict[str, Any]:
    """One network by both targets."""
    model, x = built(name)
    before = rmfx.cost.count(rmfx.fold_batch_norm(model, x), x)
    row: dict[str, Any] = {"network": name, "G before": before.macs / 1e9}
    for target in ("time", "macs"):
        start = time.process_time()
        made = rmfx.remove_residuals(model, x, minimise=target, verify=False)
        seconds = time.process_time() - start
        after = rmfx.cost.count(made, x)
        row[target] = after.macs / before.macs
        row[f"layers, {target}"] = after.layers
        error = rmfx.verify(model, made, x).error
        row |= {"seconds": seconds, "error": max(error, row.get("error", 0.0))}
    return row


def built(name: str) -> tuple[nn.Module, Tensor]:
    """A network of the list, and an image for it."""
    net = {**_zoo.everything(), **_zoo.zoo()}[name]
    torch.manual_seed(0)
    model = net.build().eval().requires_grad_(False)
    shape = net.shapes.even if name == "edsr" else (1, 3, 224, 224)
    return model, torch.rand(shape, generator=torch.Generator().manual_seed(0))


def file_of(folder: Path, name: str) -> Path:
    """Where a converted network is kept."""
    return folder / f"{name.replace(':', '_')}.pt2"


def export(name: str, folder: Path) -> None:
    """Write one converted network."""
    model, x = built(name)
    made = rmfx.remove_residuals(model, x, verify=False)
    folder.mkdir(parents=True, exist_ok=True)
    torch.export.save(torch.export.export(made, (x,)), file_of(folder, name))


@torch.no_grad()
def timed(name: str, folder: Path) -> Iterator[dict[str, Any]]:
    """One network of another version beside this one's and the original: a row for each runtime."""
    model, x = built(name)
    forms = (
        rmfx.fold_batch_norm(model, x),
        torch.export.load(file_of(folder, name)).module(),
        rmfx.remove_residuals(model, x, verify=False),
    )
    for runtime in RUNTIMES:
        pairs = {"new / original": (2, 0), "other / original": (1, 0), "other / new": (1, 2)}
        yield {"network": name, "runtime": runtime, **ratios(runtime, forms, x, pairs)}


@torch.no_grad()
def named(name: str) -> Iterator[dict[str, Any]]:
    """One network, made cheap for CPUs and for each runtime, beside the original."""
    model, x = built(name)
    before = rmfx.fold_batch_norm(model, x)
    usual = rmfx.remove_residuals(model, x, verify=False)
    for runtime in RUNTIMES:
        own = rmfx.remove_residuals(model, x, minimise=runtime, verify=False)
        ways = sorted({row.strategy for row in rmfx.report(own).rows if row.status == "removed"})
        pairs = {"time / original": (1, 0), "named / original": (2, 0), "time / named": (1, 2)}
        found = ratios(runtime, (before, usual, own), x, pairs)
        yield {"network": name, "runtime": runtime, **found, "ways": ", ".join(ways)}


def ratios(
    runtime: str, forms: Sequence[nn.Module], x: Tensor, pairs: Mapping[str, tuple[int, int]]
) -> dict[str, str]:
    """Times of some forms over those of others in one runtime, one thread."""
    how = RUNTIMES[runtime]
    with torch_threads(1), how.scope():
        runs = [how.prepare(Form(form, (x,)), 1) for form in forms]
        times = times_of(runs, threads=1, rounds=ROUNDS, seconds=0.1)
    return {
        title: Spread.of([s / t for s, t in zip(times[a], times[b], strict=True)]).text()
        for title, (a, b) in pairs.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns 1 if a limit is exceeded."""
    options_parser = parser(str(__doc__))
    options_parser.add_argument("--export", type=Path, metavar="FOLDER")
    options_parser.add_argument("--against", type=Path, metavar="FOLDER")
    options_parser.add_argument("--named", action="store_true", help="by runtime")
    options, names = choose_models(options_parser, LIMITS, arguments)
    if options.export:
        for name in each(names):
            export(name, options.export)
        return 0
    if options.against or options.named:
        of = named if options.named else partial(timed, folder=options.against)
        rows = [row for name in each(names) for row in of(name)]
        return show(rows, [], as_json=options.json)
    rows = [measure(name) for name in each(names)]
    limits = [Limit(row["network"], round(row["time"], 3), LIMITS[row["network"]]) for row in rows]
    return show(rows, limits, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
