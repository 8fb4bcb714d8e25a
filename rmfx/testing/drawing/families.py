"""Draws of the main branches of the known families of networks."""

from __future__ import annotations

from .constructs import construct, unusual
from .draws import Draws
from .gates import squeeze
from .joins import recall
from .layers import act, affine, layer, perhaps_norm, repeat
from .steps import drop, opaque, scale
from .things import Thing, draw_one
from .values import Path


def basic(sampler: Draws, path: Path, outputs: int, style: str) -> None:
    """Two convolutions."""
    layer(sampler, path, outputs, style)
    oddment(sampler, path)
    affine(sampler, path, outputs)
    perhaps_norm(sampler, path)
    if sampler.one_in(5):
        act(sampler, path)


def bottleneck(sampler: Draws, path: Path, outputs: int, style: str) -> None:
    """Reduce, spatial (perhaps grouped), expand, with the stride in the first or second."""
    strided_first = style == "stride" and sampler.one_in(3)
    inner = sampler.pick((4, 2, 6))
    layer(sampler, path, inner, style if strided_first else "point")
    oddment(sampler, path)
    groups = sampler.pick(("one", "grouped"))
    affine(sampler, path, inner, "keep" if strided_first else style, groups)
    perhaps_norm(sampler, path)
    act(sampler, path)
    affine(sampler, path, outputs, "point")
    perhaps_norm(sampler, path)
    _perhaps_squeeze(sampler, path)


def inverted(sampler: Draws, path: Path, outputs: int, style: str) -> None:
    """Expand, depthwise, project, with a linear end."""
    if not sampler.one_in(3):
        layer(sampler, path, min(8, 2 * path.value.channels), "point")
    oddment(sampler, path)
    affine(sampler, path, path.value.channels, style, "depthwise")
    perhaps_norm(sampler, path)
    late = sampler.one_in(3)
    if not late:
        act(sampler, path)
    _perhaps_squeeze(sampler, path)
    if late:
        act(sampler, path)
    affine(sampler, path, outputs, "point")
    perhaps_norm(sampler, path)


def pre_activation(sampler: Draws, path: Path, outputs: int, style: str) -> None:
    """Two convolutions, each behind its norm and activation."""
    for each in (style, "keep"):
        perhaps_norm(sampler, path)
        act(sampler, path)
        affine(sampler, path, outputs, each)
        oddment(sampler, path)


FAMILIES = (basic, bottleneck, inverted, pre_activation)


def _perhaps_squeeze(sampler: Draws, path: Path) -> None:
    """Squeeze and excite, in one branch of six."""
    if path.value.is_map and sampler.one_in(6):
        squeeze(sampler, path)


# Between two layers
def _nests(sampler: Draws, path: Path) -> bool:
    return path.depth > 0


_ODDMENTS = (
    Thing(drop),
    Thing(Draws.save, times=2),
    Thing(scale),
    Thing(recall, times=2),
    Thing(repeat),
    Thing(opaque),
    Thing(construct, times=4),
    Thing(unusual, times=3),
    Thing(lambda sampler, path: sampler.any_block(path), _nests),
)


def oddment(sampler: Draws, path: Path) -> None:
    """Now and then something between two layers of a branch."""
    if not sampler.is_large and sampler.one_in(4):
        draw_one(sampler, path, _ODDMENTS)
