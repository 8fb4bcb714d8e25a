"""Tables of reports: columns as data, drawn in one way; and how numbers look in them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar

from tabulate import tabulate

CHANCE = 0.02  # at most, that one of two equal forms passes for the faster one, by a sign test
FEWEST_ROUNDS = math.ceil(-math.log2(CHANCE))  # fewer show nothing, even where all agree


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: its head.
        of: what of a row it shows: an attribute, or a function of the row. None is left empty.
        form: how that looks: as `format` takes it, or a function.
        right: whether it stands to the right, as numbers do.
        width: at which its text is broken.
    """

    title: str
    of: str | Callable[[Any], object]
    form: str | Callable[[Any], str] = ""
    right: bool = False
    width: int | None = None

    def value(self, row: object) -> object:
        """What of a row is shown."""
        return self.of(row) if callable(self.of) else getattr(row, self.of)

    def cell(self, row: object) -> str:
        """The same as text."""
        value = self.value(row)
        if value is None:
            return ""
        return self.form(value) if callable(self.form) else format(value, self.form)


def table(rows: Iterable[object], columns: Sequence[Column]) -> str:
    """Rows as text for people, "" where there are none."""
    cells = [[column.cell(row) for column in columns] for row in rows]
    if not cells:
        return ""
    return tabulate(
        cells,
        [column.title for column in columns],
        disable_numparse=True,
        colalign=["right" if column.right else "left" for column in columns],
        maxcolwidths=[column.width for column in columns],
    )


@dataclass(frozen=True)
class Record:
    """A report that holds nothing but what JSON can hold; `str()` gives it as a table."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists."""
        return asdict(self)


class Placed(Protocol):
    """A row of a table on joins, as `SiteReport` is one."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def place(self) -> str: ...
    @property
    def join(self) -> str: ...
    @property
    def index(self) -> int: ...


P = TypeVar("P", bound=Placed)


def numbered(rows: Iterable[P]) -> tuple[P, ...]:
    """The rows, in order, of which those that share a place have an index."""
    rows, seen = [*rows], Counter[str]()
    shared = Counter(row.place for row in rows if row.place)
    made = []
    for row in rows:
        seen[row.place] += 1
        made.append(replace(row, index=seen[row.place] if shared[row.place] > 1 else 0))
    return tuple(made)


def name_of(row: Placed) -> str:
    """The place of a join, with its index if it has one; that of the root is called by its node."""
    name = row.place or row.join
    return f"{name} #{row.index}" if row.index else name


def short(n: int) -> str:
    """A number for people.

    >>> short(2_300_000)
    '2.3 M'
    """
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return str(n)


def change(before: int | None, after: int | None) -> str | None:
    """What becomes of a number, None where it is not known."""
    return None if before is None or after is None else f"{short(before)} -> {short(after)}"


def spread(quartiles: tuple[float, float, float]) -> str:
    """A median with its lower and upper quartile."""
    median, low, high = quartiles
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def told_ratio(
    quartiles: tuple[float, float, float], *, is_noise: bool, rounds: int | None = None
) -> str:
    """A ratio of times with its quartiles, and whether it may be one of two equal times.

    Args:
        quartiles: the median, the lower and the upper one.
        is_noise: whether it may.
        rounds: of the sign test which says so; None where that is not known.
    """
    if not is_noise:
        return spread(quartiles)
    if rounds is not None and rounds < FEWEST_ROUNDS:
        return f"{spread(quartiles)}, too few rounds to tell (it takes {FEWEST_ROUNDS})"
    return f"{spread(quartiles)}, not beyond the noise"


def milliseconds(seconds: tuple[float, float, float]) -> str:
    """A median time with its quartiles, in three digits or more."""
    median, low, high = (f"{1e3 * t:.3g}" if t < 0.1 else f"{1e3 * t:.0f}" for t in seconds)
    return f"{median} ({low} to {high})"
