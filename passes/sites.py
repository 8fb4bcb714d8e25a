"""Choosing for each residual connection: keep it, open it into a carry, or cut it.

    keep   nothing happens
    open   `remove_residuals` there: exact, faster or slower as it comes
    cut    the branch alone is left, without shortcut and addition: faster, and another function

Each site is timed alone in all three forms in the runtime at hand. What cutting costs is measured
on data: the loss of the whole network without that one shortcut, after its batch norms have seen
the data anew, less the loss with it. Of all choices whose losses add up to no more than is allowed,
the one that saves the most time is taken (a knapsack, solved exactly for these numbers). That
losses add up is an approximation; the loss of the result is measured in the end.

Cut can be what adds two values of which one is its fork passed on by linear layers only; `x - f(x)`
and scaled sums cannot. What may be opened is what `remove_residuals` can remove.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.optim.swa_utils import update_bn

from rmfx.data.batches import Batches, Loss, check_batches, inputs_of, loss_on, output_on
from rmfx.errors import OptionError, ShapeError
from rmfx.frontend.memory import writes_undone
from rmfx.frontend.tracing import trace
from rmfx.ir.driver import apply_rule
from rmfx.ir.names import module_path
from rmfx.ir.net import Net
from rmfx.ir.undisturbed import undisturbed
from rmfx.options import number_of
from rmfx.oracle.verification import Domain, checked
from rmfx.removal.cut_out import cut_out, looks
from rmfx.removal.remove import Options, is_calibrated, remove
from rmfx.removal.shortcuts import Candidate, branch_alone, candidates_of, without
from rmfx.report import META_KEY
from rmfx.rules.batch_norm import fold
from rmfx.rules.noop import NoopRule
from rmfx.table import Column, Record, name_of, numbered, table
from rmfx.timing.timer import Timer

CHOICES = ("keep", "open", "cut")


@dataclass(frozen=True)
class SiteChoice:
    """What became of one site.

    Attributes:
        place: path of the module whose code adds, "" for the root.
        join: name of the addition.
        choice: "keep", "open" or "cut".
        seconds: it takes alone as it is.
        seconds_open, seconds_cut: in the other forms, None where there is none.
        loss_cut: what cutting it adds to the loss.
        index: which of several joins of that place it is, from 1 on; 0 where it is the only one.
    """

    place: str
    join: str
    choice: str
    seconds: float
    seconds_open: float | None
    seconds_cut: float | None
    loss_cut: float | None
    index: int = 0


@dataclass(frozen=True)
class ChoiceReport(Record):
    """What `choose_sites` did. `str()` gives a table, `to_dict` what JSON can hold.

    Attributes:
        sites: one row each.
        loss_before, loss_after: of the network on the data, its batch norms having seen them anew.
        runtime: in which the sites were timed.
    """

    sites: tuple[SiteChoice, ...]
    loss_before: float
    loss_after: float
    runtime: str

    def __str__(self) -> str:
        if not self.sites:
            return "no residual connections"
        loss = f"loss {self.loss_before:.4f} -> {self.loss_after:.4f}, times in {self.runtime}"
        return f"{table(self.sites, _COLUMNS)}\n{loss}"


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us"


_COLUMNS = (
    Column("site", name_of),
    Column("choice", "choice"),
    Column("as it is", "seconds", _microseconds, right=True),
    Column("open", "seconds_open", _microseconds, right=True),
    Column("cut", "seconds_cut", _microseconds, right=True),
    Column("loss by cutting", "loss_cut", "+.4f", right=True),
)


# ---- the verb -----------------------------------------------------------------------------------


@undisturbed
def choose_sites(
    model: nn.Module | Any,
    example_inputs: Any,
    data: Batches,
    *,
    budget: float = 0.05,
    loss: Loss = F.cross_entropy,
    choices: Sequence[str] = CHOICES,
    runtime: str = "inductor",
    cache: str | Path | None = None,
    threads: int | None = None,
    rounds: int = 5,
    seconds: float = 0.05,
    step: Callable[[str], object] = lambda text: None,
) -> tuple[fx.GraphModule, ChoiceReport]:
    """Keep, open or cut each residual connection: the fastest choice that the loss allows.

    Args:
        model: `nn.Module`, `GraphModule` or `ExportedProgram` in eval mode; not changed.
        example_inputs: a tensor or a tuple of tensors of the size that matters.
        data: batches of (inputs, targets), gone through once for each site that may be cut.
        budget: how much cutting may add to the mean loss; training afterwards wins some of it back.
        loss: called with the model's output and the targets, a mean over the batch.
        choices: what may be done, "keep" included.
        runtime: "eager", "inductor", "onnxruntime" or "openvino": where it is to be fast.
        cache: a JSON file for the timings.
        threads: for one inference; by default torch's.
        rounds: how often each form of a site is timed.
        seconds: how long each timing takes at least.
        step: called with a few words before each step.

    Returns:
        The network and a report. Its batch norms have statistics of the data where something was
        cut; where something was opened they stay batch norms, to be trained further.

    Raises:
        OptionError: an option makes no sense.
        ShapeError: there are no example inputs, or the model does not run on a batch.
        RmfxError: the model cannot be traced or its weights cannot be used.
    """
    _check_choices(choices)
    budget = number_of("budget", budget, least=0)
    if example_inputs is None:
        raise ShapeError("choose_sites needs example inputs: it times sites at their sizes")
    batches = _checked_batches(data)
    source = trace(model, example_inputs)
    net = Net(source)
    apply_rule(net, NoopRule())
    candidates = candidates_of(net, can_cut="cut" in choices)
    timer = Timer(runtime, cache, threads, rounds, seconds, step)
    rows = []
    with writes_undone(source):
        before = _loss_of(_reestimated(copy.deepcopy(source), batches), batches, loss)
        for i, candidate in enumerate(candidates):
            step(f"site {i + 1} of {len(candidates)}")
            rows.append(_measure(net, source, candidate, timer, batches, (loss, before), choices))
        chosen = knapsack(rows, budget)
        rows = [replace(row, choice=choice) for row, choice in zip(rows, chosen, strict=True)]
        gm = _with_choices(source, candidates, rows, example_inputs, batches)
    with writes_undone(gm):
        after = _loss_of(gm, batches, loss)
    return gm, ChoiceReport(numbered(rows), before, after, runtime)


def _check_choices(choices: Sequence[str]) -> None:
    unknown = [name for name in choices if name not in CHOICES]
    if unknown or "keep" not in choices:
        raise OptionError(f"choices={choices!r}: 'keep', and any of 'open' and 'cut'")


def _checked_batches(data: Batches) -> list[Any]:
    check_batches("data", data)
    batches = [*data]
    for batch in batches:
        inputs_of(batch)
    if not batches:
        raise OptionError("data holds no batches")
    return batches


def _with_choices(
    source: fx.GraphModule,
    candidates: Sequence[Candidate],
    rows: Sequence[SiteChoice],
    example_inputs: Any,
    batches: Sequence[Any],
) -> fx.GraphModule:
    by_choice: dict[str, list[Candidate]] = {choice: [] for choice in CHOICES}
    for candidate, row in zip(candidates, rows, strict=True):
        by_choice[row.choice].append(candidate)
    gm = source
    if by_choice["cut"]:
        gm = _reestimated(without(source, by_choice["cut"]), batches)
    names = {candidate.site.join.name for candidate in by_choice["open"]}
    traced, data = trace(gm, example_inputs), [inputs for inputs, _ in batches]
    options = Options(fold_batch_norm=False, calibration=data, policy=lambda row: row.join in names)
    opened = remove(traced, options)
    seen = data[:1] if is_calibrated(opened) else []
    domain = Domain(batches=seen)
    checked("choose_sites", gm, traced, opened, example_inputs, domain=domain, reports=True)
    opened.meta.pop(META_KEY, None)  # the report of this pass is another one
    return opened


# ---- what it costs ------------------------------------------------------------------------------


def _measure(
    net: Net,
    source: fx.GraphModule,
    candidate: Candidate,
    timer: Timer,
    batches: Sequence[Any],
    baseline: tuple[Loss, float],
    choices: Sequence[str],
) -> SiteChoice:
    """What each choice would cost at one site."""
    site = candidate.site
    alone = cut_out(net, site)
    if alone is None:
        raise ShapeError(f"{site.join.name}: its shapes are unknown")
    graph, inputs = alone
    forms: dict[str, fx.GraphModule] = {"keep": _folded(graph, inputs)}
    if "open" in choices:
        opened = remove(trace(graph, inputs), Options())
        forms |= {"open": opened} if opened.meta[META_KEY].removed else {}
    loss_cut = None
    if candidate.main is not None:
        forms["cut"] = _folded(branch_alone(graph, candidate.main), inputs)
        loss, before = baseline
        gm = _reestimated(without(source, [candidate]), batches)
        loss_cut = _loss_of(gm, batches, loss) - before

    def medians() -> list[float]:
        return [statistics.median(own) for own in timer.times([*forms.values()], inputs)]

    told = tuple(looks(gm, inputs) for gm in forms.values())
    seconds = dict(zip(forms, timer.once(site.join.name, told, medians), strict=True))
    return SiteChoice(
        place=module_path(site.join),
        join=site.join.name,
        choice="keep",
        seconds=seconds["keep"],
        seconds_open=seconds.get("open"),
        seconds_cut=seconds.get("cut"),
        loss_cut=loss_cut,
    )


def _folded(graph: fx.GraphModule, inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    """A graph as it would be deployed, with its batch norm folded."""
    net = Net(trace(graph, inputs))
    fold(net)
    return net.finish()


def _reestimated(gm: fx.GraphModule, batches: Sequence[Any]) -> fx.GraphModule:
    """The graph, its batch norms with the statistics of the data."""
    # It calls its network with the first part of each batch.
    update_bn([(inputs,) for inputs, _ in batches], _Unpacked(gm))
    return gm.eval()


class _Unpacked(nn.Module):
    """Calls a network with the inputs of a batch, be they one tensor or several."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Any) -> Any:
        return output_on(self.network, inputs)


@torch.no_grad()
def _loss_of(gm: fx.GraphModule, batches: Sequence[Any], loss: Loss) -> float:
    network = _Unpacked(gm)
    return statistics.fmean(
        float(loss_on(loss, network(inputs), target)) for inputs, target in batches
    )


# ---- the choice ---------------------------------------------------------------------------------


def knapsack(rows: Sequence[SiteChoice], budget: float) -> list[str]:
    """One choice for each site: the most time saved for a loss within the budget.

    States that lose more and save less than another one are dropped, so what is left is exact.
    """
    states: list[tuple[float, float, tuple[str, ...]]] = [(0.0, 0.0, ())]
    # What may yet be won back by cuts that lower the loss.
    slack = sum(min(0.0, row.loss_cut or 0.0) for row in rows)
    for row in rows:
        slack -= min(0.0, row.loss_cut or 0.0)
        options = [("keep", 0.0, 0.0)]
        if row.seconds_open is not None:
            options.append(("open", 0.0, row.seconds - row.seconds_open))
        if row.seconds_cut is not None and row.loss_cut is not None:
            options.append(("cut", row.loss_cut, row.seconds - row.seconds_cut))
        grown = [
            (lost + more, saved + gained, (*made, choice))
            for lost, saved, made in states
            for choice, more, gained in options
            if lost + more + slack <= budget
        ]
        states = _best_of(grown)
    within = [state for state in states if state[0] <= budget]
    return list(max(within, key=lambda state: state[1])[2])


def _best_of(
    states: list[tuple[float, float, tuple[str, ...]]],
) -> list[tuple[float, float, tuple[str, ...]]]:
    """The states of which none is better in both loss and time."""
    kept: list[tuple[float, float, tuple[str, ...]]] = []
    for state in sorted(states, key=lambda state: (state[0], -state[1])):
        if not kept or state[1] > kept[-1][1]:
            kept.append(state)
    return kept
