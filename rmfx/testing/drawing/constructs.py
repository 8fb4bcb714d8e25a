"""What stands between the layers of a branch: gates, splits, windows, and rarer things.

All of it leaves the shape as it is, so each may stand wherever it suits.
"""

from __future__ import annotations

from .digits import DIGITS
from .draws import Draws
from .gates import GATES
from .memory import MEMORY
from .mixing import MIXING
from .places import PLACES
from .splits import SPLITS
from .things import draw_one, simplest_first
from .values import Path
from .windows import WINDOWS

CONSTRUCTS = simplest_first(GATES, SPLITS, WINDOWS, MIXING)
UNUSUAL = simplest_first(PLACES, MEMORY, DIGITS)


def construct(sampler: Draws, path: Path) -> None:
    """One of the constructs that suit the value."""
    draw_one(sampler, path, CONSTRUCTS)


def unusual(sampler: Draws, path: Path) -> None:
    """What attacks found and plain drawing does not: rolls, indices, writes through views."""
    draw_one(sampler, path, UNUSUAL)
