"""How long remove_residuals takes, how that grows with depth, and how much memory it needs.

Limits:

- ResNet-152 and Xception-41p: at most 3 and 6 times torch's own batch norm folding (symbolic_trace,
  then torch.fx.experimental.optimization.fuse) plus one copy of every weight of the result.
- CIFAR ResNet-1202: at most 13x the time of ResNet-110, which has 11x fewer blocks: linear growth.
- ResNet-152: the peak of the process's memory rises by at most 2.2x the bytes of its new weights.

Times are CPU time, medians over interleaved repetitions in one process, after one warm-up. The
memory is measured in a process of its own. Exit code 1 if a limit is exceeded.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from _common import Limit, Spread, parser, show
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace
from torch.fx.experimental.optimization import fuse
from tqdm import tqdm

import rmfx
from rmfx.models.cifar import cifar_resnet

GROWTH_LIMIT, MEMORY_LIMIT = 13.0, 2.2
# Networks, and at most how many times torch's batch norm folding and a copy they may take.
RATIO_LIMITS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "resnet152": (partial(torchvision.models.resnet152, weights=None), 3.0),
    "xception41p": (partial(timm.create_model, "xception41p"), 6.0),
}

Row = dict[str, Any]


def time_against_fuse(name: str, repeats: int) -> tuple[list[Row], Limit]:
    """A network: this pass, torch's fuse, and a copy of the result's weights, interleaved."""
    build, bound = RATIO_LIMITS[name]
    model = build().eval()
    weights = _tensors(_convert_all(model))
    spreads = _interleave(
        {
            "remove_residuals": lambda: rmfx.remove_residuals(model),
            "symbolic_trace + fuse": lambda: fuse(symbolic_trace(model), no_trace=True),
            "copy of the result's weights": lambda: [w.clone() for w in weights],
        },
        repeats,
    )
    rows = [_row(name, what, spread) for what, spread in spreads.items()]
    ours, fused, copied = (spread.median for spread in spreads.values())
    return rows, Limit(f"{name}: pass / (fuse + copy)", ours / (fused + copied), bound)


def time_growth(repeats: int) -> tuple[list[Row], Limit]:
    """CIFAR ResNet-110 and -1202 with padded shortcuts, interleaved."""
    shallow, deep = cifar_resnet(110).eval(), cifar_resnet(1202).eval()
    _convert_all(shallow)
    spreads = _interleave(
        {
            "cifar110A": lambda: rmfx.remove_residuals(shallow),
            "cifar1202A": lambda: rmfx.remove_residuals(deep),
        },
        repeats,
    )
    rows = [_row(net, "remove_residuals", spread) for net, spread in spreads.items()]
    short, long = (spread.median for spread in spreads.values())
    return rows, Limit("resnet1202 / resnet110 time", long / short, GROWTH_LIMIT)


def measure_memory() -> tuple[int, int]:
    """ResNet-152, in this process: rise of the memory peak, and bytes of the result's weights."""
    rmfx.remove_residuals(cifar_resnet(8).eval())  # loads what is imported lazily
    model = torchvision.models.resnet152(weights=None).eval()
    gc.collect()
    _forget_peak()
    before = _peak_bytes()
    result = rmfx.remove_residuals(model)
    return _peak_bytes() - before, sum(w.numel() * w.element_size() for w in _tensors(result))


def memory_in_subprocess() -> Limit:
    """Runs `measure_memory` in a fresh process, where no earlier peak hides the new one."""
    command = [sys.executable, str(Path(__file__).resolve()), "--measure-memory"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peak, weights = json.loads(done.stdout)
    return Limit("resnet152: memory peak / result's weights", peak / weights, MEMORY_LIMIT)


def _convert_all(model: nn.Module) -> GraphModule:
    """Converts once, and makes sure that what is timed is a whole conversion.

    Raises:
        RefusedError: a residual connection cannot be removed.
    """
    converted: GraphModule = rmfx.remove_residuals(model, strict=True)
    return converted


def _interleave(jobs: dict[str, Callable[[], object]], repeats: int) -> dict[str, Spread]:
    """Runs all jobs in turn, `repeats` times after a warm-up; seconds by job."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in tqdm(range(repeats + 1), desc=" / ".join(jobs), leave=False):
        for name, job in jobs.items():
            gc.collect()
            start = time.process_time()
            job()
            if turn:
                seconds[name].append(time.process_time() - start)
    return {name: Spread.of(values) for name, values in seconds.items()}


def _row(net: str, what: str, spread: Spread) -> Row:
    return {"network": net, "what": what, "CPU seconds: median (low to high)": spread.text(3)}


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _forget_peak() -> None:
    """Lowers Linux's high-water mark of this process to what it holds now."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return  # elsewhere the peak so far stays the baseline


def _peak_bytes() -> int:
    """The process's memory high-water mark."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables; returns 1 if a limit is exceeded."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--repeats", type=int, default=7, help="timed runs (default 7)")
    options_parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    options_parser.add_argument("--measure-memory", action="store_true", help=argparse.SUPPRESS)
    options = options_parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.measure_memory:
        print(json.dumps(measure_memory()))
        return 0
    limits = [memory_in_subprocess()]
    rows: list[Row] = []
    for name in RATIO_LIMITS:
        more, limit = time_against_fuse(name, options.repeats)
        rows, limits = rows + more, [*limits, limit]
    more, growth = time_growth(max(1, options.repeats // 2))
    return show(rows + more, [*limits, growth], as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
