"""What a rewrite is made cheap for: multiply-adds, CPUs in general, or one runtime.

The numbers of the runtimes are measured (`python benchmarks/activations.py`, medians, rounded).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rmfx.choices import TARGETS


@dataclass(frozen=True)
class Target:
    """What counts.

    Attributes:
        narrow: channels that each side of a group counts for at least.
        rearranges: whether layers may be taken apart and channels be put in another order.
        beyond: multiply-adds that a value takes in an activation that has "slopes", "bounds" or
            "masks" for each channel, beyond what it takes in one that is the same for all.
    """

    narrow: int = 8
    rearranges: bool = False
    beyond: Mapping[str, float] = field(default_factory=dict, hash=False)


TIME, MACS = Target(), Target(narrow=1, rearranges=True)
EAGER = Target(beyond={"slopes": 1, "bounds": 1, "masks": 1})
INDUCTOR = Target(beyond={"slopes": 1, "bounds": 1, "masks": 1})
ONNXRUNTIME = Target(beyond={"slopes": 1, "bounds": 1, "masks": 1})
OPENVINO = Target(beyond={"slopes": 1, "bounds": 1, "masks": 1})
BY_NAME = dict(zip(TARGETS, (TIME, MACS, EAGER, INDUCTOR, ONNXRUNTIME, OPENVINO), strict=True))
