"""Draws of joins that are no sums: gates and choices. They leave the shape as it is."""

from __future__ import annotations

from rmfx.testing.networks.forms import PRODUCTS
from rmfx.testing.networks.joins import Join
from rmfx.testing.networks.layers import Act
from rmfx.testing.networks.operations import Arithmetic

from .draws import Draws
from .layers import affine
from .things import Thing, on_maps
from .values import Path
from .windows import pool_all

CHOICES = (
    *("torch.maximum(a, b)", "torch.minimum(a, b)"),
    *("torch.where(a > 0.1, a, b)", "a / (1 + b * b)"),
)
BOUNDED = ("sigmoid", "hardsigmoid", "tanh")


def squeeze(sampler: Draws, path: Path) -> None:
    """Squeeze and excite: each channel by a factor that all of the value decides."""
    gate = path.operand()
    pool_all(sampler, gate)
    affine(sampler, gate, sampler.pick((2, 1, 4)), "point")
    form = sampler.pick(("module", "functional"))
    sampler.put(gate, Act(sampler.pick(("relu", "silu", "hardswish")), form))
    affine(sampler, gate, path.value.channels, "point")
    sampler.put(gate, Act(sampler.pick(("sigmoid", "hardsigmoid")), form))
    _multiply(sampler, path, Path(path.value), gate)


def spatial_gate(sampler: Draws, path: Path) -> None:
    """Each position by a factor: one channel, broadcast."""
    gate = path.operand()
    affine(sampler, gate, 1, "preserve")
    sampler.put(gate, Act(sampler.pick(BOUNDED), "functional"))
    _multiply(sampler, path, Path(path.value), gate)


def gate_of_two(sampler: Draws, path: Path) -> None:
    """Two branches multiplied element by element; one of them mostly ends in a bounded function."""
    main, gate = path.operand(), path.operand()
    affine(sampler, main, style="preserve")
    affine(sampler, gate, style="preserve")
    if not sampler.spends_product() or not sampler.one_in(3):
        sampler.put(gate, Act(sampler.pick(BOUNDED), "functional"))
    _multiply(sampler, path, main, gate)


def choice(sampler: Draws, path: Path) -> None:
    """Two branches of which one is chosen at each place, or one divided by the other."""
    main, other = path.operand(), path.operand()
    affine(sampler, main, style="preserve")
    affine(sampler, other, style="preserve")
    operands = (tuple(main.nodes), tuple(other.nodes))
    sampler.put(path, Join(operands, (sampler.pick(CHOICES),)), main.value.shape)


def _multiply(sampler: Draws, path: Path, main: Path, gate: Path) -> None:
    operands = (tuple(main.nodes), tuple(gate.nodes))
    sampler.put(path, Join(operands, (sampler.pick(PRODUCTS),)), main.value.shape)


def layer_scale(sampler: Draws, path: Path) -> None:
    """A learned factor for every channel, small as a rule."""
    factor = sampler.pick((0.5, 0.1, 0.01))
    sampler.put(path, Arithmetic("x * p", factor, path.value.for_channels))


GATES = (
    *map(Thing, (layer_scale, gate_of_two, choice)),
    Thing(squeeze, on_maps, times=3),
    Thing(spatial_gate, on_maps),
)
