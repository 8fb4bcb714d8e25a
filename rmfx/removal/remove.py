"""The rules in their order, from a graph in the dialect to one without residual connections."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import fx

from rmfx.algebra.digits import EXACTNESS
from rmfx.analysis.multiply_adds import expense_of
from rmfx.analysis.ranges import Ranges
from rmfx.data.batches import check_batches
from rmfx.data.calibration import Measured, measure
from rmfx.errors import Refusal
from rmfx.interval import Interval
from rmfx.ir.driver import apply_rule
from rmfx.ir.net import Net
from rmfx.report import META_KEY
from rmfx.rules.batch_norm import fold
from rmfx.rules.linear import LinearRule
from rmfx.rules.noop import NoopRule

from .additions import told_apart
from .own_weights import copies_of, with_calls_apart
from .plan import plans
from .policy import Policy
from .rule import ResidualRule, check_strict, finish, joins_of
from .strategy import AUTO
from .target import BY_NAME, Target


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


@dataclass(frozen=True, eq=False, kw_only=True)
class Options:
    """What `remove_residuals` is asked for; it says what each option means.

    Attributes:
        allowed: the ways for a carry to pass an activation, of `activation`.
        weights_vary: whether weights may change, so that they prove nothing.
    """

    strict: bool = False
    allowed: Collection[str] = AUTO
    input_range: Interval | None = None
    fold_batch_norm: bool = True
    calibration: Iterable[Any] | None = None
    weights_vary: bool = False
    policy: Policy = "all"
    minimise: str = "time"
    copy_shared: bool = True


def remove(source: fx.GraphModule, options: Options) -> fx.GraphModule:
    """The network as plain chains, as far as it can be, and a report on its joins."""
    source = with_calls_apart(source) if options.copy_shared else source
    measured = None
    if options.calibration is not None:
        measured = measure(source, options.calibration, extremes="shift" in options.allowed)
    target = BY_NAME[options.minimise]
    found = _removed(source, options, measured, target)
    if target.rearranges and found.rule.nested:
        # What is taken apart for one carry may be dear beside that of a site around it.
        other = _removed(source, options, measured, replace(target, rearranges=False))
        found = min(found, other, key=_Removed.cost)
    # Weights that are computed at every call are not copies of what they are computed of.
    copied = [] if options.weights_vary else copies_of(found.net)
    return finish(found.net, found.rule, found.refusals, found.joins, copied)


def _removed(
    source: fx.GraphModule, options: Options, measured: Measured | None, target: Target
) -> _Removed:
    net = Net(source, may_copy=options.copy_shared)
    joins = joins_of(net)
    # No-ops first: a dropout at the end of a branch would be one more layer to pass.
    apply_rule(net, NoopRule(keep_detach=options.weights_vary))
    # Batch norm next: what is folded needs no column, and no identity batch norm on the carry.
    if options.fold_batch_norm:
        fold(net)
    extremes = measured.extremes if measured else None
    rule = ResidualRule(
        Ranges(net, options.input_range, weights_vary=options.weights_vary, measured=extremes),
        allowed=options.allowed,
        fold_batch_norm=options.fold_batch_norm,
        moments=measured.moments if measured else None,
        arrange=partial(plans, target=target),
        policy=options.policy,
    )
    _, refusals = apply_rule(net, rule)
    if options.strict:
        refusals = told_apart(net, refusals)
    check_strict("remove_residuals", refusals, strict=options.strict)
    # Last, where it is cheaper: a Δ or ∇ that stands alone merges with the layer next to it.
    linear = LinearRule(keep_norms=not options.fold_batch_norm, concerns=rule.made.__contains__)
    apply_rule(net, linear)
    for nodes, difference in linear.saved:
        rule.count_in(nodes, difference)
    return _Removed(net, rule, refusals, joins)


@dataclass(frozen=True, eq=False)
class _Removed:
    """A net whose sites are rewritten, and what was done."""

    net: Net
    rule: ResidualRule
    refusals: Mapping[fx.Node, Refusal]
    joins: Sequence[str]

    def cost(self) -> int:
        """Its multiply-adds, or its parameters where these are not known."""
        whole = expense_of(self.net, self.net.graph.nodes)
        return whole.parameters if whole.macs is None else whole.macs
