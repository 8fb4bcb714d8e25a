"""What each layer of a network takes in a runtime, at any number of channels.

    table = rmfx.LatencyTable("inductor", cache="layers.json")
    small, report = rmfx.prune_channels(model, x, target=0.6, of=table, data=data)

A layer is timed alone on random values of its real size, at a quarter, a half, three quarters and
all of its input and output channels; between these the time is interpolated. (A grouped layer with
a carry is timed as it is, and taken to be as much faster as it has fewer weights.) Layers that are
alike are timed once; with a cache file once for ever, on this machine and these versions.
Activations and additions are not counted: runtimes fuse most of them into the layers.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rmfx.algebra.affine import TRANSPOSED
from rmfx.ir.notes import shape_of
from rmfx.timing.timer import Timer

from .families import Part, Size

SHARES = (0.25, 0.5, 0.75, 1.0)
Grid = dict[str, float]


class LatencyTable:
    """Seconds that layers take in one runtime.

    Args:
        runtime: "eager", "inductor", "onnxruntime" or "openvino".
        cache: a JSON file for the timings, read if it is there and written after each layer.
        threads: for one inference; by default torch's.
        rounds: how often each size is timed.
        seconds: how long each timing takes at least.
        step: called with a few words before each layer is timed.
    """

    def __init__(
        self,
        runtime: str = "inductor",
        *,
        cache: str | Path | None = None,
        threads: int | None = None,
        rounds: int = 5,
        seconds: float = 0.02,
        step: Callable[[str], object] = lambda text: None,
    ) -> None:
        self.runtime = runtime
        self._timer = Timer(runtime, cache, threads, rounds, seconds, step)

    @property
    def timings(self) -> dict[str, Grid]:
        """Seconds by "inputs,outputs", by a hash of layer, size and runtime."""
        return self._timer.known

    def __call__(self, part: Part, size: Size) -> float:
        """Seconds of a part of a network that has so many channels."""
        if part.module is None or not size.weights:
            return 0.0
        grid = self._grid(part)
        whole = part.ins.numel(), part.outs.numel()
        if bool(part.carries.any()):
            weights = Size(*whole, part.carries.numel()).weights
            return grid[f"{whole[0]},0"] * size.weights / weights
        tied = part.carries.numel() > 1
        columns = sizes_around(size.ins, whole[0])
        rows = [(0, 1.0)] if tied else sizes_around(size.outs, whole[1])
        total = 0.0
        for ins, weight in columns:
            for outs, other in rows:
                total += weight * other * grid[f"{ins},{outs}"]
        return total

    def _grid(self, part: Part) -> Grid:
        told = (str(part.module), _shape_read(part), str(_dtype(part)))
        grid: Grid = self._timer.once(str(part.node.target), told, lambda: self._measure(part))
        return grid

    def _measure(self, part: Part) -> Grid:
        groups = part.carries.numel()
        n_in, n_out = part.ins.numel(), part.outs.numel()
        grid: Grid = {}
        for share in SHARES:
            # Groups lose inputs and outputs together: one number tells both.
            ins = _rounded(share, n_in, groups)
            sizes = [_rounded(share, n_out, groups)] if groups > 1 else _points(n_out)
            forms = [_resized(part, ins, outs) for outs in sizes]
            x = _example(part, ins)
            times = self._timer.times(forms, (x,))
            for outs, own in zip(sizes, times, strict=True):
                at = f"{_place(share, n_in)},{0 if groups > 1 else outs}"
                grid[at] = statistics.median(own)
        return grid


def _points(n: int) -> list[int]:
    """The numbers of channels at which a layer of `n` is timed."""
    return sorted({_place(share, n) for share in SHARES})


def _place(share: float, n: int) -> int:
    return max(1, round(share * n))


def _rounded(share: float, n: int, groups: int) -> int:
    """Channels of a layer of which a share is left, whole groups of them."""
    return _place(share, groups) * (n // groups) if groups > 1 else _place(share, n)


def sizes_around(n: int, total: int) -> list[tuple[int, float]]:
    """The points between which a number lies, with their weights; below the first one, the first.

    >>> sizes_around(3, 8)
    [(2, 0.5), (4, 0.5)]
    """
    points = _points(total)
    above = next((p for p in points if p >= n), points[-1])
    below = max((p for p in points if p <= n), default=points[0])
    if above == below or n < points[0]:
        return [(above, 1.0)]
    weight = (n - below) / (above - below)
    return [(below, 1 - weight), (above, weight)]


def _shape_read(part: Part) -> tuple[int, ...]:
    shape: tuple[int, ...] = shape_of(part.node.all_input_nodes[0])
    return shape


def _dtype(part: Part) -> torch.dtype:
    weight: Any = part.module and part.module.weight
    kind: torch.dtype = weight.dtype
    return kind


def _example(part: Part, ins: int) -> Tensor:
    shape = list(_shape_read(part))
    shape[-1 if isinstance(part.module, nn.Linear) else 1] = ins
    return torch.randn(shape, dtype=_dtype(part))


def _resized(part: Part, ins: int, outs: int) -> nn.Module:
    """A layer like that of a part, with random weights and other numbers of channels."""
    module: Any = copy.copy(part.module)
    groups = part.carries.numel() * ins // part.ins.numel() if part.carries.numel() > 1 else 1
    weight = module.weight
    sides = (ins, outs) if type(module) in TRANSPOSED else (outs, ins)
    made = torch.randn(sides[0], sides[1] // groups, *weight.shape[2:], dtype=weight.dtype)
    module._parameters = dict(module._parameters, weight=nn.Parameter(made, requires_grad=False))
    if module.bias is not None:
        bias = torch.randn(outs, dtype=weight.dtype)
        module._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
    if isinstance(module, nn.Linear):
        module.in_features, module.out_features = ins, outs
    else:
        module.in_channels, module.out_channels, module.groups = ins, outs, groups
    return nn.Sequential(module).eval()
