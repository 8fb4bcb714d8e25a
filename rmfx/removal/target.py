"""What a rewrite is made cheap for: multiply-adds, CPUs in general, or one runtime.

The numbers of the runtimes are measured (`python benchmarks/activations.py`, medians, rounded).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from rmfx.algebra.activation import Block
from rmfx.algebra.blockwise import WAYS, all_means
from rmfx.choices import RUNTIMES
from rmfx.rules.linear import MOVING


@dataclass(frozen=True)
class Target:
    """What counts.

    Attributes:
        narrow: channels that each side of a group counts for at least, in a layer of one tap.
        narrow_window: the same in a layer of several.
        rearranges: whether layers may be taken apart and channels be put in another order.
        moving: multiply-adds in the time that it takes to put a channel elsewhere.
        beyond: multiply-adds that a value takes in an activation that has "slopes", "bounds" or
            "masks" for each channel, beyond what it takes in one that is the same for all.
    """

    narrow: int = 8
    narrow_window: int = 4
    rearranges: bool = False
    moving: float = MOVING
    beyond: Mapping[str, float] = field(default_factory=dict, hash=False)

    def means(self, blocks: Sequence[Block], allowed: Collection[str]) -> str:
        """By what one module applies each block's activation for the least, as far as allowed."""
        possible = all_means(blocks)
        fits = [means for means in possible if WAYS[means] in allowed]
        return min(fits or possible[:1], key=lambda means: self.beyond.get(means, 0.0))


TIME, MACS = Target(), Target(narrow=1, narrow_window=1, rearranges=True, moving=1.0)
# Of runtimes that were measured; in another one all activations count alike.
_BEYOND = {
    "eager": {"slopes": 0, "bounds": 23, "masks": 28},
    "inductor": {"slopes": 5, "bounds": 4, "masks": 40},
    "onnxruntime": {"slopes": 500, "bounds": 40, "masks": 50},
    "openvino": {"slopes": 10, "bounds": 3, "masks": 35},
}
BY_NAME = {"time": TIME, "macs": MACS} | {
    name: Target(beyond=_BEYOND.get(name, {})) for name in RUNTIMES
}
