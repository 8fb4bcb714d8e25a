"""Channel pruning: filters that matter least go, until the network costs no more than asked for.

Which filters go together is read off the graph (`rmfx.analysis.channel_labels`): the filters of all
layers whose outputs meet in an addition, a product or a gate go at once, with the numbers of batch
norm and of per-channel activations, and the columns of every layer that reads them. A network
without residual connections has no such ties, so each filter goes alone, those that carry as well.

What a filter gave on average goes into the bias of the layers that read it (or into the running
mean of the batch norm behind them). So a channel that is constant goes without a trace, except next
to borders where it was padded with zeros; with `responses="borders"` there as well, for one more
channel, of ones, at each layer that pads.

Forms handled: Conv1d/2d/3d, transposed convs, Linear; batch norm, PReLU, activations, pools,
paddings; sums, products, selections, concatenations, slices, flattening; constants per channel.
Filters stay that reach an output, layer or group norm, attention, a reshape, or a layer that is
shared, hooked or parametrized.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rmfx.analysis.channel_labels import Channels
from rmfx.choices import ALLOCATIONS, BY_DATA, COSTS, IMPORTANCES
from rmfx.cost.counting import Cost, count_graph
from rmfx.data.batches import Batches, Loss, check_batches
from rmfx.errors import OptionError, ShapeError
from rmfx.frontend.tracing import trace
from rmfx.ir.net import Net
from rmfx.ir.undisturbed import undisturbed
from rmfx.options import check_choice, count_of, number_of
from rmfx.pruning.allocation import Demand, Multiple, allocate
from rmfx.pruning.cutting import with_biases, with_ones, without
from rmfx.pruning.families import Meter, Widths, multiply_adds, parameters
from rmfx.pruning.importance import Custom, Responses, activation, by_layer, by_weight, taylor
from rmfx.pruning.latency_table import LatencyTable
from rmfx.table import Column, Record, change, table

Step = Callable[[str], object]
RESPONSES = ("bias", "borders", "none")
METERS = {"macs": multiply_adds, "parameters": parameters}


@dataclass(frozen=True)
class FamilyReport:
    """Filters that went one by one.

    Attributes:
        layers: paths of the layers that make them; more than one where their outputs meet.
        before, after: how many there were and are.
    """

    layers: tuple[str, ...]
    before: int
    after: int


@dataclass(frozen=True)
class PruningReport(Record):
    """What `prune_channels` did. `str()` gives a table, `to_dict` what JSON can hold.

    Attributes:
        families: one for each set of filters that can go one by one.
        macs_before, macs_after: multiply-adds.
        parameters_before, parameters_after: numbers in the parameters.
        importance, allocation: as asked for, or by default.
        held: operations that no channel of what they read can leave, and why.
    """

    families: tuple[FamilyReport, ...]
    macs_before: int
    macs_after: int
    parameters_before: int
    parameters_after: int
    importance: str
    allocation: str
    held: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        macs, size = (
            f"{change(before, after)} {name} ({after / max(before, 1):.3f})"
            for before, after, name in (
                (self.macs_before, self.macs_after, "multiply-adds"),
                (self.parameters_before, self.parameters_after, "parameters"),
            )
        )
        tables = (table(self.families, _FAMILIES), table(self.held, _HELD))
        return "\n".join(filter(None, (*tables, f"{macs}, {size}")))


_FAMILIES = (
    Column("layers", "layers", ", ".join, width=60),
    Column("filters", "before", right=True),
    Column("left", "after", right=True),
)
_HELD = (
    Column("no channel leaves", itemgetter(0)),
    Column("since", itemgetter(1), width=60),
)


@undisturbed
def prune_channels(
    model: nn.Module | Any,
    example_inputs: Any,
    *,
    target: float | None = None,
    budget: float | None = None,
    of: str | LatencyTable = "macs",
    data: Batches | None = None,
    loss: Loss = F.cross_entropy,
    importance: str | Custom | None = None,
    allocation: str = "uniform",
    floor: float = 0.1,
    multiple: Multiple = 1,
    protect: str | Sequence[str] = (),
    responses: str = "bias",
    seed: int = 0,
    step: Step = lambda text: None,
) -> tuple[fx.GraphModule, PruningReport]:
    """Remove the filters that matter least, with everything that is tied to them.

    Args:
        model: `nn.Module`, `GraphModule` or `ExportedProgram` in eval mode; not changed. Batch norm
            stays batch norm, so that the result can be trained on.
        example_inputs: a tensor or a tuple of arguments.
        target: share of the cost to keep, in (0, 1]; or
        budget: what the result may cost, in units of `of`.
        of: "macs" (multiply-adds on the example inputs), "parameters", "latency" (seconds under
            inductor, measured layer by layer), or a `LatencyTable` of another runtime.
        data: batches of (inputs, targets) that can be gone through twice, such as a list or a
            `DataLoader`; for "taylor" and "activation", and for what channels are on average.
        loss: called with the model's output and the targets.
        importance: "taylor", "activation", "bn_scale", "l1", "l2", "geometric_median", "random"; or
            a function of the traced graph that gives a number for each output channel of layers,
            by their paths; what it does not name counts as 0. By default "taylor" with data, "l2"
            without.
        allocation: "uniform", "global" or "search", see `rmfx.pruning.allocation`.
        floor: share of each family of filters that stays in any case; at least one filter does.
        multiple: to which the filters of a family are rounded up; or a function that gives it for
            so many filters. Runtimes compute 8 or 16 at once, and a few more cost as much again.
        protect: patterns such as "layer4.*" of the paths of layers whose filters stay.
        responses: "bias" puts what channels are on average into the next bias, if there are data;
            "borders" adds that padding stays 0, for a channel of ones more, in convolutions that
            are neither grouped nor transposed; "none" takes them for 0.
        seed: for importance="random".
        step: called with a few words before each step.

    Returns:
        The smaller network and a report.

    Raises:
        OptionError: an option makes no sense, or the target cannot be reached.
        ShapeError: there are no example inputs, or the model does not run on a batch.
        RmfxError: the model cannot be traced or its weights cannot be used.

    Example:
        >>> import rmfx, torch
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3)
        ... ).eval()
        >>> small, report = rmfx.prune_channels(
        ...     model, torch.randn(1, 3, 8, 8), target=0.5
        ... )
        >>> [m.out_channels for m in small.children() if isinstance(m, torch.nn.Conv2d)]
        [4, 4]
    """
    if importance is None:
        importance = "l2" if data is None else "taylor"
    options = Options(
        target, budget, of, data, loss, importance, allocation, floor, multiple, responses, seed
    )
    options.check()
    if example_inputs is None:
        raise ShapeError("prune_channels needs example inputs: it follows channels by their shapes")
    step("find which channels go together")
    net = Net(trace(model, example_inputs))
    net.sweep()
    widths = Widths(net, Channels(net), protect)
    found = _responses(net, widths, options, step)
    scores = _scores(net, widths, found, options, step)
    step("choose filters")
    meter = _meter(net, widths, found, options, step)
    before = count_graph(net.source)
    whole, fixed = _whole(widths, meter, of, before)
    allowed = budget if budget is not None else (target or 1) * whole
    keep = allocate(allocation, widths, scores, Demand(meter, allowed, multiple, floor, fixed))
    means = found.means if found is not None and responses != "none" else {}
    small = without(net, widths, keep, means, borders=responses == "borders")
    return small, _report(widths, keep, (before, count_graph(small)), options)


@dataclass(frozen=True, eq=False)
class Options:
    """What `prune_channels` is asked for; it says what each option means."""

    target: float | None
    budget: float | None
    of: str | LatencyTable
    data: Batches | None
    loss: Loss
    importance: str | Custom
    allocation: str
    floor: float
    multiple: Multiple
    responses: str
    seed: int

    def check(self) -> None:
        """Raise OptionError where the options make no sense, each alone or together."""
        if (self.target is None) == (self.budget is None):
            raise OptionError("give either target, a share of the cost, or budget, a number")
        self._check_each()
        if self.data is None and self.importance in BY_DATA:
            raise OptionError(
                f"importance={self.importance!r} needs data; or choose importance='l2'"
            )
        if self.data is None and self.responses == "borders":
            raise OptionError("responses='borders' needs data")
        if self.data is not None:
            check_batches("data", self.data, twice=True)

    def _check_each(self) -> None:
        if self.target is not None:
            number_of("target", self.target, above=0, most=1)
        if self.budget is not None:
            number_of("budget", self.budget, above=0)
        number_of("floor", self.floor, least=0, most=1)
        if not callable(self.multiple):
            count_of("multiple", self.multiple)
        if not isinstance(self.of, LatencyTable):
            check_choice("of", self.of, COSTS)
        if not callable(self.importance):
            check_choice("importance", self.importance, IMPORTANCES)
        check_choice("allocation", self.allocation, ALLOCATIONS)
        check_choice("responses", self.responses, RESPONSES)


def _scores(
    net: Net, widths: Widths, found: Responses | None, options: Options, step: Step
) -> Tensor:
    """How much each label matters."""
    importance, data = options.importance, options.data
    if not isinstance(importance, str):
        return by_layer(widths, importance(net.source))
    if importance == "random":
        generator = torch.Generator().manual_seed(options.seed)
        return torch.rand(len(widths.roots), generator=generator).to(torch.float64)
    if found is not None and data is not None and importance in BY_DATA:
        if importance == "taylor":
            return taylor(net, widths, data, options.loss, found.means, step)
        return activation(net, widths, found)
    return by_weight(net, widths, importance)


def _responses(net: Net, widths: Widths, options: Options, step: Step) -> Responses | None:
    """What channels are on data, where something depends on that."""
    data, wanted = options.data, options.responses != "none" or options.importance in BY_DATA
    return Responses(net, widths, data, step) if data is not None and wanted else None


def _meter(
    net: Net, widths: Widths, found: Responses | None, options: Options, step: Step
) -> Meter:
    """What a part costs, with what it gets for channels that it has lost."""
    of = options.of
    if not isinstance(of, str):
        meter: Meter = of
    else:
        meter = LatencyTable(step=step) if of == "latency" else METERS[of]
    if found is not None and options.responses == "borders":
        meter = with_ones(meter)
    if found is not None and of == "parameters":
        meter = with_biases(net, widths, meter)
    return meter


def _whole(widths: Widths, meter: Meter, of: str | LatencyTable, cost: Cost) -> tuple[float, float]:
    """What the network costs, and what of that is in no layer that can be cut."""
    parts = widths.cost(widths.everything(), meter)
    totals = {"macs": cost.macs, "parameters": cost.parameters}
    whole = totals.get(of, parts) if isinstance(of, str) else parts
    return max(whole, parts), max(whole - parts, 0.0)


def _report(
    widths: Widths, keep: Tensor, costs: tuple[Cost, Cost], options: Options
) -> PruningReport:
    families = tuple(
        FamilyReport(f.layers, len(f.members), int(keep[f.members].sum())) for f in widths.families
    )
    before, after = costs
    return PruningReport(
        families,
        macs_before=before.macs,
        macs_after=after.macs,
        parameters_before=before.parameters,
        parameters_after=after.parameters,
        importance=options.importance if isinstance(options.importance, str) else "custom",
        allocation=options.allocation,
        held=tuple((node.name, why) for node, why in widths.channels.holders.items()),
    )
