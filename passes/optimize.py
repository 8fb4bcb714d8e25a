"""The passes in their order, and the choice between their results by measurement.

`optimize` makes three forms of a network and returns the fastest in the runtime at hand:

- folded: no-ops removed, batch norm folded. What every deployment does, and the measure.
- merged: parallel linear branches and linear layers in a row merged as well.
- converted: residual connections removed, too, where the policy says that it pays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmfx.analysis.ranges import Ranges
from rmfx.errors import OptionError, Refusal, ShapeError
from rmfx.frontend.tracing import trace
from rmfx.ir.driver import apply_rule
from rmfx.ir.net import Net
from rmfx.ir.undisturbed import undisturbed
from rmfx.oracle.verification import checked
from rmfx.removal.plan import plans
from rmfx.removal.policy import Policy, check_policy
from rmfx.removal.rule import Arrange, ResidualRule, apply_to_joins, as_one_layer, finish, joins_of
from rmfx.removal.site import Site
from rmfx.report import HELD_KEY, META_KEY, Report, SiteReport, Timing, report
from rmfx.rules.batch_norm import fold
from rmfx.rules.linear import LinearRule
from rmfx.rules.noop import NoopRule
from rmfx.timing.speed import Settings, compare_speed, is_faster, is_noise, ratio_of


@undisturbed
def optimize(
    model: nn.Module | Any,
    example_inputs: Any,
    *,
    policy: Policy = "profitable",
    runtime: str = "inductor",
    threads: int | None = None,
    rounds: int = 15,
    seconds: float = 0.1,
    step: Callable[[str], object] = lambda text: None,
    verify: bool = True,
) -> fx.GraphModule:
    """Make a network faster without changing what it computes, or return it as fast as it was.

    A form is returned if it is faster beyond the noise (a sign test on the rounds, of which there
    are more where the first leave it open), the fastest of them by the median; else the original
    with its batch norm folded. The report has every form's ratio, and says where it is noise.

    Args:
        model: `nn.Module`, `GraphModule` or `ExportedProgram` in eval mode; not changed.
        example_inputs: a tensor or a tuple of tensors of the size that matters.
        policy: which residual connections to remove, and which branches to merge; see
            `remove_residuals`. Whatever it says, what is not faster is not returned.
        runtime: "eager", "inductor", "onnxruntime" or "openvino": where it is to be fast.
        threads: for one inference; by default torch's.
        rounds: how often each form is timed.
        seconds: how long each timing takes at least.
        step: called with a few words before each step.
        verify: compare what is returned with the model before it is; see `rmfx.verify`.

    Returns:
        The fastest form; `rmfx.report` holds what was done at each site and what was measured.

    Raises:
        LatencyError: an option is out of range, or the runtime is unknown, not installed or fails.
        RmfxError: the model cannot be traced or its weights cannot be used.

    Example:
        >>> import rmfx, torch
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.conv3 = torch.nn.Conv2d(32, 32, 3, padding=1)
        ...         self.conv1 = torch.nn.Conv2d(32, 32, 1)
        ...     def forward(self, x):
        ...         return self.conv3(x) + self.conv1(x) + x
        >>> fast = rmfx.optimize(Block().eval(), torch.randn(1, 32, 32, 32), runtime="eager")
        >>> [timing.form for timing in rmfx.report(fast).timings]
        ['folded', 'merged']
    """
    check_policy(policy)
    inputs = _inputs(example_inputs)
    threads = torch.get_num_threads() if threads is None else threads
    settings = Settings((runtime,), threads=threads, rounds=rounds, seconds=seconds)
    step("fold batch norm")
    source = trace(model, inputs)
    forms, tried = forms_of(source, policy, step)
    best, rows = "folded", tried
    timings: tuple[Timing, ...] = ()
    if len(forms) > 1:
        best, timings = _measured(forms, inputs, runtime, settings, step)
        rows = _rows(report(forms[best]), tried, timings)
    held = forms[best].meta.get(HELD_KEY, ())
    forms[best].meta[META_KEY] = Report(rows, timings, held=held)
    return checked("optimize", model, source, forms[best], inputs, wanted=verify, reports=True)


def _measured(
    forms: Mapping[str, fx.GraphModule],
    inputs: tuple[Tensor, ...],
    runtime: str,
    settings: Settings,
    step: Callable[[str], object],
) -> tuple[str, tuple[Timing, ...]]:
    """The name of the form to return, and how long each takes."""
    times = compare_speed(list(forms.values()), inputs, runtime, settings, step)
    if any(_is_open(times[0], own) for own in times[1:]):
        more = replace(settings, rounds=3 * settings.rounds)
        again = compare_speed(list(forms.values()), inputs, runtime, more, step)
        times = [(*own, *others) for own, others in zip(times, again, strict=True)]
    best = _fastest(dict(zip(forms, times, strict=True)))
    timings = tuple(
        Timing(
            name,
            runtime,
            *ratio_of(times[0], own),
            beyond_noise=not is_noise(times[0], own),
            rounds=len(own),
            chosen=name == best,
        )
        for name, own in zip(forms, times, strict=True)
    )
    return best, timings


def _is_open(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether a form won most rounds, and too few of them to be surely faster."""
    wins = sum(own < other for own, other in zip(after, before, strict=True))
    return 2 * wins > len(before) and not is_faster(before, after)


def _fastest(times: Mapping[str, Sequence[float]]) -> str:
    """The form with the least median ratio of those that are surely faster, else the first."""
    first = next(iter(times))
    faster = [name for name in times if name != first and is_faster(times[first], times[name])]
    return min(faster, key=lambda name: ratio_of(times[first], times[name])[0], default=first)


def _rows(
    made: Report, tried: Sequence[SiteReport], timings: Sequence[Timing]
) -> tuple[SiteReport, ...]:
    """What became of every site, where one that could have gone was kept after measuring."""
    slower, best = timings[-1], next(timing for timing in timings if timing.chosen)
    reason = f"it would not pay, measured: time in {slower.runtime} times {slower.told}"
    if best is not timings[0]:
        reason += f"; without it, times {best.told}"
    rows, tried_at = [], {row.join: row for row in tried}
    for row in made.rows:
        other = tried_at.get(row.join, row)
        if row.status == "removed":
            rows.append(row)
        elif other.status == "removed":
            rows.append(replace(row, status="kept", reason=reason))
        else:
            rows.append(replace(other, node=row.node))
    return tuple(rows)


def _inputs(example_inputs: Any) -> tuple[Tensor, ...]:
    given = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    if not isinstance(given, (tuple, list)) or not all(isinstance(x, Tensor) for x in given):
        raise ShapeError("optimize measures on example inputs: pass a tensor or a tuple of tensors")
    if not given:
        raise OptionError("optimize needs at least one example input")
    return tuple(given)


def forms_of(
    source: fx.GraphModule, policy: Policy, step: Callable[[str], object]
) -> tuple[dict[str, fx.GraphModule], tuple[SiteReport, ...]]:
    """The forms that differ from one another, the folded one first; what the last one removes."""
    found = {"folded": _rewritten(source, None, policy)}
    for name, arrange in (("merged", as_one_layer), ("converted", plans)):
        step(f"make the {name} form")
        form = _rewritten(source, arrange, policy)
        if all(_shape(form) != _shape(other) for other in found.values()):
            found[name] = form
    return found, report(form).rows


def _rewritten(source: fx.GraphModule, arrange: Arrange | None, policy: Policy) -> fx.GraphModule:
    """One form of a traced network; without an arrangement of sites they stay."""
    net = Net(source)
    joins = joins_of(net)
    # No-ops first: a dropout at the end of a branch would be one more layer to pass.
    apply_rule(net, NoopRule())
    # Batch norm next: what is folded needs no column of its own.
    fold(net)
    rule = ResidualRule(Ranges(net), arrange=arrange or _not_now, policy=policy)
    refusals: dict[fx.Node, Refusal] = {}
    if arrange is None:
        _, refusals = apply_rule(net, rule)
    else:
        # Sites from the inside out, concatenations between them: each may end in a linear layer.
        _, refusals = apply_to_joins(net, rule)
        # Last, where it is cheaper: what the rewrites left next to another linear layer.
        apply_rule(net, LinearRule())
    made: fx.GraphModule = finish(net, rule, refusals, joins)
    return made


def _not_now(site: Site) -> Refusal:
    return Refusal("batch norm was folded, nothing else done", by_choice=True)


def _shape(gm: fx.GraphModule) -> tuple[str, list[str]]:
    """What two forms of one network have in common exactly where they are the same."""
    return gm.code, [str(m) for m in gm.modules() if not list(m.children())]
