"""What data tell of a network's values: moments for batch norms, extremes for shifts.

A batch norm with γ = √(σ² + ε) and β = μ is the identity for any μ and σ² (RMNet, arXiv 2111.00687,
section 3). With μ and σ² of the carried values, training that goes on from there starts well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmfx._algebra import in_turn
from rmfx._batches import check_batches, output_on
from rmfx._errors import OptionError, ShapeError
from rmfx._moments import Moments
from rmfx._range import Range
from rmfx.frontend import as_inputs


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
    with torch.no_grad():
        for batch in batches:
            inputs = as_inputs(batch) or ()
            if any(isinstance(x, Tensor) and not x.numel() for x in inputs):
                raise ShapeError("calibration holds an empty batch")
            output_on(recorder.run, inputs, "calibration batch of")
            count += 1
    if not count:
        raise ShapeError("calibration holds no batch; pass at least one")
    return Measured(recorder.moments, recorder.extremes)


def identity_norm(
    module: nn.Module, carried: int, moments: Moments | None, runs: int = 1
) -> nn.Module:
    """A copy of a batch norm, widened by `carried` channels on which it is the identity.

    Args:
        moments: of the carried values; mean 0 and variance 1 if None. Channels beyond those
            measured (zero padding of the carry) get mean 0 and variance 1.
        runs: in so many its own channels and the carried ones take turns.

    Raises:
        OptionError: the moments are not finite in the type of the batch norm.
    """
    eps = float(module.eps)  # type: ignore[arg-type]
    mean, variance = (
        torch.zeros(carried, dtype=torch.float64),
        torch.ones(carried, dtype=torch.float64),
    )
    if moments is not None and len(moments.mean) <= carried:
        mean[: len(moments.mean)] = moments.mean.cpu()
        variance[: len(moments.mean)] = moments.variance.cpu()
    own_mean: Tensor = module.running_mean  # type: ignore[assignment]
    n = own_mean.numel()
    weight = module.weight if isinstance(module.weight, Tensor) else torch.ones_like(own_mean)
    bias = module.bias if isinstance(module.bias, Tensor) else torch.zeros_like(own_mean)
    wide = type(module)(n + carried, eps=eps, momentum=module.momentum)
    wide = wide.to(own_mean.device, own_mean.dtype)
    # γ follows from the variance as it is stored, so that rounding cancels.
    stored = variance.to(own_mean.dtype).to(torch.float64)
    if not (stored.isfinite().all() and mean.to(own_mean.dtype).isfinite().all()):
        raise OptionError(
            "on the calibration data the network computes NaN, Inf or numbers whose variance is "
            f"beyond {own_mean.dtype}; pass data on which it does not"
        )
    gamma = torch.sqrt(stored + eps)
    with torch.no_grad():
        for target, own, carry in (
            (wide.weight, weight, gamma),
            (wide.bias, bias, mean),
            (wide.running_mean, own_mean, mean),
            (wide.running_var, module.running_var, stored),
        ):
            target.copy_(in_turn([own.detach(), carry.to(own_mean)], runs))  # type: ignore[operator]
    return wide.eval()
