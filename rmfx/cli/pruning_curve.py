"""A network pruned to several sizes, and what is left of it on some data: for people to look at."""

from __future__ import annotations

import contextlib
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from rmfx.data.batches import Batches, loss_on, output_on
from rmfx.errors import OptionError
from rmfx.files.figures import check_plotting, write_figure
from rmfx.files.saving import as_function
from rmfx.passes.pruning import PruningReport, prune_channels
from rmfx.table import Column, short, table


@dataclass(frozen=True)
class Point:
    """One size.

    Attributes:
        target: share of the cost that was asked for; 1 is the network as it was.
        macs: multiply-adds.
        parameters: of linear layers and of what goes with channels.
        loss: mean over the batches; None without data.
        accuracy: share of largest outputs that are the target's; None without classes.
    """

    target: float
    macs: int
    parameters: int
    loss: float | None
    accuracy: float | None


@dataclass(frozen=True)
class PruningCurve:
    """Sizes and what they are worth, before any training. `str()` gives a table.

    Attributes:
        points: the network as it was, then smaller and smaller.
        networks: the pruned ones, in the order of `points` after the first.
        reports: of `prune_channels`, one for each of them.
    """

    points: tuple[Point, ...]
    networks: tuple[fx.GraphModule, ...]
    reports: tuple[PruningReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists."""
        return {
            "points": [asdict(point) for point in self.points],
            "reports": [report.to_dict() for report in self.reports],
        }

    def __str__(self) -> str:
        last = f"Filters at a target of {self.points[-1].target:g}:\n" if self.reports[1:] else ""
        return f"{last}{self.reports[-1]}\n\n{table(self.points, _COLUMNS)}"


_ADVICE = re.compile(
    "lower the floor( or the multiple, protect fewer layers, or ask for less)?"
)  # what `prune_channels` says; the command has no floor
_COLUMNS = (
    Column("target", "target", ".2f", right=True),
    Column("multiply-adds", "macs", short, right=True),
    Column("parameters", "parameters", short, right=True),
    Column("loss", "loss", ".4f", right=True),
    Column("accuracy", "accuracy", ".2%", right=True),
)


def pruning_curve(
    model: nn.Module | ExportedProgram,
    example_inputs: tuple[Tensor, ...],
    targets: Iterable[float],
    *,
    data: Batches | None,
    loss: Callable[[Any, Any], Tensor],
    step: Callable[[str], object] = lambda text: None,
    **options: Any,
) -> PruningCurve:
    """Prune a network to several sizes, each from the whole one, and look what is left.

    Args:
        model: in eval mode; it is not changed.
        example_inputs: what it takes.
        targets: shares of the cost.
        data: batches of (inputs, targets), on which importance, loss and accuracy are measured.
        loss: called with the model's output and the targets.
        step: called with a few words before each size.
        options: the other options of `prune_channels`.

    Raises:
        RmfxError: as `prune_channels`.
    """
    networks, reports = [], []
    wanted = sorted(targets, reverse=True)
    for target in wanted:
        step(f"prune to {target:.2f}")
        with _told_for_the_command(options):
            small, report = prune_channels(
                model, example_inputs, target=target, data=data, loss=loss, **options
            )
        networks.append(small)
        reports.append(report)
    step("compare")
    whole = _point(1.0, as_function(model), reports[0], data, loss, before=True)
    rest = [
        _point(target, small, report, data, loss)
        for target, small, report in zip(wanted, networks, reports, strict=True)
    ]
    return PruningCurve((whole, *rest), tuple(networks), tuple(reports))


@contextlib.contextmanager
def _told_for_the_command(options: Mapping[str, Any]) -> Iterator[None]:
    """Lets errors advise options that the command has, in place of those of the function."""
    try:
        yield
    except OptionError as error:
        ways = ["a larger --target"]
        ways += ["a smaller --multiple"] if options.get("multiple", 1) != 1 else []
        ways += ["fewer layers to --protect"] if options.get("protect") else []
        raise OptionError(_ADVICE.sub(f"give {' or '.join(ways)}", str(error))) from error


def _point(
    target: float,
    network: Callable[..., Any],
    report: PruningReport,
    data: Batches | None,
    loss: Callable[[Any, Any], Tensor],
    *,
    before: bool = False,
) -> Point:
    macs = report.macs_before if before else report.macs_after
    size = report.parameters_before if before else report.parameters_after
    if data is None:
        return Point(target, macs, size, None, None)
    losses, hits = [], []
    with torch.no_grad():
        for inputs, wanted in data:
            output = output_on(network, inputs)
            losses.append(float(loss_on(loss, output, wanted)))
            if _are_classes(output, wanted):
                hits.append((output.argmax(1) == wanted).float())
    accuracy = float(torch.cat(hits).mean()) if hits else None
    return Point(target, macs, size, statistics.fmean(losses), accuracy)


def _are_classes(output: Any, target: Any) -> bool:
    tensors = isinstance(output, Tensor) and isinstance(target, Tensor)
    return tensors and output.dim() == 2 and target.dtype == torch.int64 and target.dim() == 1


def plot(curve: PruningCurve, path: Path, title: str) -> None:
    """Draws accuracy, or loss where there are no classes, against multiply-adds.

    Args:
        curve: with data.
        path: a file to write; its suffix, .svg or .png, is the format.
        title: of the figure.

    Raises:
        PlotError: matplotlib is not installed.
    """
    check_plotting()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.subplots()
    share = [point.macs / curve.points[0].macs for point in curve.points]
    heights, label = _heights(curve.points)
    axes.plot(share, heights, marker="o")
    axes.set_xlabel("multiply-adds, pruned / whole")
    axes.set_ylabel(label)
    axes.set_title(title)
    axes.set_xlim(0, 1.05)
    axes.grid(visible=True, alpha=0.3)
    write_figure(figure, path, path.suffix[1:])


def _heights(points: Sequence[Point]) -> tuple[list[float], str]:
    if all(point.accuracy is not None for point in points):
        return [100 * (point.accuracy or 0.0) for point in points], "accuracy in %, not trained on"
    return [point.loss or 0.0 for point in points], "loss, not trained on"
