"""Trained networks on labelled photos: the same answer on every photo after the conversion.

EfficientNet-Lite0 (ImageNet; its skips carry values far outside ReLU6's range) and the MLPerf Tiny
ResNet-8 (CIFAR-10), in float32. Limits for each: no other top-1 class on any photo, at most 1e-5
relative error of the logits, no residual addition left. Exit code 1 if one is exceeded, 2 if the
weights are not installed (python benchmarks/fetch_weights.py does that).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import _weights
import torch
from _common import Limit, count_additions, parser, show
from torch import nn

import rmfx

ERROR_LIMIT = 1e-5


@dataclass(frozen=True)
class Case:
    """A trained network, its photos, and what is known of it."""

    load: Callable[[], nn.Module]
    photos: Callable[[], _weights.Photos]
    adds: int
    correct: int


CASES = {
    "efficientnet_lite0": Case(
        _weights.load_efficientnet_lite0, _weights.imagenet_photos, adds=9, correct=18
    ),
    "resnet8": Case(_weights.load_resnet8, _weights.cifar10_photos, adds=3, correct=16),
}


@dataclass(frozen=True)
class Outcome:
    """What the converted network did on the photos, beside the original.

    Attributes:
        network: name of the case.
        photos: how many.
        correct_before, correct_after: photos whose top-1 class is the label.
        changed: photos whose top-1 class differs between the two networks.
        relative_error: max |before - after| / max |before| over all logits.
        adds_before, adds_left: residual additions.
    """

    network: str
    photos: int
    correct_before: int
    correct_after: int
    changed: int
    relative_error: float
    adds_before: int
    adds_left: int


@torch.no_grad()
def evaluate(name: str) -> Outcome:
    """Converts one network once and compares it with the original on all photos.

    Raises:
        MissingWeightsError: its packages are not installed.
    """
    case = CASES[name]
    images, labels = case.photos()
    model = case.load()
    converted = rmfx.remove_residuals(model, images[:1])
    before, after = model(images), converted(images)
    report = rmfx.report(converted)
    return Outcome(
        network=name,
        photos=len(labels),
        correct_before=int((before.argmax(1) == labels).sum()),
        correct_after=int((after.argmax(1) == labels).sum()),
        changed=int((before.argmax(1) != after.argmax(1)).sum()),
        relative_error=float((before - after).abs().max() / before.abs().max()),
        adds_before=len(report.rows),
        adds_left=max(report.adds_left, count_additions(converted)),
    )


def limits(outcome: Outcome) -> list[Limit]:
    """The three limits of one network."""
    name = outcome.network
    return [
        Limit(f"{name}: photos with another top-1", outcome.changed, 0),
        Limit(f"{name}: relative error", outcome.relative_error, ERROR_LIMIT),
        Limit(f"{name}: adds left", outcome.adds_left, 0),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code described above."""
    options = parser(__doc__).parse_args(arguments)
    try:
        outcomes = [evaluate(name) for name in CASES]
    except _weights.MissingWeightsError as error:
        print(error, file=sys.stderr)
        return 2
    checks = [limit for outcome in outcomes for limit in limits(outcome)]
    return show([vars(outcome) for outcome in outcomes], checks, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
