"""What `rmfx bench` does around its measurements: it says how long they take, and writes them."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from rmfx.files.saving import whole_file
from rmfx.latency import LatencyReport, Network, measure_latency, plot
from rmfx.timing.runtimes import RUNTIMES
from rmfx.timing.speed import Settings

from .terminal import wrote

# How long a runtime takes to prepare both forms of a network, in conversions of it: medians of
# three networks. OpenVINO reads the ONNX model that ONNX Runtime has had made.
_PREPARATIONS = {"eager": 0.0, "inductor": 10.0, "onnxruntime": 4.0, "openvino": 4.0}
_SHARED = 0.3


@dataclass(frozen=True)
class Trial:
    """One short run of a network in eager mode.

    Attributes:
        batch: its size.
        conversion: seconds until both forms were there.
        calls: seconds of a call of each form.
    """

    batch: int
    conversion: float
    calls: tuple[float, ...]

    def estimate(self, settings: Settings) -> float:
        """Seconds that all measurements of the network should take, as far as it can tell."""
        runtimes = [name for name in settings.runtimes if not RUNTIMES[name].missing]
        preparations = sum(_PREPARATIONS[name] for name in runtimes)
        if {"onnxruntime", "openvino"} <= {*runtimes}:
            preparations += _SHARED - _PREPARATIONS["openvino"]
        seconds = 0.0
        for batch in settings.batches:
            calls = [call * batch / self.batch for call in self.calls]
            # Of a slow network, a measurement still takes some calls to find out that it is.
            rounds = sum(max(settings.seconds, 3 * call) for call in calls) * settings.rounds
            seconds += self.conversion * (1 + preparations) + rounds * len(runtimes)
        return seconds


def tried(network: Network, settings: Settings, step: Callable[[str], object]) -> Trial | None:
    """A short run of a network; None where it fails, as the measurements will tell.

    Raises:
        LatencyError: the network cannot be measured at all.
    """
    batch = settings.batches[0]
    short = replace(settings, runtimes=("eager",), batches=(batch,), rounds=1, seconds=0.0)
    # What the first conversion of a process imports takes longer than many a network.
    tiny = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()).eval()
    measure_latency([Network("a tiny network", tiny, (torch.zeros(1, 1, 2, 2),))], short)
    began = time.monotonic()
    (row,) = measure_latency([network], short, step).rows
    calls = (*row.original, *row.converted)
    return Trial(batch, time.monotonic() - began, calls) if calls else None


def announcement(trials: Iterable[Trial | None], settings: Settings) -> str:
    """How long the measurements will take, in a line; "" if nobody knows."""
    seconds = sum(trial.estimate(settings) for trial in trials if trial)
    if not seconds:
        return ""
    told = f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"
    return f"rmfx: this will take about {told}; fewer --runtimes, --batch or --rounds take less"


def write_files(options: argparse.Namespace, report: LatencyReport) -> list[str]:
    """Write the measurements to the files that were asked for; gives a line on each."""
    if options.output is not None:
        with whole_file(Path(options.output)) as path:
            path.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    if options.plot is not None:
        with whole_file(Path(options.plot)) as path:
            plot(report, path)
    return [wrote(path) for path in (options.output, options.plot) if path is not None]
