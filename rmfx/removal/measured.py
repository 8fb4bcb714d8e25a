"""A policy that times each site, before and after, instead of believing a model of costs.

    policy = rmfx.MeasuredPolicy("inductor", cache="timings.json")
    plain = rmfx.remove_residuals(model, example_inputs, policy=policy)

A site is cut out of the network as it stands (what lies inside it is rewritten already), run on
random inputs of its real shapes, rewritten by `remove_residuals` and run again, in turn. Sites that
are alike are timed once; with a cache file once for ever, on this machine and these versions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, fx

from rmfx.errors import Refusal
from rmfx.ir.net import Net
from rmfx.table import told_ratio
from rmfx.timing.speed import ratio_of
from rmfx.timing.timer import Timer

from .cut_out import cut_out, looks
from .site import Site

Ratio = tuple[float, float, float]
Inputs = tuple[Tensor, ...]
BothForms = Callable[[fx.GraphModule, Inputs], tuple[fx.GraphModule, fx.GraphModule]]


class MeasuredPolicy:
    """Rewrites the sites that become faster, by measurement.

    Args:
        runtime: "eager", "inductor", "onnxruntime" or "openvino".
        cache: a JSON file for the timings, read if it is there and written after each.
        threads: for one inference; by default torch's.
        rounds: how often each form of a site is timed.
        seconds: how long each timing takes at least.
        step: called with a few words before each site is timed.
    """

    def __init__(
        self,
        runtime: str = "inductor",
        *,
        cache: str | Path | None = None,
        threads: int | None = None,
        rounds: int = 9,
        seconds: float = 0.05,
        step: Callable[[str], object] = lambda text: None,
    ) -> None:
        self.runtime = runtime
        self._timer = Timer(runtime, cache, threads, rounds, seconds, step)

    @property
    def timings(self) -> dict[str, Ratio]:
        """Median ratio after/before and quartiles, by a hash of site, shapes and runtime."""
        return self._timer.known

    def reason_to_keep(self, net: Net, site: Site, both_forms: BothForms) -> Refusal | None:
        """Why a site stays, None if it goes.

        Args:
            both_forms: what a network is without and with the rewrite, each made by a pass: what
                that puts around a network takes time itself.
        """
        alone = cut_out(net, site)
        if alone is None:
            return Refusal("its shapes are unknown; pass example_inputs", by_choice=True)
        ratio = self._timing(site.join.name, *alone, both_forms)
        median, low, high = ratio
        if median < 1:
            return None
        # By the quartiles: rounds are not kept.
        told = told_ratio(ratio, is_noise=low <= 1 <= high)
        cause = f"measured alone: time in {self.runtime} times {told}"
        return Refusal(f"it would not pay, {cause}", by_choice=True)

    def _timing(
        self, name: str, alone: fx.GraphModule, inputs: Inputs, both_forms: BothForms
    ) -> Ratio:
        def measure() -> Ratio:
            return ratio_of(*self._timer.times(both_forms(alone, inputs), inputs))

        median, low, high = self._timer.once(name, looks(alone, inputs), measure)
        return median, low, high
