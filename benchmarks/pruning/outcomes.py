"""What the study finds out, and the file that keeps it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from _records import write_rows

UNPRUNED = "unpruned"


@dataclass(frozen=True)
class Job:
    """One network to train.

    Attributes:
        network: one of `NETWORKS`.
        arm: one of `ARMS`, with FROM_SCRATCH behind it for its architecture alone; or UNPRUNED.
        share: of the multiply-adds that may stay.
        seed: of weights and data.
    """

    network: str
    arm: str
    share: float
    seed: int

    @property
    def name(self) -> str:
        """For files."""
        return f"{self.network}-{self.arm}-{self.share}-{self.seed}".replace(", ", "-")


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        job: as given.
        images: of training.
        code: version of the compiler.
        macs, parameters, adds: of what runs: batch norm folded, layers merged.
        pruned: accuracy on the validation images right after pruning, in %.
        validation, test: accuracy in the end, in %.
        failure: why there is none, "" if there is.
    """

    job: Job
    images: int
    code: str
    macs: int = 0
    parameters: int = 0
    adds: int = 0
    pruned: float = 0.0
    validation: float = 0.0
    test: float = 0.0
    failure: str = ""


@dataclass(frozen=True)
class Timing:
    """How fast a network is.

    Attributes:
        job: that trained it.
        runtime: "inductor" or "onnxruntime".
        ratio: its time over that of the unpruned network, median and quartiles.
        converted: the same once its residual connections are removed, None if it has none.
    """

    job: Job
    runtime: str
    ratio: tuple[float, float, float]
    converted: tuple[float, float, float] | None = None


@dataclass
class Record:
    """All that is known; `save` writes it down.

    Attributes:
        path: of the JSON file.
        outcomes: by job.
        timings: by job and runtime.
        machines: on which the timings of each network were taken.
    """

    path: Path
    outcomes: dict[Job, Outcome] = field(default_factory=dict)
    timings: dict[tuple[Job, str], Timing] = field(default_factory=dict)
    machines: dict[str, dict[str, str]] = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> Record:
        """What the file holds; nothing if there is none."""
        found = Record(path)
        if path.exists():
            rows: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            found.machines = rows["machine"]
            for row in rows["outcomes"]:
                found.add(Outcome(**row | {"job": Job(**row["job"])}))
            for row in rows["timings"]:
                found.add(Timing(**row | {"job": Job(**row["job"])}))
        return found

    def add(self, *found: Outcome | Timing) -> None:
        """Adds, or replaces, what is known of a job."""
        for one in found:
            if isinstance(one, Outcome):
                self.outcomes[one.job] = one
            else:
                self.timings[one.job, one.runtime] = one

    def save(self) -> None:
        """Writes the file, with a row in each line."""
        rows = {
            "outcomes": map(asdict, self.outcomes.values()),
            "timings": map(asdict, self.timings.values()),
        }
        write_rows(self.path, rows, self.machines)
