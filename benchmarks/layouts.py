"""What the layouts of main block and carry cost: multiply-adds, converted over original.

Networks whose blocks are no plain bottlenecks: depthwise layers, gates, shortcuts of several
layers, blocks under a long skip; and four others. One image of 224x224 (edsr: 32x32), batch norm
folded, in float32, verified. "time" and "macs" are the option `minimise`; seconds are CPU time of
the pass without verification. Limits: each network's ratio, as reached when this was written.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import _zoo
import torch
from _common import Limit, choose_models, each, parser, show

import rmfx
import rmfx.cost

LIMITS = {
    "timm:starnet_s1": 2.0,
    "timm:darknet53": 2.17,
    "timm:xception41p": 2.25,
    "timm:ghostnet_100": 2.4,
    "timm:repghostnet_050": 2.6,
    "timm:seresnet50": 5.1,
    "timm:ecaresnet26t": 4.55,
    "timm:nf_resnet26": 3.9,
    "timm:resnetrs50": 5.2,
    "timm:convmixer_768_32": 1.2,
    "timm:mixnet_s": 3.75,
    "edsr": 3.7,
    "torchvision:resnet18": 1.78,
    "torchvision:resnet50": 3.93,
    "torchvision:mobilenet_v2": 1.1,
    "timm:mobilenetv4_conv_small": 1.23,
}


@torch.no_grad()
def measure(name: str) -> dict[str, Any]:
    """One network by both targets."""
    net = {**_zoo.everything(), **_zoo.zoo()}[name]
    model = net.build().eval().requires_grad_(False)
    shape = net.shapes.even if name == "edsr" else (1, 3, 224, 224)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    before = rmfx.cost.count(rmfx.fold_batch_norm(model, x), x)
    row: dict[str, Any] = {"network": name, "G before": before.macs / 1e9}
    for target in ("time", "macs"):
        start = time.process_time()
        made = rmfx.remove_residuals(model, x, minimise=target, verify=False)
        seconds = time.process_time() - start
        after = rmfx.cost.count(made, x)
        row[target] = after.macs / before.macs
        row[f"layers, {target}"] = after.layers
        error = rmfx.verify(model, made, x).error
        row |= {"seconds": seconds, "error": max(error, row.get("error", 0.0))}
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns 1 if a limit is exceeded."""
    options, names = choose_models(parser(str(__doc__)), LIMITS, arguments)
    rows = [measure(name) for name in each(names)]
    limits = [Limit(row["network"], round(row["time"], 3), LIMITS[row["network"]]) for row in rows]
    return show(rows, limits, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
