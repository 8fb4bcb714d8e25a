"""The cleaner of channels keeps what is known of values up to date while it cuts."""

from __future__ import annotations

import torch
from builders import chain, conv, ready, shapes
from torch import nn

from rmfx.analysis.constant_channels import PinnedRanges
from rmfx.frontend import trace
from rmfx.ir.net import Net
from rmfx.pruning.dead_channels import Cleaner


def test_what_is_known_of_a_value_follows_its_channels() -> None:
    # Without example inputs the layers tell how many channels a value has, and that is kept.
    first = conv(3, 8)
    with torch.no_grad():
        for numbers in first.parameters():
            numbers[[1, 2, 5]] = 0
    net = Net(trace(ready(chain(first, nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4)))))
    inner = [node for node in net.graph.nodes if node.op == "call_module"][:3]
    assert [net.channels(node, 2) for node in inner] == [8, 8, 8]
    cleaner = Cleaner(net, PinnedRanges(net))
    cleaner.run()
    assert cleaner.changed == set(inner)
    assert net.rewrites == {"dead_channels": 1}
    left = {net.channels(node, 2) for node in inner}
    assert left == {shapes(net.finish())[0][0]}
    assert left != {8}
