"""Draws of what costs digits: values of other scales, networks of coarse types."""

from __future__ import annotations

from dataclasses import replace

from rmfx.testing.networks.digits import SCALES, TYPES
from rmfx.testing.networks.operations import Arithmetic
from rmfx.testing.networks.spec import NetworkSpec

from .draws import Draws
from .layers import affine
from .things import Thing
from .values import Path

# Kinds of nodes that jump, so that a rounding decides between values, or divide by what may vanish.
# Half types have no kernels for some others, on the CPU.
_JUMPS = ("threshold", "normalize", "layer norm", "interpolate", "torch.where(a > 0.1, a, b)")


def scale_apart(sampler: Draws, path: Path) -> None:
    """A factor that leaves values of very different scale in the network; once is enough."""
    if sampler.is_scaled:
        affine(sampler, path, style="preserve")
        return
    sampler.is_scaled = True
    sampler.put(path, Arithmetic(sampler.pick(("c * x", "x / c")), sampler.pick(SCALES)))


def _is_awkward(sampler: Draws, path: Path) -> bool:
    return sampler.is_awkward


DIGITS = (Thing(scale_apart, _is_awkward, times=4),)


def typed(sampler: Draws, spec: NetworkSpec) -> NetworkSpec:
    """The network in another type, now and then, if it computes nearly the same in one."""
    if not (sampler.is_awkward or sampler.one_in(12)):
        return spec
    dtype = sampler.pick(TYPES)
    return replace(spec, dtype=dtype) if _suits_types(spec.features()) else spec


def _suits_types(features: frozenset[str]) -> bool:
    """Whether a network with these features computes nearly the same in a coarse type."""
    named = {f.removeprefix("activation ").removeprefix("join ") for f in features}
    return not named & {*_JUMPS, "conv3d"}
