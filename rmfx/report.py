"""What a pass did: one row per residual site.

`rmfx.report(gm)` reads the report that `remove_residuals` leaves in `gm.meta`. Its text is a table;
`to_dict()` is ready for JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rmfx.errors import RmfxError

from .table import Column, change, name_of, table, told_ratio
from .verified import Verification
from .words import FORMS, KINDS, SKIP, WAYS

if TYPE_CHECKING:
    from torch import fx

META_KEY = "rmfx_report"
REWRITES_KEY = "rmfx_rewrites"  # what rules have done so far, while a verb is at work
MODIFIED_KEY = "rmfx_modified"
HELD_KEY = "rmfx_held"  # what was read of layers that compute their weights
DEAR = 8.0  # times the multiply-adds, above which a report says so in words


@dataclass(frozen=True)
class SiteReport:
    """One join of two tensors.

    Attributes:
        place: path of the module whose code adds, "" for the root.
        index: which of several joins of that place it is, from 1 on; 0 where it is the only one.
        source: "file.py:12", where known.
        join: name of the add in `rmfx.trace(model, example_inputs)`.
        node: name of the node of the result that holds the join's value, None if none does.
        status: "removed", "refused", "kept" where only the policy was against it, or "other" for an
            addition that is no residual connection: of different inputs, of what depends on sizes
            alone, of another scale, or for a gate.
        kind: "residual connection" where one of both values comes from where they part without
            passing an activation, or that cannot be read; "parallel branches" where both do, or
            neither; "" for another addition.
        reason: why it stays, "" if it was removed.
        strategy: how the carry passes the activations: the least simple of "identity", "scale",
            "per-channel", "odd-pair", "shift", "double-relu" and "masked" in use; "linear" where
            there is none.
        exactness: "bit-exact" where the carried values arrive bit for bit; "normal numbers" where
            they do if they are 0 or at least `gain` times the smallest normal number of the type
            (of smaller ones some digits or all are lost); "rounding"; or "calibrated range" where
            they do so only within the range of the calibration data, widened by its own width on
            both sides.
        gain: the largest factor, up or down, by which a carry is multiplied on the way, or its
            offset over its own size; None where nothing was rewritten. The 4 by which
            "double-relu" multiplies the branch is not counted.
        bits: how many of the type's bits its sums cost a carry, beside one rounding or a few.
        layout: which of several exact arrangements it is, some of `LAYOUTS` among its words.
        alternative: the next best one, and what it would cost; "" where there is none.
        shape: of the join's value, where known.
        carry: carried channels.
        macs_before, macs_after: multiply-adds of the site, where shapes are known.
        moved_before, moved_after: values read and written between its layers, where known.
        params_before, params_after: parameters of the site.
    """

    place: str
    source: str | None
    join: str
    node: str | None
    status: str
    reason: str = ""
    strategy: str = ""
    exactness: str = ""
    gain: float | None = None
    bits: float = 0.0
    layout: str = ""
    alternative: str = ""
    shape: tuple[int | None, ...] | None = None
    carry: int = 0
    macs_before: int | None = None
    macs_after: int | None = None
    moved_before: int | None = None
    moved_after: int | None = None
    params_before: int | None = None
    params_after: int | None = None
    kind: str = ""
    index: int = 0

    @property
    def name(self) -> str:
        """The place as tables call it, with the index where others share it."""
        return name_of(self)

    @property
    def done(self) -> str:
        """The status as tables tell it, by which branches are merged."""
        is_done = self.status == "removed" and self.kind in KINDS
        return KINDS[self.kind][1] if is_done else self.status


@dataclass(frozen=True)
class HeldReport:
    """A layer of which the result holds something else than the model does.

    Attributes:
        place: its path in the model.
        what: a computed weight, of which the result has the value of the moment; or one layer for
            several calls, of which the result has a copy for each that was rewritten.
    """

    place: str
    what: str

    def __str__(self) -> str:
        return f"{self.place}: {self.what}"


@dataclass(frozen=True)
class Timing:
    """How long one form of a network takes, over the original with its batch norm folded.

    Attributes:
        form: what was done to it, one of `FORMS`; the original itself is "folded".
        runtime: where it was measured.
        ratio, low, high: median and quartiles of the ratios of single rounds.
        beyond_noise: whether it is faster or slower, by the sign test on the rounds.
        chosen: whether it is what was returned.
        rounds: how many there were; None where that was not written down.
    """

    form: str
    runtime: str
    ratio: float
    low: float
    high: float
    beyond_noise: bool = True
    chosen: bool = False
    rounds: int | None = None

    @property
    def told(self) -> str:
        """The ratio, with its spread and whether it is noise; that of the original is 1."""
        if self.form == "folded":
            return "1"
        ratio = (self.ratio, self.low, self.high)
        return told_ratio(ratio, is_noise=not self.beyond_noise, rounds=self.rounds)

    def __str__(self) -> str:
        text = f"{FORMS[self.form]}: {self.told}"
        return f"{text}, returned" if self.chosen else text


@dataclass(frozen=True)
class Report:
    """Every join of two tensors in a network, and what became of it.

    Attributes:
        rows: one for each join.
        timings: what `rmfx.optimize` has measured; empty otherwise.
        verification: what was compared with the original, if the pass does that.
        held: layers whose weights the result holds otherwise than the model.
    """

    rows: tuple[SiteReport, ...]
    timings: tuple[Timing, ...] = ()
    verification: Verification | None = None
    held: tuple[HeldReport, ...] = ()

    @property
    def removed(self) -> int:
        return sum(row.status == "removed" for row in self.rows)

    @property
    def refused(self) -> int:
        return sum(row.status == "refused" for row in self.rows)

    @property
    def kept(self) -> int:
        return sum(row.status == "kept" for row in self.rows)

    @property
    def times(self) -> float | None:
        """Multiply-adds of the removed sites, after over before; None where they are not known."""
        removed = [row for row in self.rows if row.status == "removed"]
        before = sum(row.macs_before or 0 for row in removed)
        after = sum(row.macs_after or 0 for row in removed)
        return after / before if before and after else None

    @property
    def other(self) -> int:
        """Additions that are no residual connections."""
        return sum(row.status == "other" for row in self.rows)

    def counted(self, status: str) -> dict[str, str]:
        """By kind, how many have a status, in words: "2 of 3 residual connections"."""
        found = {}
        for kind, (many, _) in KINDS.items():
            of_kind = [row.status for row in self.rows if row.kind == kind]
            if of_kind:
                found[kind] = f"{of_kind.count(status)} of {len(of_kind)} {many}"
        return found

    @property
    def total(self) -> str:
        """What became of residual connections, of sums of parallel branches, and of the rest."""
        counted = self.counted("removed") or {SKIP: "0 of 0 residual connections"}
        parts = [f"{text} {KINDS[kind][1]}" for kind, text in counted.items()]
        parts += [f"{self.kept} kept by choice"] if self.kept else []
        rest = f"; {self.other} other additions" if self.other else ""
        return f"{', '.join(parts)}{rest}"

    def details(self) -> str:
        """A table of layouts, with the next best; a join and its node in the graph after it."""
        return table(self.rows, _DETAILS)

    @property
    def adds_left(self) -> int:
        """Additions of two tensors that are still in the graph."""
        return len(self.rows) - self.removed

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists."""
        rows = [asdict(row) for row in self.rows]
        for row in rows:
            row["shape"] = list(row["shape"]) if row["shape"] else None
        names = ("removed", "refused", "kept", "other")
        counts = {name: getattr(self, name) for name in names}
        timings = [asdict(timing) for timing in self.timings]
        verification = self.verification and _lists(asdict(self.verification))
        held = [asdict(row) for row in self.held]
        found = {"sites": rows, "held": held, "timings": timings, "verification": verification}
        return {**counts, **found}

    def __str__(self) -> str:
        verified = [] if self.verification is None else [str(self.verification)]
        return "\n".join([self._table(), *map(str, self.held), *verified, *self._speed()])

    def _speed(self) -> list[str]:
        if not self.timings:
            return []
        runtime = self.timings[0].runtime
        head = (
            f"time in {runtime} over that of the original with its batch norm folded, median"
            " (quartiles):"
        )
        return [head, *(f"  {timing}" for timing in self.timings)]

    def _table(self) -> str:
        if not self.rows:
            return "no residual connections: the graph adds no two tensors"
        return f"{table(self.rows, _COLUMNS)}\n{legend(self.rows)}\n{self.total}{self.dearness()}"

    def dearness(self) -> str:
        """What is said where a conversion costs many times what was there."""
        if self.times is None or self.times < DEAR:
            return ""
        told = f"; their sites take {self.times:.1f} times the multiply-adds"
        if any(row.strategy == "odd-pair" for row in self.rows):
            told += (
                ": a depthwise layer between two activations has to put an odd pair together, and"
                " becomes a whole one; activation='auto' takes no pairs"
            )
        return told


def legend(rows: Sequence[SiteReport]) -> str:
    """A line on what the words in a table of sites mean."""
    used = [f"{way} ({WAYS[way]})" for way in WAYS if any(row.strategy == way for row in rows)]
    text = (
        "carry: channels that take the shortcut's value along; gain: the largest factor, up or"
        " down, on its way"
    )
    return f"{text}; strategy: how it passes activations: {', '.join(used)}" if used else text


def _lists(value: Any) -> Any:
    """Tuples as lists, for JSON."""
    if isinstance(value, dict):
        return {key: _lists(part) for key, part in value.items()}
    return [_lists(part) for part in value] if isinstance(value, (tuple, list)) else value


def _exactness(row: SiteReport) -> str:
    """How exactly a carry arrives, with the bits that it loses, where it does."""
    return f"{row.exactness} (loses {row.bits:.1f} bits)" if row.bits >= 0.05 else row.exactness


def _size(row: SiteReport) -> str:
    return "x".join("?" if n is None else str(n) for n in row.shape or ())


def _reason(row: SiteReport) -> str:
    return f"{row.reason} [{row.source}]" if row.reason and row.source else row.reason


WIDTH = 60  # of a column at most
SITE = Column("site", "name", width=WIDTH)
HEAD = (  # what every table of sites begins with
    SITE,
    Column("done", "done"),
    Column("strategy", "strategy"),
    Column("exactness", _exactness),
)
SIZE = Column("shape", _size)
GAIN = Column("gain", "gain", ".3g")
CARRY = Column("carry", lambda row: row.carry or None)
_COLUMNS = (
    *(*HEAD, SIZE, GAIN, CARRY),
    Column("multiply-adds", lambda row: change(row.macs_before, row.macs_after)),
    Column("parameters", lambda row: change(row.params_before, row.params_after)),
    Column("reason", _reason, width=WIDTH),
)
_DETAILS = (
    SITE,
    Column("join", "join"),
    Column("node", "node"),
    Column("layout", "layout", width=WIDTH),
    Column("the next best, times the multiply-adds", "alternative", width=WIDTH),
)


def report(gm: fx.GraphModule) -> Report:
    """The report of the pass that made `gm`.

    Raises:
        RmfxError: `gm` was not made by `rmfx.remove_residuals`.
    """
    found = getattr(gm, "meta", {}).get(META_KEY)
    if not isinstance(found, Report):
        raise RmfxError(
            f"{type(gm).__name__} carries no report; pass the result of rmfx.remove_residuals"
        )
    return found


def joins_held(gm: fx.GraphModule) -> set[str]:
    """The names of the nodes that hold values of joins, by the report of an earlier pass if any."""
    found = gm.meta.get(META_KEY)
    rows = found.rows if isinstance(found, Report) else ()
    return {row.node for row in rows if row.node is not None}


def modified(gm: fx.GraphModule) -> dict[str, int]:
    """How often each rule of the verb that made `gm` has rewritten something.

    Returns:
        By the names of the rules; empty where the verb has changed nothing.
    """
    return dict(gm.meta.get(MODIFIED_KEY, {}))
