"""What studies share that train many networks: jobs, workers, records, times and the command.

A study says which networks there are, how one is trained and what its tables are. What is found out
of a network stands in results/NAME.json as soon as it is known, so a run that is cut off goes on
where it was. The networks themselves lie in results/NAME/, outside version control.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from _common import add_jobs, jobs_of, parser, show
from _fashion import FOLDER, FashionMnist, load
from _records import write, write_rows
from _training import accuracy
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import rmfx
from rmfx.testing.jobs import Jobs
from rmfx.timing.machine import machine_of
from rmfx.timing.speed import Settings, compare_speed, ratio_of

RESULTS = Path(__file__).resolve().parent / "results"
RUNTIMES = {"inductor": "inductor", "onnxruntime": "ONNX Runtime"}
BATCH = 64  # of timing
FROM_SCRATCH = ", from scratch"  # behind an arm: its architecture alone, with new weights
Found = dict[str, float]
Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True, order=True)
class Job:
    """One network to train.

    Attributes:
        arm: what is tried.
        size: how much of it: a share, a number of layers, ...
        seed: of weights and data.
    """

    arm: str
    size: float
    seed: int = 0

    @property
    def name(self) -> str:
        """For files."""
        return f"{self.arm}-{self.size:g}-{self.seed}".replace(", ", "-").replace(" ", "-")


@dataclass(frozen=True)
class Setting:
    """What all jobs of a study share.

    Attributes:
        folder: for networks.
        data: the folder of Fashion-MNIST.
        quick: whether a little training will do.
    """

    folder: Path
    data: Path = FOLDER
    quick: bool = False

    def file(self, job: Job) -> Path:
        """Where the network that a job trained lies."""
        return self.folder / f"{job.name}.pt"


@dataclass
class Record:
    """All that is known; `save` writes it down.

    Attributes:
        path: of the JSON file.
        found: by job.
        times: arm, size and runtime -> time over that of the reference: median and quartiles.
        machine: on which times were taken.
    """

    path: Path
    found: dict[Job, Found] = field(default_factory=dict)
    times: dict[tuple[str, float, str], list[float]] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> Record:
        """What the file holds; nothing if there is none."""
        made = Record(path)
        if path.exists():
            rows = json.loads(path.read_text(encoding="utf-8"))
            made.machine = rows["machine"]
            made.found = {Job(**row["job"]): row["found"] for row in rows["found"]}
            made.times = {tuple(row["of"]): row["time"] for row in rows["times"]}
        return made

    def save(self) -> None:
        """Writes the file, with a row in each line."""
        found = [{"job": asdict(job), "found": found} for job, found in self.found.items()]
        times = [{"of": of, "time": time} for of, time in self.times.items()]
        write_rows(self.path, {"found": found, "times": times}, self.machine)

    def values(self, arm: str, size: float, name: str) -> list[float]:
        """What was found of one network, a number for each seed."""
        jobs = sorted(job for job in self.found if (job.arm, job.size) == (arm, size))
        return [self.found[job][name] for job in jobs if name in self.found[job]]

    def sizes(self, arm: str) -> list[float]:
        """Of which something is known, in order."""
        return sorted({job.size for job in self.found if job.arm == arm})

    def time(self, arm: str, size: float, runtime: str) -> float | None:
        """Median time of one network over that of the reference, None if it is not known."""
        known = self.times.get((arm, size, runtime))
        return known[0] if known else None

    def time_cells(self, arm: str, size: float) -> dict[str, str]:
        """For a table: each runtime's median (quartiles), nothing where it is not known."""
        known = {title: self.times.get((arm, size, name)) for name, title in RUNTIMES.items()}
        return {
            title: "{:.2f} ({:.2f}–{:.2f})".format(*time) if time else ""
            for title, time in known.items()
        }


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
        name: of its files.
        about: its docstring.
        phases: (seeds, quick) -> jobs, those that build on others after them.
        work: does one job; it has to be a function of a module, for the workers.
        summary: the page without its title, as Markdown, and what the terminal shows; may plot.
        reference: what times are compared with, None if nothing is timed.
        timed: which arms are timed.
    """

    name: str
    about: str
    phases: Callable[[int, bool], Sequence[Sequence[Job]]]
    work: Callable[[Job, Setting], Found]
    summary: Callable[[Record], tuple[str, list[dict[str, Any]]]]
    reference: Job | None = None
    timed: Callable[[str], bool] = lambda arm: True


def save(path: Path, what: object) -> None:
    """Writes a file at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    torch.save(what, unfinished)
    unfinished.replace(path)


def load_network(path: Path) -> nn.Module:
    """A network from a file of our own, with a graph module in it, which weights_only refuses."""
    net: nn.Module = torch.load(path, weights_only=False)
    return net


# ---- doing all of it ----------------------------------------------------------------------------


def in_parallel(
    phases: Iterable[Sequence[Task]],
    work: Callable[[Task], Result],
    keep: Callable[[Result], object],
    how: Jobs,
) -> None:
    """Does all tasks of a phase before those of the next one, with a progress bar.

    Args:
        phases: of tasks.
        work: done in another process with one thread, unless there is one job at a time.
        keep: called with each result as it comes.
        how: where.
    """
    phases = [phase for phase in phases if phase]
    with tqdm(total=sum(map(len, phases)), unit="network") as progress:
        for phase in phases:
            for found in how.results(work, [(task,) for task in phase], in_order=False):
                keep(found)
                progress.update()


@dataclass(frozen=True)
class _Worker:
    """Does jobs of a study in another process, and tells which one it was."""

    work: Callable[[Job, Setting], Found]
    setting: Setting

    def __call__(self, job: Job) -> tuple[Job, Found]:
        return job, self.work(job, self.setting)


def train_all(study: Study, options: argparse.Namespace, setting: Setting, record: Record) -> None:
    """Does the jobs that are not done."""

    def keep(result: tuple[Job, Found]) -> None:
        job, found = result
        record.found[job] = found
        record.save()

    phases = study.phases(options.seeds, setting.quick)
    left = [[job for job in phase if job not in record.found] for phase in phases]
    in_parallel(left, _Worker(study.work, setting), keep, jobs_of(options))


def time_all(study: Study, how: Settings, setting: Setting, record: Record) -> None:
    """Times the networks of the first seed, all sizes of an arm in turn with the reference."""
    if study.reference is None:
        return
    whole, x = load_network(setting.file(study.reference)), load(setting.data).training.images
    record.machine = record.machine or machine_of(how, how.runtimes)
    arms = dict.fromkeys(job.arm for job in record.found if study.timed(job.arm))
    for arm in tqdm(arms, unit="arm"):
        for runtime in how.runtimes:
            jobs = [Job(arm, size) for size in record.sizes(arm)]
            left = [
                job
                for job in jobs
                if (arm, job.size, runtime) not in record.times and setting.file(job).exists()
            ]
            if not left:
                continue
            forms = [whole, *(load_network(setting.file(job)) for job in left)]
            times = compare_speed(forms, (x[:BATCH],), runtime, how)
            for job, seconds in zip(left, times[1:], strict=True):
                record.times[arm, job.size, runtime] = list(ratio_of(times[0], seconds))
            record.save()


def look_at(net: nn.Module, data: FashionMnist) -> Found:
    """Accuracy and cost of a network as it is deployed."""
    cost = rmfx.cost.count(net, data.test.images[:1])
    return {
        "test": accuracy(net, data.test),
        "validation": accuracy(net, data.validation),
        "layers": cost.layers,
        "adds": cost.adds,
        "macs": cost.macs,
        "parameters": cost.parameters,
    }


def study_parser(about: str) -> tuple[argparse.ArgumentParser, argparse._MutuallyExclusiveGroup]:
    """A parser with the options all studies have, and the group of those that say what to do."""
    made = parser(about)
    made.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    add_jobs(made)
    made.add_argument("--data", type=Path, default=FOLDER, help="default: %(default)s")
    made.add_argument("--rounds", type=int, default=9, help="of timing; default: %(default)s")
    what = made.add_mutually_exclusive_group()
    what.add_argument("--table", action="store_true", help="train nothing and time nothing")
    what.add_argument("--quick", action="store_true", help="a little of everything, in minutes")
    return made, what


def main(study: Study, arguments: Sequence[str] | None = None) -> int:
    """The command of a study."""
    made, _ = study_parser(study.about)
    options = made.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix=f"rmfx-{study.name}-")) if options.quick else RESULTS
    record = Record.read(folder / f"{study.name}.json")
    setting = Setting(folder / study.name, options.data, options.quick)
    if options.quick:
        options.seeds, options.rounds = 1, 3
    if not options.table:
        train_all(study, options, setting, record)
        runtimes = ("onnxruntime",) if options.quick else tuple(RUNTIMES)
        time_all(study, Settings(runtimes, threads=2, rounds=options.rounds), setting, record)
    page, rows = study.summary(record)
    title, *_ = study.about.partition("\n")
    seeds = len({job.seed for job in record.found})
    made_by = f"Made by `python benchmarks/{study.name}.py`. Seeds: {seeds}."
    made_by += how_timed(record.machine)
    write(record.path.with_suffix(".md"), f"# {title}\n\n{made_by}\n\n{page}\n")
    print(f"written: {record.path.with_suffix('.md')}", file=sys.stderr)
    return show(rows, [], as_json=options.json)


# ---- tables -------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean (least to most)."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    ends = f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
    return mean + ends


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as Markdown."""
    return tabulate(rows, "keys", tablefmt="github", disable_numparse=True)


def how_timed(machine: Mapping[str, str]) -> str:
    """A sentence to go behind another one, nothing if nothing was timed."""
    known = "; ".join(f"{name} {value}" for name, value in machine.items())
    return f" Times: batch {BATCH}, {known}." if known else ""


def label_axes(panel: Any, cost: str) -> None:
    """Of a plot of accuracy against a cost."""
    panel.set_xlabel(cost)
    panel.set_ylabel("accuracy in %")
    panel.grid(visible=True, alpha=0.3)
