"""One network and the way in which it is handed to a pass, and how both are drawn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import Any

from torch import Tensor

from rmfx.choices import PASSES, STRATEGIES, TARGETS

from .compiled import CHANGES, MOST_CHANGES, MOVED
from .networks.spec import NetworkSpec
from .strategies import random_block, random_network

_COSTLY = ("scale", "odd-pair")  # ways past an activation that cost digits


@dataclass(frozen=True)
class Case:
    """One network and the way in which it is handed to the pass.

    Attributes:
        spec: the network.
        transform: the name of the pass.
        frontend: "module", "traced", "exported" or "compiled".
        activation: the option of `remove_residuals`.
        without_inputs: whether the pass is also called without example inputs.
        input_range: whether `remove_residuals` is told the range of the inputs.
        calibrated: whether it is given the inputs as data, which a shift needs.
        minimise: the option of `remove_residuals`.
        changes: what is done to the weights between calls of a compiled network.
    """

    spec: NetworkSpec
    transform: str
    frontend: str = "module"
    activation: str | tuple[str, ...] = "auto"
    without_inputs: bool = False
    input_range: bool = False
    calibrated: bool = False
    minimise: str = TARGETS[0]
    changes: tuple[str, ...] = ()

    def of(self, spec: NetworkSpec) -> Case:
        """The same with another network."""
        return replace(self, spec=spec)

    def features(self) -> frozenset[str]:
        """What occurs in the network, and what is done to its weights."""
        return self.spec.features().union(f"{change} between calls" for change in self.changes)

    def options(self, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
        """The keyword arguments of the pass."""
        if self.transform not in PASSES:
            return {}
        # The fuzzer compares what a pass made, not what the pass found when it did so itself.
        options: dict[str, Any] = {} if self.frontend == "compiled" else {"verify": False}
        if self.transform == "remove_residuals":
            options |= {"activation": self.activation, "minimise": self.minimise}
        if self.input_range:
            bound = max(float(x.abs().max()) for x in inputs)
            options["input_range"] = (-bound, bound)
        if self.calibrated:
            options["calibration"] = [inputs]
        return options


def draw_case(
    example: int,
    seed: int,
    transform: str = "remove_residuals",
    frontend: str = "module",
    activation: str | tuple[str, ...] = "auto",
) -> Case:
    """The network of that number, and the way in which it is handed to the pass."""
    random = Random(f"{seed}/{example}")
    compiled = frontend == "compiled"
    spec = random_block(random) if compiled else random_network(random)
    # Drawn for every pass, though not each has such options: equal seeds then draw equal ways.
    without = random.randrange(4) == 0
    bounded = random.randrange(2) == 0
    drawn: str | tuple[str, ...] = random.choice(["auto", "relu", "some", "some"])
    some = tuple(name for name in STRATEGIES if random.randrange(2)) or STRATEGIES[:1]
    if spec.dtype != "float64" and random.randrange(3):
        some = _COSTLY
    ways = activation
    if activation == "random":
        ways = some if drawn == "some" else drawn
    return Case(
        spec,
        transform,
        frontend,
        ways,
        without_inputs=without and transform in PASSES and frontend in ("module", "traced"),
        input_range=bounded and transform == "remove_residuals",
        calibrated=transform == "remove_residuals" and ways != "auto" and not compiled,
        changes=_draw_changes(random, spec) if compiled else (),
        minimise=random.choice(TARGETS),
    )


def _draw_changes(random: Random, spec: NetworkSpec) -> tuple[str, ...]:
    """What is done to the weights; nothing that would do nothing."""
    norms = ("module BN", "functional BN", "statistics that are views")
    has_norms = bool(spec.features().intersection(norms))
    names = [name for name in CHANGES if has_norms or name != MOVED]
    return tuple(random.choice(names) for _ in range(random.randint(1, MOST_CHANGES)))
