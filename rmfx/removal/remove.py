"""The rules in their order, from a graph in the dialect to one without residual connections."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from functools import partial
from typing import Any

from torch import fx

from rmfx.algebra.digits import EXACTNESS
from rmfx.analysis.ranges import Ranges
from rmfx.data.batches import check_batches
from rmfx.data.calibration import measure
from rmfx.interval import Interval
from rmfx.ir.driver import apply_rule
from rmfx.ir.net import Net
from rmfx.report import META_KEY
from rmfx.rules.batch_norm import fold
from rmfx.rules.linear import LinearRule
from rmfx.rules.noop import NoopRule

from .plan import plans
from .policy import Policy
from .rule import ResidualRule, check_strict, finish, joins_of
from .strategy import AUTO
from .target import BY_NAME


class CalibrationData:
    """Calibration data, gone through once, of which the first batch is kept."""

    def __init__(self, data: Iterable[Any]) -> None:
        check_batches("calibration", data, pairs=False)
        self._data = data
        self.first: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        for batch in self._data:
            self.first = self.first or [batch]
            yield batch


def is_calibrated(converted: fx.GraphModule) -> bool:
    """Whether a network holds for values like those of the calibration data only."""
    rows = converted.meta[META_KEY].rows
    return any(row.exactness == EXACTNESS[-1] for row in rows)


def remove(
    source: fx.GraphModule,
    *,
    strict: bool = False,
    allowed: Collection[str] = AUTO,
    input_range: Interval | None = None,
    fold_batch_norm: bool = True,
    calibration: Iterable[Any] | None = None,
    weights_vary: bool = False,
    policy: Policy = "all",
    minimise: str = "time",
) -> fx.GraphModule:
    """The network as plain chains, as far as it can be, and a report on its joins.

    The options are those of `remove_residuals`.
    """
    measured = None
    if calibration is not None:
        measured = measure(source, calibration, extremes="shift" in allowed)
    net = Net(source)
    joins = joins_of(net)
    # No-ops first: a dropout at the end of a branch would be one more layer to pass.
    apply_rule(net, NoopRule(keep_detach=weights_vary))
    # Batch norm next: what is folded needs no column, and no identity batch norm on the carry.
    if fold_batch_norm:
        fold(net)
    rule = ResidualRule(
        Ranges(
            net,
            input_range,
            weights_vary=weights_vary,
            measured=measured.extremes if measured else None,
        ),
        allowed=allowed,
        fold_batch_norm=fold_batch_norm,
        moments=measured.moments if measured else None,
        arrange=partial(plans, target=BY_NAME[minimise]),
        policy=policy,
    )
    _, refusals = apply_rule(net, rule)
    check_strict("remove_residuals", refusals, strict=strict)
    # Last, where it is cheaper: a Δ or ∇ that stands alone merges with the layer next to its site.
    apply_rule(net, LinearRule(keep_norms=not fold_batch_norm, concerns=rule.made.__contains__))
    return finish(net, rule, refusals, joins)
