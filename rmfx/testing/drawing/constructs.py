"""Tables of what stands between the layers of a branch: gates, splits, windows, and rarer things.

Everything in them leaves the shape as it is, so each may stand wherever it suits.
"""

from __future__ import annotations

from .digits import scale_apart
from .draws import Draws
from .gates import choice, gate_of_two, layer_scale, spatial_gate, squeeze
from .memory import gain, shared_norm, write, write_between
from .places import flip, focal, mean, permute, repeat, reshaped, roll
from .splits import (
    channels_last,
    concatenate_two,
    ghost,
    halves,
    mix_tokens,
    partial,
    shuffle,
    split,
)
from .things import Thing, draw_one, on_maps, on_tokens
from .values import Path
from .windows import blur, padded, small_pool, transposed


def _of_awkward_networks(sampler: Draws, path: Path) -> bool:
    return sampler.is_awkward


CONSTRUCTS = (
    *map(Thing, (layer_scale, gate_of_two, choice, split, halves)),
    Thing(squeeze, on_maps, times=3),
    *(Thing(draw, on_maps) for draw in (spatial_gate, ghost, concatenate_two, partial, shuffle)),
    *(Thing(draw, on_maps) for draw in (blur, small_pool, padded, transposed, channels_last)),
    Thing(mix_tokens, on_tokens, times=2),
)
UNUSUAL = (  # what attacks found and plain drawing does not
    Thing(roll, times=2),
    *map(Thing, (flip, permute, repeat)),
    Thing(write, times=2),
    Thing(write_between, times=2),
    *map(Thing, (gain, shared_norm)),
    *(Thing(draw, on_maps) for draw in (roll, flip, permute)),
    Thing(mean, on_maps, times=2),
    Thing(focal, on_maps),
    Thing(reshaped, on_maps, times=2),
    Thing(scale_apart, _of_awkward_networks, times=4),
)


def construct(sampler: Draws, path: Path) -> None:
    """One of the constructs that suit the value."""
    draw_one(sampler, path, CONSTRUCTS)


def unusual(sampler: Draws, path: Path) -> None:
    """What attacks found: rolls, indices, writes through views, shared memory and more."""
    draw_one(sampler, path, UNUSUAL)
