"""What data tell of a network's values: moments for batch norms, extremes for shifts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from rmfx.analysis.ranges import Range
from rmfx.errors import ShapeError
from rmfx.frontend.memory import writes_undone
from rmfx.options import as_inputs

from .batches import check_batches, output_on
from .moments import Moments


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured, by node name.

    Attributes:
        moments: of the values that were wanted.
        extremes: if wanted, least and greatest value per channel of every value, once with the
            channels in dimension 1 and once with the channels last.
    """

    moments: dict[str, Moments]
    extremes: dict[str, tuple[Range, Range]]


class _Recorder(fx.Interpreter):
    """Finds the extremes of all values, and the moments of some."""

    def __init__(
        self, gm: fx.GraphModule, *, extremes: bool, wanted: Callable[[fx.Node], bool]
    ) -> None:
        super().__init__(gm)
        self._wants_extremes = extremes
        self._wanted = wanted
        self.moments: dict[str, Moments] = {}
        self.extremes: dict[str, tuple[Range, Range]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        has_rows = isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2
        is_image = has_rows and value.numel() > 0
        if is_image and self._wants_extremes:
            self._widen(n.name, value.detach())
        if is_image and self._wanted(n):
            rows = value.transpose(0, 1).flatten(1)
            known = self.moments.setdefault(n.name, Moments())
            if known.count and len(known.mean) != len(rows):
                raise ShapeError(
                    f"{n.name} has {len(known.mean)} channels in one calibration batch and "
                    f"{len(rows)} in another; pass batches of one size"
                )
            known.add(rows)
        return value

    def _widen(self, name: str, value: Tensor) -> None:
        found = []
        known = self.extremes.get(name)
        for i, axis in enumerate((1, value.dim() - 1)):
            rows = value.transpose(0, axis).flatten(1)
            low, high = (end.to("cpu", torch.float64) for end in (rows.amin(1), rows.amax(1)))
            here = Range(low, high, last=i == 1)
            found.append(here if known is None else here.hull(known[i]))
        self.extremes[name] = (found[0], found[1])


def _forks(node: fx.Node) -> bool:
    return len(node.users) > 1


def measure(
    gm: fx.GraphModule,
    batches: Iterable[Any],
    *,
    extremes: bool = False,
    wanted: Callable[[fx.Node], bool] = _forks,
) -> Measured:
    """Moments, and if wanted extremes, of the values of a graph over some batches.

    Args:
        gm: the graph.
        batches: of inputs.
        extremes: whether to note those of every value.
        wanted: of which nodes to take the moments, by default those that are read more than once.

    Raises:
        ShapeError: there is no batch, or values change their channels from batch to batch.
    """
    check_batches("calibration", batches, pairs=False)
    recorder = _Recorder(gm, extremes=extremes, wanted=wanted)
    count = 0
    with torch.no_grad(), writes_undone(gm):
        for batch in batches:
            inputs = as_inputs(batch) or ()
            if any(isinstance(x, Tensor) and not x.numel() for x in inputs):
                raise ShapeError("calibration holds an empty batch")
            output_on(recorder.run, inputs, "calibration batch of")
            count += 1
    if not count:
        raise ShapeError("calibration holds no batch; pass at least one")
    return Measured(recorder.moments, recorder.extremes)
