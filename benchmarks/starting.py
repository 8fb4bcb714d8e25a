"""How long it takes until something can be done: importing rmfx, and the command's help.

Each is a process of its own, in turn with `import torch`, and what counts is its CPU time, which a
busy machine does not change. The first pass that is asked for loads torch's exporter and compiler
besides torch, to keep out of their way. Limits: `import rmfx` costs at most 1.25 times
`import torch`, and `rmfx --help` a quarter (it loads no torch). Exit code 1 if one is exceeded.
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
# What is run, and at most how many times the CPU time of `import torch` it may take.
STARTED = {
    TORCH: None,
    "import rmfx": 1.25,
    "import rmfx; rmfx.remove_residuals": None,
    "import rmfx.cli; rmfx.cli.main(['--help'])": 0.25,
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
    taken: dict[str, list[float]] = {code: [] for code in STARTED}
    for _ in tqdm(range(options.rounds + 1), disable=None):
        for code, seconds in taken.items():
            seconds.append(cpu_seconds(code))
    rows, limits = [], []
    for code, bound in STARTED.items():
        own, torch = taken[code][1:], taken[TORCH][1:]  # the first finds no files in memory
        ratios = [a / b for a, b in zip(own, torch, strict=True)]
        rows.append(
            {"what": code, "CPU, s": Spread.of(own).text(), "over torch": Spread.of(ratios).text()}
        )
        if bound is not None:
            limits.append(Limit(f"{code} / {TORCH}", statistics.median(ratios), bound))
    return show(rows, limits, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
