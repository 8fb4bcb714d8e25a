"""Ways to prune a network, all with the same training: accuracy against cost.

Two networks on Fashion-MNIST, a ResNet-20 and a small MobileNetV2. Every network sees as many
images in one cycle of the learning rate. An arm prunes after 30 % of it, to five shares of the
multiply-adds (arms.py says how, and how Torch-Pruning does); the controls are the whole network,
and pruned architectures with new weights from the start. 5,000 training images are held back for
every choice; the test images are looked at once, for the tables.

What is trained stands in results/pruning.json after each run, so a run that is cut off goes on
where it was; the networks themselves lie in results/pruning/, outside version control. Three seeds
take about six hours of one core. `--latency` then times the networks of the first seed under
inductor and ONNX Runtime, in turn with the whole one, which wants an idle machine. Every call
writes results/pruning.md and the plots of what is known; `--table` does only that. `--quick` does a
little of everything in a few minutes, in a folder of its own.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what all benchmarks share

import torch
from _common import jobs_of, show
from _fashion import FashionMnist, load
from _records import code_version
from _study import (
    BATCH,
    FROM_SCRATCH,
    RUNTIMES,
    in_parallel,
    load_network,
    save,
    study_parser,
)
from _training import Recipe, accuracy, renew, train
from arms import ARMS, CARRIES, Task, deployed
from networks import NETWORKS
from outcomes import UNPRUNED, Job, Outcome, Record, Timing
from summary import MERGED, RESIDUAL, write_summary
from torch import Tensor, nn
from tqdm import tqdm

import rmfx
from rmfx.testing.jobs import Jobs
from rmfx.timing.machine import machine_of
from rmfx.timing.speed import Settings, compare_speed, ratio_of

RESULTS = Path(__file__).resolve().parents[1] / "results" / "pruning.json"
SHARES = (0.6, 0.4, 0.25, 0.17, 0.12)
LOOKED_AT = 1024  # training images on which filters are judged
RECIPES = {
    "resnet20": Recipe(44_000, rate=0.05, batch=32, bfloat16=True),
    "mobilenet": Recipe(66_000),
}
QUICK_IMAGES, QUICK_SHARES = 6_000, (0.5, 0.25)
QUICK_ARMS = (
    "residual",
    "residual, from scratch",
    "first opened",
    "merged",
    "cut, merged",
    "Torch-Pruning L2",
)
TRUNK = "trunk"
COMMON = ("residual", "residual, searched", "depth", "cut", "plain")
PEERS = ("Torch-Pruning L2", "Torch-Pruning BN", "Torch-Pruning Taylor")
IN_BLOCKS = (
    "residual, in blocks",
    "Torch-Pruning L2, in blocks",
    "Torch-Pruning Taylor, in blocks",
)
OF = {
    "resnet20": (*COMMON, "first opened", *PEERS, *IN_BLOCKS),
    "mobilenet": (*COMMON, "residual, expansions", *MERGED, *PEERS),
}
CONTROLLED = {
    "resnet20": ("residual", "first opened", "residual, in blocks"),
    "mobilenet": ("residual", "cut, merged", "depth, merged"),
}


@dataclass(frozen=True)
class Setting:
    """What all jobs of a study share.

    Attributes:
        folder: for networks.
        data: the folder of Fashion-MNIST.
        images: of training, instead of the recipe's.
    """

    folder: Path
    data: Path
    images: int | None = None

    def recipe(self, network: str) -> Recipe:
        """How a network is trained."""
        usual = RECIPES[network]
        return usual if self.images is None else replace(usual, images=self.images)

    def file(self, job: Job) -> Path:
        """Where the network that a job trained lies."""
        return self.folder / f"{job.name}.pt"


# ---- training -----------------------------------------------------------------------------------


def trunk(network: str, seed: int, setting: Setting, data: FashionMnist) -> nn.Module:
    """The whole network as arms get it, from a file if it is there."""
    recipe = setting.recipe(network)
    path = setting.folder / f"{network}-{seed}-{recipe.images}.pt"
    torch.manual_seed(seed)
    net = NETWORKS[network]()
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()
    net = train(net, data.training, recipe, range(recipe.pruning_step), seed)
    save(path, net.state_dict())
    return net


@dataclass(frozen=True)
class Worker:
    """Does one job in another process; a job of TRUNK trains what the others begin with."""

    setting: Setting

    def __call__(self, job: Job) -> Outcome | None:
        if job.arm == TRUNK:
            trunk(job.network, job.seed, self.setting, load(self.setting.data))
            return None
        return run(job, self.setting)


def run(job: Job, setting: Setting) -> Outcome:
    """Prunes, trains and looks."""
    data, recipe = load(setting.data), setting.recipe(job.network)
    net = trunk(job.network, job.seed, setting, data)
    start, arm = recipe.pruning_step, job.arm.removesuffix(FROM_SCRATCH)
    if arm != UNPRUNED:
        task = Task(net, data.training.first(LOOKED_AT), job.share)
        try:
            net = ARMS[arm](task).eval()
        except rmfx.RmfxError as error:
            return Outcome(job, recipe.images, code_version(), failure=str(error))
    if job.arm != arm:
        start = 0
        torch.manual_seed(job.seed)
        renew(net)
    pruned = accuracy(net, data.validation)
    net = train(net, data.training, recipe, range(start, recipe.steps), job.seed)
    x = data.training.images[:1]
    final = deployed(net, x)
    save(setting.file(job), final)
    cost = rmfx.cost.count(final, x)
    return Outcome(
        job,
        recipe.images,
        code_version(),
        macs=cost.macs,
        parameters=cost.parameters,
        adds=cost.adds,
        pruned=pruned,
        validation=accuracy(final, data.validation),
        test=accuracy(final, data.test),
    )


# ---- all of it ----------------------------------------------------------------------------------


def jobs(networks: Iterable[str], seeds: int) -> list[Job]:
    """All of them, seed by seed, so that what is done first can be looked at."""
    made = []
    for seed in range(seeds):
        for network in networks:
            arms = (*OF[network], *(arm + FROM_SCRATCH for arm in CONTROLLED[network]))
            made.append(Job(network, UNPRUNED, 1.0, seed))
            made += [Job(network, arm, share, seed) for share in SHARES for arm in arms]
    return made


def quick_jobs(networks: Iterable[str]) -> list[Job]:
    """A few of them."""
    whole = [Job(network, UNPRUNED, 1.0, 0) for network in networks]
    arms = [replace(job, arm=arm) for job in whole for arm in QUICK_ARMS]
    known = [job for job in arms if job.arm.removesuffix(FROM_SCRATCH) in OF[job.network]]
    return [*whole, *(replace(job, share=share) for share in QUICK_SHARES for job in known)]


def run_all(wanted: Sequence[Job], setting: Setting, how: Jobs, record: Record) -> None:
    """Does what is not done, and keeps what is known after each job."""

    def keep(outcome: Outcome | None) -> None:
        if outcome is not None:
            record.add(outcome)
            record.save()

    left = [job for job in wanted if job not in record.outcomes]
    phases: list[list[Job]] = []
    for network, seed in dict.fromkeys((job.network, job.seed) for job in left):
        mine = [job for job in left if (job.network, job.seed) == (network, seed)]
        phases += [[Job(network, TRUNK, 1.0, seed)], mine]
    in_parallel(phases, Worker(setting), keep, how)


def time_all(wanted: Sequence[Job], setting: Setting, how: Settings, record: Record) -> None:
    """Times networks of the first seed, all sizes of an arm in turn with the whole network.

    With residual connections they are timed once more without: the conversion is exact, so it can
    as well be made after the training.
    """
    known = [job for job in wanted if job in record.outcomes and job.seed == 0]
    trained = [job for job in known if setting.file(job).exists() and job.arm in ARMS]
    data = load(setting.data).training.first(LOOKED_AT).images
    machine = machine_of(how, how.runtimes)
    for network, arm in tqdm(dict.fromkeys((job.network, job.arm) for job in trained), unit="arm"):
        sizes = [job for job in trained if (job.network, job.arm) == (network, arm)]
        for runtime in how.runtimes:
            left = [job for job in sizes if (job, runtime) not in record.timings]
            if left:
                whole = load_network(setting.file(Job(network, UNPRUNED, 1.0, 0)))
                nets = [load_network(setting.file(job)) for job in left]
                plain = [converted(net, data) for net in nets if arm in RESIDUAL]
                forms = [whole, *nets, *plain]
                times = compare_speed(forms, (data[:BATCH],), runtime, how)
                ratios = [ratio_of(times[0], seconds) for seconds in times[1:]]
                pairs = zip_longest(ratios[: len(nets)], ratios[len(nets) :])
                found = zip(left, pairs, strict=True)
                record.add(*(Timing(job, runtime, *pair) for job, pair in found))
                record.machines[network] = machine
                record.save()


def converted(net: nn.Module, images: Tensor) -> nn.Module:
    """A trained network without residual connections; activations stay the runtimes' own."""
    plain = rmfx.remove_residuals(net, images[:1], activation=CARRIES, calibration=[images])
    merged: nn.Module = rmfx.merge_convs(plain, images[:1])
    return merged


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    made, what = study_parser(str(__doc__))
    made.add_argument("--networks", default=",".join(NETWORKS), help="default: %(default)s")
    what.add_argument("--latency", action="store_true", help="time what is trained")
    options = made.parse_args(arguments)
    names = options.networks.split(",")
    if options.quick:
        path = Path(tempfile.mkdtemp(prefix="rmfx-pruning-")) / RESULTS.name
        setting = Setting(path.with_suffix(""), options.data, QUICK_IMAGES)
        wanted, how = quick_jobs(names), Settings(("onnxruntime",), threads=2, rounds=3)
    else:
        path, setting = RESULTS, Setting(RESULTS.with_suffix(""), options.data)
        wanted = jobs(names, options.seeds)
        how = Settings(tuple(RUNTIMES), threads=2, rounds=options.rounds)
    record = Record.read(path)
    if not options.latency and not options.table:
        run_all(wanted, setting, jobs_of(options), record)
    if options.latency or options.quick:
        time_all(wanted, setting, how, record)
    rows, limits = write_summary(record, names)
    print(f"written: {path.with_suffix('.md')}", file=sys.stderr)
    return show(rows, limits, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
