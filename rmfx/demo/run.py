"""What `rmfx demo` does: converts the trained network, compares and times both forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rmfx.conversion import Conversion, convert
from rmfx.table import Column, table
from rmfx.timing.paired import Paired
from rmfx.timing.speed import LatencyError, Settings, compare_speed

from . import load_digits, load_model

BATCH = 32
_SETTINGS = Settings(("eager", "inductor"), threads=1, rounds=15, seconds=0.05)
_TITLE = "A small residual network that reads handwritten digits, before and after the conversion."
_ADVICE = """\
Conversion alone does not make a CPU faster: in place of the skips, layers carry extra channels.
It pays through what a plain network allows (pruning any filter, merging linear branches) and on
hardware that cannot hold a skip."""


@dataclass(frozen=True)
class Speed:
    """Seconds per batch of both forms in one runtime, round by round, or a note why there are none.

    One thread is used, since a busy machine delays several threads far more than one.
    """

    runtime: str
    before: tuple[float, ...] = ()
    after: tuple[float, ...] = ()
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Medians and quartiles instead of rounds; that after is that before times the ratio."""
        made: dict[str, Any] = {"runtime": self.runtime, "note": self.note}
        return made if self.note else made | self.paired.to_dict()

    @property
    def paired(self) -> Paired:
        """Both times, for people."""
        return Paired(self.before, self.after)


@dataclass(frozen=True)
class DemoResult:
    """All that `rmfx demo` reports; `str()` gives it as text, `to_dict` for JSON.

    Attributes:
        digits: number of test digits.
        right_before, right_after: how many of them each form names rightly.
        changed: how many digits the two forms name differently.
        largest_difference: between the logits of both, over all digits.
        largest_logit: magnitude of the largest logit, to compare it with.
        conversion: both networks, the report and the costs (for one digit).
        speeds: on one thread, one row for each way of running.
    """

    digits: int
    right_before: int
    right_after: int
    changed: int
    largest_difference: float
    largest_logit: float
    conversion: Conversion
    speeds: tuple[Speed, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings; times in seconds for a batch of 32."""
        made = {name: getattr(self, name) for name in self.__dataclass_fields__}
        del made["conversion"]
        speeds = [speed.to_dict() for speed in self.speeds]
        return made | self.conversion.to_dict() | {"speeds": speeds, "batch": BATCH}

    def __str__(self) -> str:
        before, after = self.right_before / self.digits, self.right_after / self.digits
        relative = self.largest_difference / self.largest_logit
        parts = [
            _TITLE,
            f"Accuracy on {self.digits} digits it never saw: {before:.1%} before,"
            f" {after:.1%} after; {self.changed} answers differ.\n"
            f"Largest difference of any output: {self.largest_difference:.1e}"
            f" ({relative:.1e} of the largest output).",
            str(self.conversion),
            f"Milliseconds for {BATCH} digits on one thread, median (quartiles); after is before"
            " times the ratio, which is that of single rounds:",
            self._speed_table(),
            _ADVICE,
        ]
        return "\n\n".join(parts)

    def _speed_table(self) -> str:
        timed = [speed for speed in self.speeds if not speed.note]
        notes = [f"Not timed: {speed.note}" for speed in self.speeds if speed.note]
        return "\n".join([table(timed, _COLUMNS), *notes])


def run_demo(step: Callable[[str], object] = lambda _: None) -> DemoResult:
    """Converts the demo's network, compares both forms on every digit, measures their speed.

    Args:
        step: called with a word or two at the start of each of the four steps.
    """
    step("convert")
    model, (images, labels) = load_model(), load_digits()
    conversion = convert(model, images[:1])
    step("classify")
    with torch.no_grad():
        expected, found = model(images), conversion.after(images)
        answers, new_answers = expected.argmax(1), found.argmax(1)
        speeds = _measure_speeds(conversion, images[:BATCH], step)
    return DemoResult(
        digits=len(labels),
        right_before=int((answers == labels).sum()),
        right_after=int((new_answers == labels).sum()),
        changed=int((answers != new_answers).sum()),
        largest_difference=float((expected - found).abs().max()),
        largest_logit=float(expected.abs().max()),
        conversion=conversion,
        speeds=speeds,
    )


def _measure_speeds(
    conversion: Conversion, images: Tensor, step: Callable[[str], object]
) -> tuple[Speed, ...]:
    speeds = []
    for runtime in _SETTINGS.runtimes:
        step(f"time {runtime}")
        forms = (conversion.before, conversion.after)
        try:
            before, after = compare_speed(forms, (images,), runtime, _SETTINGS)
        except LatencyError as error:  # inductor, where it finds no working C++ compiler
            speeds.append(Speed(runtime, note=str(error)))
        else:
            speeds.append(Speed(runtime, before, after))
    return tuple(speeds)


_COLUMNS = (
    Column("", "runtime"),
    Column("before", lambda speed: speed.paired.told_before),
    Column("after", lambda speed: speed.paired.told_after),
    Column("after/before", lambda speed: speed.paired.told_ratio),
)
