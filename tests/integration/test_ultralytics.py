"""Detectors of ultralytics, from their configurations, convert when fresh, whatever ran before.

Their heads keep the anchors of the sizes that they saw last, which a trace must not take along.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rmfx
from rmfx.testing import random_statistics

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
INSTALL = "pip install ultralytics"
# Residual connections removed, and refused: attention, and the block around it.
DETECTORS = {"yolov8n": (9, 0), "yolo11n": (15, 2), "yolov10n": (12, 2)}


def detector(name: str) -> nn.Module:
    """A detector of four kinds of things, with random weights and statistics."""
    tasks: Any = pytest.importorskip("ultralytics.nn.tasks", reason=INSTALL)
    torch.manual_seed(0)
    model = tasks.DetectionModel(f"{name}.yaml", ch=3, nc=4, verbose=False)
    return random_statistics(model, seed=1).eval()


def found(output: Any) -> Tensor:
    """Boxes and scores, the first thing that a detector gives."""
    while not isinstance(output, Tensor):
        output = output[0] if isinstance(output, (list, tuple)) else next(iter(output.values()))
    return output


@pytest.mark.parametrize("ran_before", [None, (2, 3, 96, 64)])
@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_converts_whatever_ran_before(
    name: str, ran_before: tuple[int, ...] | None
) -> None:
    model, x = detector(name), torch.randn(1, 3, 64, 96)
    if ran_before is not None:
        with torch.no_grad():
            detector(name)(torch.randn(ran_before))
    converted = rmfx.remove_residuals(model, x)
    report = rmfx.report(converted)
    assert (report.removed, report.refused) == DETECTORS[name], str(report)
    for row in report.rows:
        assert (
            row.status != "refused"
            or "both depend on the data" in row.reason
            or ("attn" in row.place)
        ), row.reason
    for other in (x, torch.randn(3, 3, 64, 96)):
        with torch.no_grad():
            wanted, y = found(detector(name)(other)), found(converted(other))
        assert (y - wanted).abs().max() <= 1e-4 * wanted.abs().max()
