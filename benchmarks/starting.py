"""How long it takes until something can be done: importing rmfx, a first pass, the command's help.

Each is a process of its own, in turn with `import torch`, and what counts is its CPU time, which a
busy machine does not change. A first conversion of a graph loads neither torch's exporter nor its
compiler; with example inputs torch itself loads the compiler. Limits: `import rmfx` costs at most
1.25 times `import torch`, a first conversion twice without example inputs, and `rmfx --help` a
quarter (it loads no torch). Exit code 1 if one is exceeded.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from _common import Limit, Spread, parser, show
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
TORCH = "import torch"
CONVERSION = (
    "import torch, rmfx; from rmfx.models import cifar_resnet; "
    "rmfx.remove_residuals(torch.fx.symbolic_trace(cifar_resnet(20).eval()){})"
)
# What is run, and at most how many times the CPU time of `import torch` it may take.
STARTED = {
    TORCH: (TORCH, None),
    "import rmfx": ("import rmfx", 1.25),
    "rmfx.remove_residuals": ("import rmfx; rmfx.remove_residuals", None),
    "a first conversion": (CONVERSION.format(""), 2.0),
    "with an example input": (CONVERSION.format(", torch.ones(1, 3, 32, 32)"), None),
    "rmfx --help": ("import rmfx.cli; rmfx.cli.main(['--help'])", 0.25),
}


def cpu_seconds(code: str) -> float:
    """What a fresh interpreter takes to run some code, its own start included."""
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, check=False)
    after = os.times()
    if done.returncode:
        raise RuntimeError(f"{code}: {done.stderr.decode()}")
    return (after.children_user + after.children_system) - (
        before.children_user + before.children_system
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; exit code 1 if a limit is exceeded."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--rounds", type=int, default=9, help="processes (default 9)")
    options = options_parser.parse_args(arguments)
    taken: dict[str, list[float]] = {name: [] for name in STARTED}
    for _ in tqdm(range(options.rounds + 1), disable=None):
        for name, (code, _) in STARTED.items():
            taken[name].append(cpu_seconds(code))
    rows, limits = [], []
    for name, (_, bound) in STARTED.items():
        own, torch = taken[name][1:], taken[TORCH][1:]  # the first finds no files in memory
        ratios = [a / b for a, b in zip(own, torch, strict=True)]
        rows.append(
            {"what": name, "CPU, s": Spread.of(own).text(), "over torch": Spread.of(ratios).text()}
        )
        if bound is not None:
            limits.append(Limit(f"{name} / {TORCH}", statistics.median(ratios), bound))
    return show(rows, limits, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
