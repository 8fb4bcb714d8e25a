"""How long networks take in one runtime, timed in turn, and the ratio of their times."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rmfx.errors import RmfxError, install_command
from rmfx.options import is_number, is_whole
from rmfx.table import CHANCE, FEWEST_ROUNDS

from .runtimes import RUNTIMES, Form, Run, RuntimeFailure, as_failure, times_of, torch_threads

MOST_THREADS = 1024  # with many more of them torch ends the process
Quartiles = tuple[float, float, float]  # the median, the lower and the upper one


class LatencyError(RmfxError):
    """Nothing can be measured as asked."""


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        runtimes: some of `RUNTIMES`.
        batches: sizes of batches.
        threads: for one inference.
        rounds: how often each form is measured.
        seconds: how long each measurement takes at least; what it gives is the median of its calls.
        tolerance: the largest relative error a runtime may make, by default 1e-4.
        activation: as in `rmfx.remove_residuals`.

    Raises:
        LatencyError: a value is out of range, or a runtime is not known.
    """

    runtimes: tuple[str, ...] = ("eager", "inductor", "onnxruntime", "openvino")
    batches: tuple[int, ...] = (1, 8)
    threads: int = field(default_factory=torch.get_num_threads)
    rounds: int = 20
    seconds: float = 0.1
    tolerance: float | None = None
    activation: str | Collection[str] = "auto"

    def times(self, runs: Sequence[Run]) -> list[tuple[float, ...]]:
        """Seconds of a call of each function, one number for each round."""
        return times_of(runs, threads=self.threads, rounds=self.rounds, seconds=self.seconds)

    def __post_init__(self) -> None:
        _check_runtimes(self.runtimes)
        counts = (*self.batches, self.threads, self.rounds)
        if not self.batches or not all(is_whole(n) and n >= 1 for n in counts):
            raise LatencyError("batches, threads and rounds must be whole numbers, at least 1")
        if self.threads > MOST_THREADS:
            raise LatencyError(f"threads={self.threads} must be at most {MOST_THREADS}")
        if not is_number(self.seconds) or not 0 <= self.seconds < math.inf:
            raise LatencyError(f"seconds={self.seconds!r} must be a number, at least 0")
        tolerance = 0 if self.tolerance is None else self.tolerance
        if not is_number(tolerance) or not 0 <= tolerance < math.inf:
            raise LatencyError(f"tolerance={tolerance!r} must be a number, at least 0")


def _check_runtimes(names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in RUNTIMES]
    if unknown or not names:
        raise LatencyError(
            f"no runtime {', '.join(unknown) or 'is named'}; known are {', '.join(RUNTIMES)}"
        )


def installed(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those of some runtimes that are installed, and of each other one what to install.

    Raises:
        LatencyError: none is installed.
    """
    missing = {name: advice(RUNTIMES[name].missing) for name in names if RUNTIMES[name].missing}
    left = [name for name in names if name not in missing]
    if not left:
        raise LatencyError(f"no runtime is left to measure in: {'; '.join(missing.values())}")
    return left, [f"{name} left out: {told}" for name, told in missing.items()]


@torch.no_grad()
def compare_speed(
    forms: Sequence[nn.Module],
    inputs: tuple[Tensor, ...],
    runtime: str,
    settings: Settings,
    step: Callable[[str], object] = lambda _: None,
) -> list[tuple[float, ...]]:
    """Seconds of a call of each form of a network in one runtime, a number for each round.

    Args:
        forms: graphs with the same inputs and outputs.
        inputs: what they are run on.
        runtime: one of `RUNTIMES`.
        settings: threads, rounds and seconds count.
        step: called with a few words before each form is prepared, and before they are timed.

    Raises:
        LatencyError: the runtime is not installed or fails.
    """
    _check_runtimes((runtime,))
    kind = RUNTIMES[runtime]
    if kind.missing:
        raise LatencyError(f"{runtime} cannot be measured: {advice(kind.missing)}")
    try:
        with torch_threads(settings.threads), as_failure(), kind.scope():
            runs = []
            for number, gm in enumerate(forms):
                step(f"prepare {number + 1} of {len(forms)} for {runtime}")
                runs.append(kind.prepare(Form(gm, inputs), settings.threads))
                runs[-1]()
            step(f"time {len(forms)} networks in {runtime}")
            return settings.times(runs)
    except RuntimeFailure as failure:
        raise LatencyError(f"{runtime}: {failure}") from failure


def ratios_of(before: Sequence[float], after: Sequence[float]) -> tuple[float, ...]:
    """after/before for each round."""
    return tuple(b / a for a, b in zip(before, after, strict=True))


def quartiles(values: Sequence[float]) -> Quartiles:
    """The median, the lower and the upper quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, low, high


def ratio_of(before: Sequence[float], after: Sequence[float]) -> Quartiles:
    """after/before: median, lower and upper quartile of the ratios of single rounds."""
    return quartiles(ratios_of(before, after))


def time_after(before: Sequence[float], after: Sequence[float]) -> Quartiles:
    """How long the form after takes where the one before takes its median: that times the ratio.

    The median of its own rounds may say the opposite of the ratio: a slower spell of the machine
    that meets half of all rounds moves either median to another round, and no ratio.
    """
    middle = statistics.median(before)
    median, low, high = ratio_of(before, after)
    return middle * median, middle * low, middle * high


def is_faster(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether the form after is faster beyond the noise, by the sign test on the rounds.

    Fewer than `FEWEST_ROUNDS` show nothing, even where all agree.
    """
    total, wins = len(before), sum(b < a for a, b in zip(before, after, strict=True))
    chance: float = sum(math.comb(total, k) for k in range(wins, total + 1)) / 2**total
    return chance <= CHANCE


def are_too_few(rounds: Sequence[float]) -> bool:
    """Whether rounds are so few that no sign test could tell two forms apart."""
    return len(rounds) < FEWEST_ROUNDS


def is_noise(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether neither of two forms is faster beyond the noise."""
    return not is_faster(before, after) and not is_faster(after, before)


def advice(absent: Sequence[str]) -> str:
    """What to install."""
    return f"{', '.join(absent)} not installed ({install_command(absent)})"
