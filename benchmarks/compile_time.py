"""What removing the residual connections adds to the time that torch.compile takes.

For ResNet-50 and MobileNetV2 (batch 1, 224 px, float32): the time of the first call of
`torch.compile(model, backend="rmfx")`, whose inner backend is inductor with frozen weights, against
that of plain `torch.compile(model)` with frozen weights. The first call holds everything: Dynamo,
the import of rmfx, the conversion, inductor, the C++ compiler and one run.

Each measurement has a process and an empty cache of its own; the two ways take turns, in the
opposite order each time. The limit for each network: ratio of the medians at most 1.15. The same
holds for the CPU time of the whole process, imports and C++ compiler included, which says more than
the clock where a machine does other work at the same time. Exit code 1 if a limit is exceeded.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import torchvision
from _common import Limit, Spread, parser, show
from tqdm import tqdm

NETWORKS = {"resnet50": 16, "mobilenet_v2": 10}  # with the residual connections each has
WAYS = ("plain", "rmfx")
RATIO_LIMIT = 1.15
ERROR_LIMIT = 1e-4  # float32; what is timed must also be right
TIMEOUT = 1800

Row = dict[str, Any]


@torch.no_grad()
def first_call(network: str, way: str) -> float:
    """Compiles and runs a network in this process, which must be fresh; seconds.

    Raises:
        RuntimeError: not every residual connection was removed, or the numbers are wrong.
    """
    torch.manual_seed(0)
    model = torchvision.models.get_model(network, weights=None).eval()
    x = torch.randn(1, 3, 224, 224)
    expected = model(x)
    reports: list[Any] = []
    keywords: dict[str, Any] = {"backend": "rmfx", "options": {"on_report": reports.append}}
    if way == "plain":
        keywords = {}
        torch._inductor.config.freezing = True
    start = time.perf_counter()
    compiled: Any = torch.compile(model, **keywords)
    found = compiled(x)
    seconds = time.perf_counter() - start
    error = float((found - expected).abs().max() / expected.abs().max())
    removed = [report.removed for report in reports]
    if not error <= ERROR_LIMIT or removed != ([] if way == "plain" else [NETWORKS[network]]):
        raise RuntimeError(f"{network}, {way}: error {error:.1e}, removed {removed}")
    return seconds


def in_process(network: str, way: str, threads: int) -> tuple[float, float]:
    """`first_call` in a fresh process with an empty cache, and the CPU time of that process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", network, way]
    command += ["--threads", str(threads)]
    before = _children_seconds()
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        }
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, env=environment, timeout=TIMEOUT
        )
    return float(json.loads(done.stdout)), _children_seconds() - before


def _children_seconds() -> float:
    """CPU time of all processes that were started from here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(network: str, repeats: int, threads: int) -> tuple[list[Row], list[Limit]]:
    """Both ways in turn; a row for each, and the limits of their ratios."""
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for turn in tqdm(range(repeats), desc=network):
        for way in WAYS if turn % 2 == 0 else reversed(WAYS):
            times[way].append(in_process(network, way, threads))
    rows: list[Row] = []
    medians: dict[str, tuple[float, float]] = {}
    for way, pairs in times.items():
        first, cpu = (Spread.of(values) for values in zip(*pairs, strict=True))
        medians[way] = first.median, cpu.median
        rows.append(
            {
                "network": network,
                "backend": way,
                "first call, s: median (low to high)": first.text(1),
                "CPU of the process, s": cpu.text(1),
            }
        )
    ratios = [ours / plain for ours, plain in zip(medians["rmfx"], medians["plain"], strict=True)]
    names = (f"{network}: {what}, rmfx / plain" for what in ("first call", "CPU time"))
    return rows, [Limit(n, ratio, RATIO_LIMIT) for n, ratio in zip(names, ratios, strict=True)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns 1 if a limit is exceeded."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--models", default=",".join(NETWORKS), help="names")
    options_parser.add_argument("--repeats", type=int, default=3, help="of each way (default 3)")
    options_parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    options_parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = options_parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.measure:
        print(json.dumps(first_call(*options.measure)))
        return 0
    names = options.models.split(",")
    unknown = [name for name in names if name not in NETWORKS]
    if unknown:
        options_parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(NETWORKS)}")
    measured = [measure(name, options.repeats, options.threads) for name in names]
    rows = [row for rows, _ in measured for row in rows]
    limits = [limit for _, limits in measured for limit in limits]
    return show(rows, limits, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
