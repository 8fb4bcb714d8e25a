"""Two forms timed in turn, and what may be said of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rmfx.table import milliseconds, told_ratio

from .speed import Quartiles, are_too_few, is_noise, quartiles, ratio_of, time_after


@dataclass(frozen=True)
class Paired:
    """Seconds of a call of two forms, one number for each round: at least one."""

    before: tuple[float, ...]
    after: tuple[float, ...]

    @property
    def told_before(self) -> str:
        """The time before, in milliseconds."""
        return milliseconds(quartiles(self.before))

    @property
    def told_after(self) -> str:
        """The time after, in milliseconds, as the ratio gives it."""
        return milliseconds(time_after(self.before, self.after))

    @property
    def told_ratio(self) -> str:
        """After over before, and whether that is noise, or of too few rounds to tell."""
        return told_ratio(
            ratio_of(self.before, self.after), is_noise=self.is_noise, rounds=len(self.before)
        )

    @property
    def is_noise(self) -> bool:
        """Whether the rounds do not show which form is faster."""
        return is_noise(self.before, self.after)

    @property
    def doubt(self) -> str:
        """Why the ratio shows no difference, in a word or two; "" where it shows one."""
        if are_too_few(self.before):
            return "too few rounds"
        return "noise" if self.is_noise else ""

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Medians and quartiles of the times and of the ratio, and whether that is beyond noise."""
        times = quartiles(self.before), time_after(self.before, self.after)
        before, after, ratio = map(_named, (*times, ratio_of(self.before, self.after)))
        ratio["beyond_noise"] = not self.is_noise
        return {"before": before, "after": after, "ratio": ratio}


def _named(found: Quartiles) -> dict[str, Any]:
    return dict(zip(("median", "low", "high"), found, strict=True))
