"""The study's tables, its plots, and what they say of the claims."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from _common import Limit
from _records import write
from _study import FROM_SCRATCH, RUNTIMES, how_timed, label_axes, spread
from outcomes import UNPRUNED, Job, Outcome, Record
from tabulate import tabulate

from rmfx.files.figures import write_figure

PEER = "Torch-Pruning"
MERGED = ("merged", "cut, merged", "depth, merged")
OWN = {
    "resnet20": (
        "residual",
        "residual, in blocks",
        "residual, searched",
        "plain",
        "first opened",
    ),
    "mobilenet": ("residual", "residual, searched", "residual, expansions", "plain", *MERGED),
}
RESIDUAL = (
    "residual",
    "residual, in blocks",
    "residual, searched",
    "residual, expansions",
    "depth",
)
PAPER = {"resnet20": 1.51, "mobilenet": 1.26}
MOST = 0.6  # share of the multiply-adds up to which the peer is compared with
LEAST = 0.3  # share up to which the merged networks are compared

Seeds = tuple[float, ...]


@dataclass(frozen=True)
class Point:
    """An arm at one share.

    Attributes:
        share: of the multiply-adds that was asked for.
        macs, parameters: over those of the unpruned network, means over seeds.
        times: by runtime, over that of the unpruned network; what is not measured is missing.
        converted: the same without residual connections.
        validation, test: accuracy in %, a number for each seed.
    """

    share: float
    macs: float
    parameters: float
    times: dict[str, float]
    converted: dict[str, float]
    validation: Seeds
    test: Seeds

    def cost(self, axis: str) -> float | None:
        """On one of the axes."""
        known = {"multiply-adds": self.macs, "parameters": self.parameters, **self.times}
        return known.get(axis)


Curve = list[Point]
Curves = dict[str, Curve]


def curves_of(record: Record, network: str) -> Curves:
    """The arms of a network, each from the smallest share to the whole network.

    Only seeds of which all shares of all arms are known count, and all if there is none.
    """
    mine = [o for o in record.outcomes.values() if o.job.network == network and not o.failure]
    whole = [o for o in mine if o.job.arm == UNPRUNED]
    if not whole:
        return {}
    seeds = _whole_seeds(mine)
    top = _point(record, [o for o in whole if o.job.seed in seeds], whole[0])
    found: Curves = {UNPRUNED: [top]}
    for arm in dict.fromkeys(o.job.arm for o in mine if o.job.arm != UNPRUNED):
        own = [o for o in mine if o.job.arm == arm and o.job.seed in seeds]
        shares = sorted({o.job.share for o in own})
        points = [_point(record, [o for o in own if o.job.share == s], whole[0]) for s in shares]
        if points:
            found[arm] = [*points, top]
    return found


def _whole_seeds(outcomes: Sequence[Outcome]) -> set[int]:
    counts = {s: sum(o.job.seed == s for o in outcomes) for s in {o.job.seed for o in outcomes}}
    return {seed for seed, count in counts.items() if count == max(counts.values())}


def _point(record: Record, outcomes: Sequence[Outcome], whole: Outcome) -> Point:
    first = outcomes[0].job
    arm = first.arm.removesuffix(FROM_SCRATCH)
    timed = Job(first.network, arm, first.share, 0)
    known = {r: record.timings[timed, r] for r in RUNTIMES if (timed, r) in record.timings}
    times = {runtime: timing.ratio[0] for runtime, timing in known.items()}
    if arm == UNPRUNED:
        times = dict.fromkeys(RUNTIMES, 1.0)
    ordered = sorted(outcomes, key=lambda o: o.job.seed)
    return Point(
        first.share,
        statistics.fmean(o.macs for o in outcomes) / whole.macs,
        statistics.fmean(o.parameters for o in outcomes) / whole.parameters,
        times,
        {runtime: t.converted[0] for runtime, t in known.items() if t.converted},
        tuple(o.validation for o in ordered),
        tuple(o.test for o in ordered),
    )


# ---- reading curves -----------------------------------------------------------------------------


def accuracy_at(curve: Curve, axis: str, cost: float, images: str = "test") -> Seeds | None:
    """Accuracy of each seed at a cost, by lines between points.

    None where the cost is less than that of the smallest network.
    """
    known = [(c, p) for p in curve if (c := p.cost(axis)) is not None]
    if not known or cost < min(c for c, _ in known):
        return None
    known.sort(key=lambda pair: pair[0])
    costs = [c for c, _ in known]
    found = [getattr(p, images) for _, p in known]
    seeds = range(min(map(len, found)))
    return tuple(float(np.interp(cost, costs, [values[s] for values in found])) for s in seeds)


def cost_at(curve: Curve, axis: str, accuracy: float, seed: int) -> float | None:
    """The least cost at which a seed reaches an accuracy, by lines between points."""
    known = sorted((c, p.test[seed]) for p in curve if (c := p.cost(axis)) is not None)
    if not known:
        return None
    if known[0][1] >= accuracy:
        return known[0][0]
    for (low, below), (high, above) in pairwise(known):
        if above >= accuracy:
            return low + (high - low) * (accuracy - below) / (above - below)
    return None


def best(curves: Curves, arms: Iterable[str], share: float | None = None) -> str:
    """The arm with the highest accuracy on the validation images, at one share or on average."""

    def worth(arm: str) -> float:
        points = [p for p in curves[arm][:-1] if share is None or p.share == share]
        return statistics.fmean(statistics.fmean(p.validation) for p in points) if points else 0.0

    return max((arm for arm in arms if arm in curves), key=worth)


def best_at(curves: Curves, arms: Iterable[str], axis: str, cost: float) -> str | None:
    """The arm best on the validation images at a cost; None if no arm has a network so cheap."""
    known = {arm: accuracy_at(curves[arm], axis, cost, "validation") for arm in arms}
    worth = {arm: statistics.fmean(values) for arm, values in known.items() if values}
    return max(worth, key=worth.__getitem__, default=None)


# ---- claims -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """A comparison, in words, and whether it came out as hoped.

    Attributes:
        text: what was compared and what came of it.
        holds: whether it did, beyond the spread of the seeds.
    """

    text: str
    holds: bool


def claims_of(curves: Curves, network: str) -> list[Claim]:
    """All that can be said of a network with what is known."""
    peers = [arm for arm in curves if arm.startswith(PEER)]
    if not peers:
        return []
    arms = [arm for arm in OWN[network] if arm in curves]
    own = best(curves, arms)
    found = []
    for runtime in RUNTIMES:
        found += [
            claim
            for point in curves[peers[0]][:-1]
            if (claim := _against_peers(curves, arms, peers, point.share, runtime))
        ]
    for arm in curves:
        if arm.endswith(FROM_SCRATCH):
            found += _against_scratch(curves, arm)
    for runtime in RUNTIMES:
        found += _speed(curves, network, own, runtime)
        if network == "mobilenet":
            necks = (arm for arm in curves if arm.removesuffix(FROM_SCRATCH) in MERGED)
            found += [claim for arm in necks for claim in _merged(curves, arm, runtime)]
    return found


def _against_peers(
    curves: Curves, arms: Sequence[str], peers: Sequence[str], share: float, runtime: str
) -> Claim | None:
    peer = best(curves, peers, share)
    point = next((p for p in curves[peer] if p.share == share), None)
    time = point.cost(runtime) if point else None
    if share > MOST or point is None or time is None:
        return None
    own = best_at(curves, arms, runtime, time)
    ours = accuracy_at(curves[own], runtime, time) if own else None
    where = f"{RUNTIMES[runtime]}, time {time:.2f}"
    if ours is None:
        return Claim(f"{where}: no network that fast, {peer} {_text(point.test)}", False)
    # All arms of a seed begin with the same network, whose luck would hide what they differ in.
    gains = tuple(a - b for a, b in zip(ours, point.test, strict=True))
    text = f"{where}: {own} {_text(ours)}, {peer} {_text(point.test)}, seed by seed {_text(gains)}"
    return Claim(text, min(gains) > 0)


def _against_scratch(curves: Curves, scratch: str) -> list[Claim]:
    arm, found = scratch.removesuffix(FROM_SCRATCH), []
    for point, control in zip(curves[arm][:-1], curves[scratch][:-1], strict=False):
        gains = tuple(a - b for a, b in zip(point.test, control.test, strict=False))
        text = f"{arm} at {point.share:.2f}: {_text(gains)} above the same from scratch"
        found.append(Claim(text, max(gains) >= 0))
    return found


def _speed(curves: Curves, network: str, own: str, runtime: str) -> list[Claim]:
    """How much faster at the accuracy of the unpruned network, and than the best residual arm."""
    (whole,) = curves[UNPRUNED]
    times = [cost_at(curves[own], runtime, whole.test[s], s) for s in range(len(whole.test))]
    if any(t is None for t in times) or len(curves[own][0].times) < len(RUNTIMES):
        return []
    gains = tuple(1 / t for t in times if t)
    others = [arm for arm in curves if arm in RESIDUAL or arm.startswith(PEER)]
    rival = best(curves, [arm for arm in others if arm != own])
    theirs = [cost_at(curves[rival], runtime, a, s) for s, a in enumerate(whole.test)]
    ratios = tuple(b / a for a, b in zip(times, theirs, strict=True) if a and b)
    text = (
        f"{RUNTIMES[runtime]}, at the accuracy of the unpruned network: {own} is "
        f"{_text(gains)} times as fast as it, {_text(ratios)} times as fast as {rival}; the "
        f"paper has {PAPER[network]} on its own network and data"
    )
    return [Claim(text, min(gains) > 1)]


def _merged(curves: Curves, arm: str, runtime: str) -> list[Claim]:
    """How much faster networks with merged necks are than the fastest residual arm as accurate."""
    found = []
    for point in curves.get(arm, [])[:-1]:
        time = point.cost(runtime)
        if point.share > LEAST or time is None:
            continue
        ratios = []
        for seed, accuracy in enumerate(point.test):
            others = [other for other in curves if other.removesuffix(FROM_SCRATCH) in RESIDUAL]
            rivals = [cost_at(curves[other], runtime, accuracy, seed) for other in others]
            ratios.append(min((r for r in rivals if r is not None), default=1.0) / time)
        text = (
            f"{RUNTIMES[runtime]}, {arm} at {point.share:.2f} ({_text(point.test)}): "
            f"{_text(ratios)} times as fast as the fastest residual arm as accurate"
        )
        found.append(Claim(text, min(ratios) >= PAPER["mobilenet"]))
    return found


def _text(values: Sequence[float]) -> str:
    return spread(values) or "not reached"


# ---- pages --------------------------------------------------------------------------------------


def write_summary(
    record: Record, networks: Iterable[str]
) -> tuple[list[dict[str, Any]], list[Limit]]:
    """Writes the page and the plots.

    Returns:
        Rows of accuracy for the terminal, and limits: claims that did not come out as hoped count
        for nothing, failures of arms do.
    """
    parts, rows = ["# Pruning", "Made by `python benchmarks/pruning/study.py`. Accuracy in %."], []
    for network in networks:
        curves = curves_of(record, network)
        if not curves:
            continue
        plot(curves, network, record.path.with_name(f"{record.path.stem}_{network}.svg"))
        table, times = _accuracy_rows(curves), how_timed(record.machines.get(network, {}))
        rows += [{"network": network} | row for row in table]
        parts += [
            f"## {network}",
            _training(record, network, seeds=len(curves[UNPRUNED][0].test)),
            "On the test images: mean (least to most), by the share of multiply-adds asked for.",
            tabulate(table, "keys", tablefmt="github"),
            "Over the unpruned network: multiply-adds, parameters, time." + times,
            tabulate(_cost_rows(curves), "keys", tablefmt="github"),
            f"![accuracy against cost]({record.path.stem}_{network}.svg)",
        ]
        claims = claims_of(curves, network)
        cells = [(claim.text, "yes" if claim.holds else "no") for claim in claims]
        parts.append(tabulate(cells, ("comparison", "ahead"), tablefmt="github"))
    failures = [o for o in record.outcomes.values() if o.failure]
    if failures:
        parts += ["## Not reached", *(f"- {o.job.name}: {o.failure}" for o in failures)]
    write(record.path.with_suffix(".md"), "\n\n".join(parts) + "\n")
    return rows, [Limit("networks that could not be made", len(failures), 0)]


def _training(record: Record, network: str, seeds: int) -> str:
    images = {o.images for o in record.outcomes.values() if o.job.network == network}
    return f"Training images: {', '.join(f'{n:,}' for n in sorted(images))}; seeds: {seeds}."


def _accuracy_rows(curves: Curves) -> list[dict[str, Any]]:
    rows = [{"arm": UNPRUNED, "1.00": _text(curves[UNPRUNED][0].test)}]
    for arm, curve in curves.items():
        if arm != UNPRUNED:
            rows.append({"arm": arm} | {f"{p.share:.2f}": _text(p.test) for p in curve[-2::-1]})
    columns = sorted({key for row in rows for key in row} - {"arm"}, reverse=True)
    return [{"arm": row["arm"]} | {c: row.get(c, "") for c in columns} for row in rows]


def _cost_rows(curves: Curves) -> list[dict[str, Any]]:
    rows = []
    for arm, curve in curves.items():
        if arm == UNPRUNED or arm.endswith(FROM_SCRATCH):
            continue
        for point in reversed(curve[:-1]):
            row = {"arm": arm, "share": f"{point.share:.2f}"}
            row |= {n: f"{point.cost(n) or 0:.3f}" for n in ("multiply-adds", "parameters")}
            for name, title in RUNTIMES.items():
                row |= {title: _number(point.times, name)}
                row |= {f"{title}, converted": _number(point.converted, name)}
            rows.append(row)
    return rows


def _number(values: Mapping[str, float], name: str) -> str:
    return f"{values[name]:.2f}" if name in values else ""


def plot(curves: Curves, network: str, path: Path) -> None:
    """Draws accuracy against multiply-adds, parameters and the times that are known."""
    from matplotlib.figure import Figure

    axes = {"multiply-adds": "multiply-adds", "parameters": "parameters"}
    axes |= {name: f"time, {title}" for name, title in RUNTIMES.items() if _is_known(curves, name)}
    rows = len(axes) // 2 + len(axes) % 2
    figure = Figure(figsize=(11.0, 4.2 * rows), layout="constrained")
    panels = figure.subplots(rows, 2).flat
    for panel, (axis, title) in zip(panels, axes.items(), strict=False):
        for i, (arm, curve) in enumerate(curves.items()):
            _draw(panel, arm, curve, axis, i)
        panel.axhline(statistics.fmean(curves[UNPRUNED][0].test), color="black", linewidth=0.8)
        panel.set_xlim(left=0)
        label_axes(panel, f"{title}, over the unpruned network's")
    for panel in list(panels)[len(axes) :]:
        panel.set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.suptitle(f"{network} on Fashion-MNIST, equal training; line: unpruned")
    write_figure(figure, path, path.suffix[1:])


def _is_known(curves: Curves, axis: str) -> bool:
    return any(point.cost(axis) is not None for arm in curves for point in curves[arm][:-1])


def _draw(panel: Any, arm: str, curve: Curve, axis: str, number: int) -> None:
    from matplotlib import colormaps

    known = [(c, p) for p in curve if p.share < 1 and (c := p.cost(axis)) is not None]
    if not known:
        return
    costs, points = zip(*sorted(known, key=lambda pair: pair[0]), strict=True)
    means = [statistics.fmean(p.test) for p in points]
    spread = [
        [m - min(p.test) for m, p in zip(means, points, strict=True)],
        [max(p.test) - m for m, p in zip(means, points, strict=True)],
    ]
    style = "--" if arm.startswith(PEER) else ":" if arm.endswith(FROM_SCRATCH) else "-"
    panel.errorbar(
        costs,
        means,
        yerr=spread,
        label=arm,
        linestyle=style,
        marker="o",
        markersize=3,
        linewidth=1.2,
        elinewidth=0.7,
        color=colormaps["tab20"](2 * number % 20 + number // 10),
    )
