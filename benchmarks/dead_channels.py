"""Channels removed by eliminate_dead_channels from networks in which dead ones were planted.

A quarter of the filters that only one layer reads is made zero, constant, unused and equal to
another one in turn. Each network is cleaned as it is, behind `remove_residuals` and before it, in
float64 with random batch norms. Limits: relative error 1e-10 everywhere; of the network as it is
none of the planted channels may stay, but for one constant at each layer that pads. Behind a
conversion fewer may go: where it groups a layer, every group must lose the same number.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
import torchvision
from _common import Limit, choose_models, parser, show
from torch import nn
from tqdm import tqdm

import rmfx
import rmfx.cost
from rmfx.testing import random_statistics

NETWORKS = ("resnet18", "resnet50", "resnext50_32x4d", "densenet121")
Layers = tuple[nn.Module, nn.Module, nn.Module]


def triples(model: nn.Module) -> list[Layers]:
    """Convolutions with their batch norm and the convolution that alone reads them."""
    found: list[Layers] = []
    for block in model.modules():
        if isinstance(block, torchvision.models.resnet.BasicBlock):
            found.append((block.conv1, block.bn1, block.conv2))
        elif isinstance(block, torchvision.models.resnet.Bottleneck):
            if block.conv2.groups == 1:
                found.append((block.conv1, block.bn1, block.conv2))
            found.append((block.conv2, block.bn2, block.conv3))
        elif isinstance(block, torchvision.models.densenet._DenseLayer):
            found.append((block.conv1, block.norm2, block.conv2))
    return found


def plant(first: Any, norm: Any, reader: Any) -> tuple[int, int]:
    """Make a quarter of the filters dead; returns how many, and how many of them may stay."""
    dead = range(0, first.out_channels - 1, 4)
    with torch.no_grad():
        for i, c in enumerate(dead):
            if i % 4 < 2:
                first.weight[c] = 0
                norm.running_mean[c] = 0
                norm.bias[c] = -1.0 if i % 4 == 0 else 0.5
                if first.bias is not None:
                    first.bias[c] = 0
            elif i % 4 == 2:
                reader.weight[:, c] = 0
            else:
                for table in (first.weight, first.bias, *norm.parameters(), *norm.buffers()):
                    if table is not None and table.dim():
                        table[c] = table[c + 1]
    return len(dead), int(any(reader.padding))


def channels(gm: torch.fx.GraphModule) -> int:
    """Output channels of all linear layers."""
    return sum(cast("Any", m).weight.shape[0] for m in gm.modules() if _is_linear(m))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv2d, nn.Linear))


def measure(name: str) -> tuple[list[dict[str, Any]], list[Limit]]:
    """A row for each order of the two passes, and their limits."""
    model = torchvision.models.get_model(name, weights=None)
    model = random_statistics(model, seed=0).double().eval()
    counts = [plant(*layers) for layers in triples(model)]
    planted, allowed = (sum(column) for column in zip(*counts, strict=True))
    x = torch.randn(1, 3, 65, 71, dtype=torch.float64)
    traced = rmfx.trace(model, x)
    clean = rmfx.eliminate_dead_channels(model, x)
    forms = {"cleaned": (traced, clean)}
    plain = rmfx.remove_residuals(model, x)
    if rmfx.report(plain).rows:
        forms["converted, cleaned"] = (plain, rmfx.eliminate_dead_channels(plain, x))
        forms["cleaned, converted"] = (plain, rmfx.remove_residuals(clean, x))
    rows, limits = [], []
    for form, (before, after) in forms.items():
        error = _error(model, after, x)
        macs = [rmfx.cost.count(gm, x).macs / 1e6 for gm in (before, after)]
        gone = channels(before) - channels(after)
        rows.append(
            {
                "network": name,
                "form": form,
                "planted": planted,
                "channels removed": gone,
                "M before": macs[0],
                "M after": macs[1],
                "error": error,
            }
        )
        limits.append(Limit(f"{name} {form}, error", error, 1e-10))
    stay = planted - rows[0]["channels removed"]
    return rows, [*limits, Limit(f"{name}, planted that stay", stay, allowed)]


def _error(model: nn.Module, after: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        expected, actual = model(x), after(x)
    return float((expected - actual).abs().max() / expected.abs().max())


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns 1 if a limit is exceeded."""
    options, names = choose_models(parser(__doc__ or ""), NETWORKS, arguments)
    torch.manual_seed(0)
    found = [measure(name) for name in tqdm(names, desc="networks", leave=False)]
    rows = [row for some, _ in found for row in some]
    return show(rows, [limit for _, some in found for limit in some], as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
