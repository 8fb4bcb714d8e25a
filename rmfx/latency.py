"""How long a network takes before and after the conversion, in several runtimes.

The form before is the original with its batch norm folded, as any deployment would fold it, so that
what is compared is the removal alone. Each runtime first has to give the original's numbers with
both forms; then both are timed in turn, in one process: every round measures each form once with
`torch.utils.benchmark`, in the opposite order of the round before. A slower spell of the machine
meets both forms of a round, so the ratio of each round is taken first, and the median of those.
Where the rounds do not agree on which form is faster (a sign test), the table says so; and it gives
the converted form's time as the original's times the ratio, which no other median contradicts.

All of it in float32, which OpenVINO has to be told: where the CPU knows bfloat16 it would use that.

Several threads on a machine that has other work to do: torch's threads spin while they wait for
each other, and one of them that is not running stops all. `OMP_WAIT_POLICY=passive` in the
environment lets them sleep instead; it must be there before torch is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from rmfx.conversion import Conversion, convert
from rmfx.files.figures import check_plotting, write_figure
from rmfx.files.saving import as_function
from rmfx.files.trials import Trials, default_tolerance, relative_error
from rmfx.table import FEWEST_ROUNDS, Column, table
from rmfx.timing.machine import machine_of
from rmfx.timing.paired import Paired
from rmfx.timing.runtimes import RUNTIMES, Form, RuntimeFailure, as_failure, torch_threads
from rmfx.timing.speed import LatencyError, Settings, installed, ratio_of, ratios_of


@dataclass(frozen=True)
class Network:
    """What to measure.

    Attributes:
        name: how tables call it.
        model: in eval mode, float32.
        inputs: example inputs, batch first; the size of the batch is replaced.
    """

    name: str
    model: nn.Module | ExportedProgram
    inputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Latency:
    """One network in one runtime at one batch size.

    Attributes:
        network, runtime, batch: what was measured.
        macs: multiply-adds of the converted form over those of the original, None if unknown.
        error: the larger relative error of both forms in this runtime, against the original in
            eager mode; None where the runtime gave no output.
        original, converted: seconds of a call, one number for each round; empty after a failure.
        failure: why there are no times, "" if there are.
    """

    network: str
    runtime: str
    batch: int
    macs: float | None = None
    error: float | None = None
    original: tuple[float, ...] = ()
    converted: tuple[float, ...] = ()
    failure: str = ""

    @property
    def ratios(self) -> tuple[float, ...]:
        """Time of the converted form over that of the original, for each round."""
        return ratios_of(self.original, self.converted)

    @property
    def ratio(self) -> tuple[float, float, float]:
        """The median of the ratios, and their lower and upper quartile."""
        return ratio_of(self.original, self.converted)

    @property
    def paired(self) -> Paired:
        """Both times, for people."""
        return Paired(self.original, self.converted)

    def to_dict(self) -> dict[str, Any]:
        """The attributes, and where there are times their summary under "ratio"."""
        made = asdict(self)
        if not self.failure:
            made["ratio"] = self.paired.to_dict()["ratio"]
        return made

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Latency:
        """Reads what `to_dict` gives, also after a detour through JSON."""
        known = {k: v for k, v in values.items() if k != "ratio"}
        times = {name: tuple(known[name]) for name in ("original", "converted")}
        return Latency(**(known | times))


@dataclass(frozen=True)
class LatencyReport:
    """All measurements. `str()` is a table with what must be known to read it, `to_dict` for JSON.

    Attributes:
        rows: in the order of networks, batches, runtimes.
        notes: what was left out, and residual connections that are still there.
        machine: threads, rounds, CPU, precision and versions, as text by name.
    """

    rows: tuple[Latency, ...]
    notes: tuple[str, ...]
    machine: Mapping[str, str]

    @property
    def failures(self) -> tuple[Latency, ...]:
        return tuple(row for row in self.rows if row.failure)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists; times in seconds."""
        rows = [row.to_dict() for row in self.rows]
        return {"rows": rows, "notes": list(self.notes), "machine": dict(self.machine)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> LatencyReport:
        """Reads what `to_dict` gives, also after a detour through JSON."""
        rows = tuple(Latency.from_dict(row) for row in values["rows"])
        return LatencyReport(rows, tuple(values["notes"]), dict(values["machine"]))

    def __str__(self) -> str:
        machine = "; ".join(f"{name} {value}" for name, value in self.machine.items())
        text = table(self.rows, _COLUMNS)
        return "\n".join([text, "", *self.notes, f"{_EXPLANATION}\n{machine}."])


_EXPLANATION = f"""\
Times and ratios: median (quartiles) over all rounds. The ratio is that of single rounds, and the
converted form's time is the original's times the ratio. Noise: by a sign test on the
rounds, which takes {FEWEST_ROUNDS} of them.
Multiply-adds are converted/original. The error is the larger one of both forms, relative, against
the original in eager mode."""


def _ratio(row: Latency) -> str:
    return f"failed: {row.failure}" if row.failure else row.paired.told_ratio


_COLUMNS = (
    Column("network", "network"),
    Column("batch", "batch", right=True),
    Column("runtime", "runtime"),
    Column("original, ms", lambda row: None if row.failure else row.paired.told_before),
    Column("converted, ms", lambda row: None if row.failure else row.paired.told_after),
    Column("converted/original (quartiles)", _ratio),
    Column("multiply-adds", "macs", ".2f", right=True),
    Column("error", "error", ".0e"),
)


def measure_latency(
    networks: Iterable[Network],
    settings: Settings | None = None,
    step: Callable[[str], object] = lambda _: None,
) -> LatencyReport:
    """Measures every network in every runtime at every batch size.

    A runtime that is not installed is left out with a note. One that fails, or whose output is not
    the original's, gets a row that says so, and the others go on.

    Args:
        networks: what to measure.
        settings: how, by default on torch's number of threads.
        step: called with a few words before each measurement.

    Raises:
        LatencyError: none of the runtimes is installed, or a network is not in float32.

    Example:
        >>> from rmfx.demo import load_digits, load_model
        >>> settings = Settings(runtimes=("eager",), batches=(1,), rounds=2, seconds=0.001)
        >>> network = Network("digits", load_model(), (load_digits()[0][:1],))
        >>> (row,) = measure_latency([network], settings).rows
        >>> row.ratio[0] > 0, row.error < 1e-4
        (True, True)
    """
    settings = settings or Settings()
    present, notes = installed(settings.runtimes)
    rows: list[Latency] = []
    with torch_threads(settings.threads):
        for network in networks:
            _check(network)
            for batch in settings.batches:
                pair = _Pair(network, batch, settings)
                for runtime in present:
                    step(f"{network.name}, batch {batch}, {runtime}")
                    rows.append(pair.measure(runtime))
                notes += pair.notes
    unique = tuple(dict.fromkeys(notes))  # the same note comes with every batch
    return LatencyReport(tuple(rows), unique, machine_of(settings, present))


class _Pair:
    """A network and its converted form at one batch size."""

    def __init__(self, network: Network, batch: int, settings: Settings) -> None:
        self.network, self.batch, self.settings = network, batch, settings
        tolerance = settings.tolerance
        self.tolerance = default_tolerance(network.inputs) if tolerance is None else tolerance

    @cached_property
    def trial(self) -> tuple[list[Tensor], object]:
        """Inputs, and what the network as given computes of them."""
        return Trials(self.network.inputs).run(as_function(self.network.model), self.batch)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(self.trial[0])

    @cached_property
    def conversion(self) -> Conversion:
        # For each batch size anew: what only torch.export can trace runs at one size only.
        ways = self.settings.activation
        seen = [self.inputs] if "shift" in ways else None
        return convert(self.network.model, self.inputs, activation=ways, calibration=seen)

    @cached_property
    def forms(self) -> tuple[Form, Form]:
        conversion = self.conversion
        return Form(conversion.before, self.inputs), Form(conversion.after, self.inputs)

    @property
    def notes(self) -> list[str]:
        if "conversion" not in vars(self) or not self.conversion.report.refused:
            return []
        left = " and ".join(self.conversion.report.counted("refused").values())
        return [f"{self.network.name}: {left} are still there, `rmfx report` says why"]

    @property
    def macs(self) -> float | None:
        before, after = self.conversion.cost_before, self.conversion.cost_after
        return after.macs / before.macs if before and after and before.macs else None

    @torch.no_grad()
    def measure(self, runtime: str) -> Latency:
        """The row of one runtime, which holds the reason where it does not work."""
        row: dict[str, Any] = {
            "network": self.network.name,
            "runtime": runtime,
            "batch": self.batch,
        }
        try:
            with as_failure(), RUNTIMES[runtime].scope():
                row["macs"] = self.macs
                runs = [RUNTIMES[runtime].prepare(x, self.settings.threads) for x in self.forms]
                errors = [relative_error(self.trial[1], _tensors(run())) for run in runs]
                row["error"] = max(errors)
                self._verify(*errors)
                times = self.settings.times(runs)
        except RuntimeFailure as failure:
            return Latency(**row, failure=str(failure))
        original, converted = times
        return Latency(**row, original=original, converted=converted)

    def _verify(self, before: float, after: float) -> None:
        for form, error in (("original", before), ("converted", after)):
            if not error <= self.tolerance:
                raise RuntimeFailure(
                    f"the {form} network gives wrong numbers here: relative error {error:.1e},"
                    f" at most {self.tolerance:.0e} is accepted"
                )


def _tensors(output: object) -> list[Tensor]:
    """All tensors and arrays of an output, in order, as tensors of their own."""
    return [
        leaf if isinstance(leaf, Tensor) else torch.tensor(leaf)
        for leaf in pytree.tree_leaves(output)
    ]


def _check(network: Network) -> None:
    kinds = {x.dtype for x in network.inputs if x.is_floating_point()} - {torch.float32}
    if kinds:
        found = ", ".join(str(kind) for kind in kinds)
        raise LatencyError(
            f"{network.name} takes {found}; the runtimes can be compared in float32 only"
        )


def plot(report: LatencyReport, path: Path) -> None:
    """Draws the ratios: bars with their quartiles, a group for each runtime, a line at 1.

    Args:
        report: measurements; failed ones leave a gap.
        path: a file to write; its suffix, one of `PLOT_SUFFIXES`, is the format.

    Raises:
        PlotError: matplotlib is not installed.
    """
    check_plotting()
    from matplotlib.figure import Figure

    runtimes = list(dict.fromkeys(row.runtime for row in report.rows))
    series = list(dict.fromkeys((row.network, row.batch) for row in report.rows))
    found = {(row.network, row.batch, row.runtime): row for row in report.rows if not row.failure}
    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(len(series), 1)
    for i, (network, batch) in enumerate(series):
        places = [g for g, runtime in enumerate(runtimes) if (network, batch, runtime) in found]
        ratios = [found[network, batch, runtimes[g]].ratio for g in places]
        offset = (i - (len(series) - 1) / 2) * width
        bars = axes.bar(
            [g + offset for g in places],
            [median for median, _, _ in ratios],
            0.9 * width,
            yerr=[[m - low for m, low, _ in ratios], [high - m for m, _, high in ratios]],
            capsize=3,
            label=f"{network}, batch {batch}",
        )
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set_xticks(range(len(runtimes)), runtimes)
    axes.set_ylabel("time, converted / original")
    axes.set_xlabel(_caption(report), fontsize=8)
    axes.set_title("Latency without residual connections (median and quartiles)")
    axes.margins(y=0.12)
    figure.legend(fontsize=8, loc="outside lower center", ncols=min(len(series), 4) or 1)
    write_figure(figure, path, path.suffix[1:])


def _caption(report: LatencyReport) -> str:
    machine = dict(report.machine)
    versions = [f"{name} {machine[name]}" for name in ("torch", *RUNTIMES) if name in machine]
    first = f"{machine.get('threads', '?')} threads, {machine.get('CPU', 'unknown CPU')}"
    return f"{first}\n{', '.join(versions)}"
