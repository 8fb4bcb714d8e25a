"""Draws of writes and of buffers that lie in the memory of others; see `networks.memory`."""

from __future__ import annotations

from rmfx.testing.networks.memory import GAINS, VIEWS, WRITES, Gain, SharedNorm, Write

from .draws import Draws
from .joins import join
from .layers import affine, layer
from .shortcuts import fit
from .things import Thing
from .values import INPUT, Path

_WHOLE_WRITES = ("x.__setitem__",)  # choose the place themselves
_DEAF_WRITES = ("nn.init.constant_", "nn.init.constant_ keyword")  # forget what they write over


def write(sampler: Draws, path: Path) -> None:
    """A write into the value, which may be the fork; into what a layer gives if it is an input."""
    if path.value.storage == INPUT:
        affine(sampler, path, style="preserve")
    sampler.put(path, _write(sampler, path), alias=True)


def write_between(sampler: Draws, path: Path) -> None:
    """A join of what is read before a write and of what was written."""
    if path.value.storage == INPUT:
        affine(sampler, path, style="preserve")
    early, late = path.operand(), path.operand()
    for _ in range(sampler.pick((1, 2))):
        layer(sampler, early, style="preserve")
    fit(sampler, early, path.value.shape)
    late.nodes.append(_write(sampler, path))
    join(sampler, path, [late, early] if sampler.one_in(2) else [early, late], "a + b")


def _write(sampler: Draws, path: Path) -> Write:
    kind = sampler.pick(tuple(WRITES))
    views = list(VIEWS)
    if kind in _DEAF_WRITES and path.value.shape[0] > 1:
        views.remove("")
        views.remove("x.transpose")
        views.remove("x.detach")
    if kind in _WHOLE_WRITES:
        views = [""]
    elif not path.value.is_map:
        views.remove("later rows")
    return Write(kind, sampler.pick(views), sampler.pick((0.5, 1.5, -0.5)))


def gain(sampler: Draws, path: Path) -> None:
    """A factor in a buffer that shares memory."""
    sampler.put(path, Gain(path.value.shape[0], len(path.value.shape) - 1, sampler.pick(GAINS)))


def shared_norm(sampler: Draws, path: Path) -> None:
    """Batch norm whose statistics share memory."""
    value = path.value
    sampler.put(path, SharedNorm(value.shape[0], value.dims, sampler.one_in(3)))


MEMORY = (
    Thing(write, times=2),
    Thing(write_between, times=2),
    *map(Thing, (gain, shared_norm)),
)
