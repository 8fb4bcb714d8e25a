"""What a run of the fuzzer tried and found, as numbers and as tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any, NamedTuple

from rmfx.oracle.equivalence import Equivalence
from rmfx.report import SiteReport
from rmfx.table import Column, table
from rmfx.words import LAYOUTS

from .compare import SIZES
from .compiled import CHANGES
from .networks.features import FEATURES
from .networks.spec import NetworkSpec

# What is counted: what networks are made of, at which sizes they ran, what changed between calls,
# and how carries stood.
COUNTED = FEATURES | {*SIZES} | {f"{change} between calls" for change in CHANGES} | {*LAYOUTS}


class Trial(NamedTuple):
    """What a pass did at every join of a network, what was measured, at which of `SIZES`."""

    rows: tuple[SiteReport, ...]
    found: Equivalence
    sizes: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Failure:
    """The first network on which the pass failed, made small.

    Attributes:
        example: the number of the network that was drawn.
        kind: "wrong numbers" on the example, "VerificationError" on other inputs, or the name of
            the error that the pass or its result raised.
        message: what was said about the small network.
        spec: the small network.
        script: a program that builds it and fails in the same way.
    """

    example: int
    kind: str
    message: str
    spec: NetworkSpec
    script: str


@dataclass
class FuzzReport:
    """What was tried. `str()` gives tables unless the pass failed, `to_dict` what JSON can hold.

    Attributes:
        name: the pass.
        frontend: how the networks were held.
        seed: of the draws.
        examples: networks tried.
        without_inputs: of those, how many were also given to the pass without example inputs.
        skipped: networks that nothing can trace in this way, or that give no numbers; they count as
            tried.
        untraced: why, by what torch says without the names and numbers of one network.
        features: for each of `COUNTED`, in how many networks it occurred.
        removed: sites removed, by strategy and exactness.
        refused: sites refused, by reason without its names and numbers.
        joins: joins whose values were compared.
        errors: the largest relative error of an output or a join, by the network's type.
        failure: None where the pass held.
    """

    name: str
    frontend: str
    seed: int
    examples: int = 0
    without_inputs: int = 0
    skipped: int = 0
    untraced: Counter[str] = field(default_factory=Counter)
    features: Counter[str] = field(default_factory=Counter)
    removed: Counter[tuple[str, str]] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    joins: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    failure: Failure | None = None

    @property
    def error(self) -> float:
        """The largest relative error of a network in float64."""
        return self.errors.get("float64", 0.0)

    def count(self, trial: Trial, dtype: str) -> None:
        """Count in what came of a network of that type."""
        stood = {words for words in LAYOUTS if any(words in row.layout for row in trial.rows)}
        self.features.update(trial.sizes | stood)
        for row in trial.rows:
            if row.status == "removed":
                self.removed[row.strategy, row.exactness] += 1
            else:
                self.refused[without_names(row.reason)] += 1
        joins = trial.found.joins
        self.joins += len(joins)
        errors = (self.errors.get(dtype, 0.0), trial.found.error, *(join.error for join in joins))
        self.errors[dtype] = max(errors)

    def add(self, other: FuzzReport) -> None:
        """Count in what came of other networks of the same seed, tried after these."""
        for name in ("examples", "without_inputs", "skipped", "joins"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("untraced", "features", "removed", "refused"):
            getattr(self, name).update(getattr(other, name))
        for dtype, error in other.errors.items():
            self.errors[dtype] = max(self.errors.get(dtype, 0.0), error)
        self.failure = self.failure or other.failure

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists."""
        failure = self.failure and {
            "example": self.failure.example,
            "kind": self.failure.kind,
            "message": self.failure.message,
            "spec": repr(self.failure.spec),
            "script": self.failure.script,
        }
        return {
            "pass": self.name,
            "frontend": self.frontend,
            "seed": self.seed,
            "examples": self.examples,
            "without_inputs": self.without_inputs,
            "skipped": self.skipped,
            "untraced": dict(self.untraced.most_common()),
            "removed": self.removed.total(),
            "refused": self.refused.total(),
            "joins": self.joins,
            "error": self.error,
            "errors": self.errors,
            "features": {name: self.features[name] for name in sorted(COUNTED)},
            "strategies": [
                {"strategy": strategy, "exactness": exactness, "sites": count}
                for (strategy, exactness), count in self.removed.most_common()
            ],
            "reasons": dict(self.refused.most_common()),
            "failure": failure,
        }

    def __str__(self) -> str:
        if self.failure is not None:  # which is what there is to look at
            return f"{self.summary()}\nNetwork {self.failure.example} fails: {self.failure.kind}."
        features = [(name, n) for name in sorted(COUNTED) if (n := self.features[name])]
        removed = [(*key, count) for key, count in self.removed.most_common()]
        parts = [
            _counts(features, "feature", "networks"),
            _counts(removed, "strategy", "exactness", "sites removed"),
            _counts(self.refused.most_common(), "reason", "sites refused"),
            _counts(self.untraced.most_common(), "why it tells nothing", "networks"),
            self.summary(),
        ]
        return "\n\n".join(filter(None, parts))

    def summary(self) -> str:
        """One paragraph: how much was tried, and the largest error."""
        seen = sum(self.features[name] > 0 for name in COUNTED)
        skipped = f", {self.skipped} of which tell nothing" if self.skipped else ""
        bare = f", {self.without_inputs} of them without example inputs too"
        return (
            f"{_many(self.examples, 'network')} (seed {self.seed}, {self.frontend}){skipped}"
            f" through {self.name}{bare if self.without_inputs else ''};"
            f" {seen} of {len(COUNTED)} features.\n{self._done()}."
        )

    def _done(self) -> str:
        """What the pass did, as far as it reports it, and what was compared."""
        if not self.errors:
            return f"Nothing was compared{' before' if self.failure else ''}"
        removed, refused = self.removed.total(), self.refused.total()
        compared = f"outputs and {_many(self.joins, 'join')} compared" if self.joins else ""
        compared = compared or "outputs compared"
        told = f"{_many(removed, 'site')} removed, {refused} refused, {compared}"
        if not removed + refused + self.joins:  # the pass is no such one
            told = compared.capitalize()
        errors = ", ".join(f"{error:.1e} in {dtype}" for dtype, error in self.errors.items())
        return f"{told}; largest error {errors}"


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _counts(rows: Sequence[tuple[Any, ...]], *titles: str) -> str:
    """A table that counts something: what comes first, its number last."""
    first, *others = (Column(title, itemgetter(i)) for i, title in enumerate(titles))
    others[-1] = replace(others[-1], right=True)
    return table(rows, [replace(first, width=72), *others])


def without_names(reason: str) -> str:
    """A reason for a refusal without the names and numbers of one network.

    >>> without_names("body_1_add: the branch has stride (1, 2) and the shortcut 3")
    'the branch has stride N and the shortcut N'
    """
    text = re.sub(r"^\w+(, \w+)*: ", "", reason)
    text = re.sub(r"\w+(\.\w+)+", "NAME", text)  # the path of a module
    text = re.sub(r"\((\w+)\)$", "", text)  # the operation that writes in place
    text = re.sub(r"\[[\d, ]*\]|\([\d, ]*\)|(?<!\w)-?\d+(?!\w)", "N", text)
    return text.strip()
