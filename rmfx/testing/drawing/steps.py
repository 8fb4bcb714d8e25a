"""Draws of single steps between layers: what does nothing, constants, what nothing sees through."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rmfx.testing.networks.forms import OPAQUE, OPAQUE_ANYWHERE
from rmfx.testing.networks.operations import Arithmetic, Drop, Opaque

from .draws import CONSTANTS, Draws
from .values import INPUT, Path


def drop(sampler: Draws, path: Path) -> None:
    """What does nothing at inference."""
    kinds = ["identity", "dropout", "functional dropout", "contiguous", "detach", "clone"]
    kinds += ["alpha_dropout", "in-place dropout"]
    if path.value.is_map and path.value.dims == 2:
        kinds += ["dropout2d", "channels_last"]
    kind = sampler.pick(kinds)
    sampler.put(path, Drop(kind), alias=kind != "clone")


def scale(sampler: Draws, path: Path) -> None:
    """A constant factor."""
    _arithmetic(sampler, path, ("c * x", "x * c", "x / c", "-x", "x * p"), "x *= c")


def constant(sampler: Draws, path: Path) -> None:
    """A constant summand."""
    forms = ("x + c", "c + x", "x - c", "c - x", "x + p", "p - x", "x + b")
    _arithmetic(sampler, path, forms, "x += c")


def _arithmetic(sampler: Draws, path: Path, forms: Sequence[str], in_place: str) -> None:
    """A number, or a tensor with a value for every channel."""
    value = path.value
    form = sampler.pick(forms if value.storage == INPUT else (*forms, in_place))
    shape = value.for_channels if "p" in form or "b" in form else ()
    sampler.put(path, Arithmetic(form, sampler.pick(CONSTANTS), shape), alias="=" in form)


def opaque(sampler: Draws, path: Path) -> None:
    """What no residual removal sees through."""
    value = path.value
    kinds = tuple(OPAQUE) if value.is_map else OPAQUE_ANYWHERE
    if value.channels * math.prod(value.size) == 1:  # nothing to normalise
        kinds = tuple(kind for kind in kinds if "norm" not in kind)
    kind = sampler.pick(kinds)
    sampler.put(path, Opaque(kind, value.dims), alias=kind == "view")
