"""What comparing a result with its original has shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class JoinError:
    """How far the value at one join is from its counterpart.

    Attributes:
        place: the module path of the join.
        error: max |before - after| / max |before|; as `rmfx.verify` has it, over the largest
            operand if that is more.
        sensitivity: the error that dropping the smaller operand of the join would have given. An
            error far below it shows that the join is there; a sensitivity near the tolerance shows
            nothing.
    """

    place: str
    error: float
    sensitivity: float


@dataclass(frozen=True)
class Verification:
    """A comparison of a result with its original, on random inputs.

    Attributes:
        shapes: of the inputs, for each time that both were run.
        error: the largest error of an output or a join, relative to the largest output or operand.
        limit: the error that would have been too large.
        magnified: the largest error where the original makes more than the limit of one rounding.
        joins: one entry for each join that was compared, with the largest error and sensitivity.
        reason: why nothing was compared, "" if something was.
    """

    shapes: tuple[tuple[tuple[int, ...], ...], ...] = ()
    error: float = 0.0
    limit: float = 0.0
    joins: tuple[JoinError, ...] = ()
    reason: str = ""
    magnified: float = 0.0

    @property
    def unseen(self) -> tuple[str, ...]:
        """Places of joins where a dropped skip would have stayed below the limit."""
        weak = (join.place or "the top level" for join in self.joins if self._misses(join))
        return tuple(dict.fromkeys(weak))

    def _misses(self, join: JoinError) -> bool:
        return join.sensitivity <= self.limit

    def __str__(self) -> str:
        if self.reason:
            return f"not verified: {self.reason}"
        sizes = ", ".join(dict.fromkeys(map(shape_text, self.shapes)))
        text = (
            f"verified on random inputs of {sizes}: outputs and {_counted(len(self.joins))} differ"
            f" by {self.error:.1e} at most (relative; up to {self.limit:.1e} is rounding)"
        )
        if self.magnified:
            text += f", by {self.magnified:.1e} where the original magnifies rounding as much"
        if self.unseen:
            text += f"; a dropped skip would not have been seen at {', '.join(self.unseen)}"
        return text


def _counted(joins: int) -> str:
    return f"{joins} join{'' if joins == 1 else 's'} that can be compared"


def shape_text(shapes: Sequence[Sequence[int]]) -> str:
    """Shapes of inputs for people: 2x3x8x8 and 2x10."""
    return " and ".join("x".join(map(str, shape)) or "one number" for shape in shapes)
