"""What an activation costs a runtime that is not the same for all channels.

Runtimes fuse ReLU and its like into the layer before; slopes, bounds or masks for each channel they
seldom do. A 1x1 convolution, an activation and another 1x1 convolution, once with the activation
for all channels and once with PReLU slopes, bounds or masks for each one; one image, one thread,
float32, medians of rounds in turn. Numbers: the time beyond, for each value, in multiply-adds of
those convolutions. `minimise="onnxruntime"` and the like take the medians (rmfx/removal/target.py).
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _common import parser, show
from torch import nn
from tqdm import tqdm

from rmfx.algebra.activation import Activation, Block
from rmfx.algebra.blockwise import Blockwise
from rmfx.timing.runtimes import RUNTIMES, Form, times_of, torch_threads

SHAPES = ((96, 56), (192, 28), (384, 14), (64, 112))
ROUNDS = 7
KINDS: dict[str, Callable[[], nn.Module]] = {
    "slopes": nn.ReLU,
    "bounds": nn.ReLU6,
    "masks": nn.SiLU,
}


def _network(channels: int, act: nn.Module) -> nn.Module:
    layers = [nn.Conv2d(channels, channels, 1) for _ in range(2)]
    return nn.Sequential(layers[0], act, layers[1]).eval().requires_grad_(False)


@torch.no_grad()
def beyond(runtime: str, kind: str, shape: tuple[int, int]) -> float:
    """Multiply-adds for each value that an activation of some kind takes beyond a plain one."""
    channels, size = shape
    act = KINDS[kind]()
    halves = (Block(channels // 2, Activation(act)), Block(channels // 2, None))
    uneven = Blockwise(halves, 2, kind).to_module(torch.float32, torch.device("cpu"))
    inputs = (torch.randn(1, channels, size, size),)
    how = RUNTIMES[runtime]
    with torch_threads(1), how.scope():
        runs = [how.prepare(Form(_network(channels, a), inputs), 1) for a in (act, uneven)]
        times = times_of(runs, threads=1, rounds=ROUNDS, seconds=0.05)
    same, other = (statistics.median(each) for each in times)
    return (other - same) / same * 2 * channels


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table."""
    options = parser(str(__doc__)).parse_args(arguments)
    rows: list[dict[str, Any]] = []
    cases = [(runtime, kind) for runtime in RUNTIMES for kind in KINDS]
    for runtime, kind in tqdm(cases):
        found = {f"{c} at {n}²": round(beyond(runtime, kind, (c, n))) for c, n in SHAPES}
        median = math.floor(statistics.median(found.values()))
        rows.append({"runtime": runtime, "for each channel": kind, **found, "median": median})
    return show(rows, [], as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
