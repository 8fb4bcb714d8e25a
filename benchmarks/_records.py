"""What the coverage report finds out about a network, and the files that keep it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from _blocked import BLOCKERS
from _common import Limit
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
State = Literal["done", "skipped", "failed"]


@dataclass(frozen=True)
class Outcome:
    """What the conversion of one network gave.

    Attributes:
        network: its name.
        state: "skipped" says nothing about the compiler, see `note`; "failed": something raised.
        note: why it was skipped, what was raised, or what happened at the odd size.
        code: which version of the compiler it was.
        adds: additions of two tensors, by the report.
        removed: those removed.
        left: additions left, by the report or counted in the graph without it, whichever are more.
        blocked: additions left for a reason that does not count, by class (_blocked.py).
        reasons: all refusals, without names and numbers.
        open_reasons: those of additions that are not blocked.
        joins: joins whose value was compared, at each size.
        error_even, error_odd: largest relative error at the output and at every join; the second is
            None where the network does not take the odd size.
        error_least: the same at the even size, of the network converted with minimise="macs".
        noise: how far one rounding of the input moves the original there, at either size.
        sensitivity: smallest error at a join that dropping one operand would have caused; None
            where no join has a counterpart.
        plain: whether the result is a chain.
        sequential: largest relative error of `to_sequential` at both sizes; None if not plain.
        identical: whether, without folding batch norm, the output is the same bit for bit; None
            where an addition was removed.
        macs_ratio: multiply-adds, converted over original with batch norm folded.
        macs_ratio_least: the same, converted with minimise="macs".
        pass_seconds, seconds: time of the conversion, and of everything.
    """

    network: str
    state: State = "done"
    note: str = ""
    code: str = ""
    adds: int = 0
    removed: int = 0
    left: int = 0
    blocked: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    open_reasons: dict[str, int] = field(default_factory=dict)
    joins: int = 0
    error_even: float | None = None
    error_odd: float | None = None
    error_least: float | None = None
    noise: float | None = None
    sensitivity: float | None = None
    plain: bool = False
    sequential: float | None = None
    identical: bool | None = None
    macs_ratio: float | None = None
    macs_ratio_least: float | None = None
    pass_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def refused_open(self) -> int:
        """Additions refused though nothing known forbids their removal."""
        return sum(self.open_reasons.values())

    @property
    def error(self) -> float | None:
        """The largest error of both conversions at both sizes."""
        errors = (self.error_even, self.error_odd, self.error_least)
        return max((e for e in errors if e is not None), default=None)


def code_version() -> str:
    """A short hash of the compiler's sources: what one version found says nothing of another."""
    digest = hashlib.sha256()
    for folder in ("rmfx", "passes"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class Store:
    """The outcomes of one list of networks, in a JSON file that is written after each of them.

    Args:
        path: of the JSON file; a Markdown file stands beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[str, Outcome] = {}
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))["networks"]
            self.outcomes = {row["network"]: Outcome(**row) for row in found}

    def has(self, name: str, code: str) -> bool:
        """Whether this version of the compiler is done with a network."""
        return name in self.outcomes and self.outcomes[name].code == code

    def add(self, outcome: Outcome) -> None:
        """Keeps an outcome, and writes the file whole or not at all."""
        self.outcomes[outcome.network] = outcome
        rows = [dataclasses.asdict(one) for one in self.outcomes.values()]
        write(self.path, json.dumps({"networks": rows}, indent=1) + "\n")

    def write_markdown(self, names: Iterable[str], limits: Sequence[Limit]) -> None:
        """Writes the report on some of the networks."""
        outcomes = [self.outcomes[name] for name in names]
        write(self.path.with_suffix(".md"), markdown(outcomes, limits))


def write_rows(path: Path, rows: Mapping[str, Iterable[object]], machine: object) -> None:
    """Writes lists of rows, one in each line, and a machine as JSON."""
    parts = [
        f'"{name}": [\n' + ",\n".join(json.dumps(row) for row in some) + "\n]"
        for name, some in rows.items()
    ]
    parts.append(f'"machine": {json.dumps(machine)}')
    write(path, "{" + ",\n".join(parts) + "}\n")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


# ---- tables -------------------------------------------------------------------------------------


def table_row(outcome: Outcome) -> dict[str, Any]:
    """One row of the table."""
    if outcome.state != "done":
        return dict.fromkeys(_COLUMNS, "") | {
            "network": outcome.network,
            "notes": f"{outcome.state}: {outcome.note.splitlines()[0]}"[:150],
        }
    return {
        "network": outcome.network,
        "adds": outcome.adds,
        "removed": outcome.removed,
        "blocked": ", ".join(f"{n} {name}" for name, n in outcome.blocked.items()),
        "open": outcome.refused_open or "",
        "share": f"{share([outcome]):.0%}" if outcome.adds else "",
        "plain": "yes" if outcome.plain else "",
        "multiply-adds": _number(outcome.macs_ratio, ".2f"),
        "at least": _number(outcome.macs_ratio_least, ".2f"),
        "error": _number(outcome.error, ".0e"),
        "noise": _number(outcome.noise, ".0e"),
        "joins": outcome.joins,
        "sensitivity": _number(outcome.sensitivity, ".0e"),
        "pass, s": f"{outcome.pass_seconds:.1f}",
        "notes": outcome.note,
    }


_COLUMNS = (
    *("network", "adds", "removed", "blocked", "open", "share", "plain", "multiply-adds"),
    *("at least", "error", "noise", "joins", "sensitivity", "pass, s", "notes"),
)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def share(outcomes: Iterable[Outcome]) -> float:
    """The part of the additions that are not blocked which was removed; 1 where there are none."""
    done = list(outcomes)
    removed = sum(o.removed for o in done)
    possible = removed + sum(o.refused_open for o in done)
    return removed / possible if possible else 1.0


def summary(outcomes: Sequence[Outcome]) -> str:
    """The totals, in words."""
    done = [o for o in outcomes if o.state == "done"]
    adds, removed = sum(o.adds for o in done), sum(o.removed for o in done)
    refused_open = sum(o.refused_open for o in done)
    others = [o for o in done if not o.network.startswith("cifar")]
    states = Counter(o.state for o in outcomes)
    ratios = [
        sorted(filter(None, found))
        for found in ([o.macs_ratio for o in done], [o.macs_ratio_least for o in done])
    ]
    work = ", ".join(
        f"{way}: median {statistics.median(found):.2f}, at most {found[-1]:.2f}"
        for way, found in zip(("by default", 'with minimise="macs"'), ratios, strict=True)
        if found
    )
    return (
        f"{len(done)} networks ({states['failed']} failed, {states['skipped']} skipped), {adds} "
        f"additions: {removed} removed, {adds - removed - refused_open} blocked, {refused_open} "
        f"open. Of those not blocked {share(done):.1%} are removed, {share(others):.1%} without "
        f"the CIFAR networks. {sum(o.plain for o in done)} results are plain; "
        f"{sum(o.left == 0 for o in done)} networks have no addition left. Multiply-adds, "
        f"converted over original, {work}."
    )


def reason_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Every reason of a refusal, the most frequent first; those of blocked additions last."""
    made = []
    for title, name in (("open", "open_reasons"), ("blocked", "blocked_reasons")):
        adds: Counter[str] = Counter()
        nets: dict[str, list[str]] = {}
        for outcome in outcomes:
            counts = Counter(outcome.open_reasons)
            if name == "blocked_reasons":
                counts = Counter(outcome.reasons) - counts
            adds += counts
            for reason in counts:
                nets.setdefault(reason, []).append(outcome.network)
        made += [
            {"": title, "reason": reason, "adds": n, "networks": _some(nets[reason])}
            for reason, n in adds.most_common()
        ]
    return made


def _some(names: Sequence[str], most: int = 6) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def markdown(outcomes: Sequence[Outcome], limits: Sequence[Limit]) -> str:
    """The whole report."""
    checks = [
        {"limit": x.name, "measured": f"{x.value:.3g}", "at most": f"{x.bound:.3g}",
         "holds": "yes" if x.holds else "NO"}
        for x in limits
    ]  # fmt: skip
    classes = [{"class": b.name, "why it does not count": b.why} for b in BLOCKERS]
    parts = [
        "# Coverage",
        f"Made by `python benchmarks/zoo.py`; what the columns mean stands in "
        f"[benchmarks/README.md](../README.md#zoopy).\n\n{summary(outcomes)}",
        _table(list(map(table_row, outcomes))),
        "## Limits",
        _table(checks),
        "## Refusals",
        _table(reason_rows(outcomes)) or "None.",
        "## What counts as blocked",
        _table(classes),
    ]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[dict[str, Any]]) -> str:
    safe = [{key: str(x).replace("|", "\\|") for key, x in row.items()} for row in rows]
    return tabulate(safe, headers="keys", tablefmt="github", disable_numparse=True)
