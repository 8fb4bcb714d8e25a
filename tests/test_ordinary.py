"""Calls of one tensor become layers of `torch.nn`; each computes what the call computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, conv, image, ready
from torch import Tensor, nn

import rmfx
from rmfx.modules.apply import Apply as Call

pytestmark = pytest.mark.oldest

CALLS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "mean over space": (lambda y: y.mean((2, 3)), ("AdaptiveAvgPool2d", "Flatten")),
    "from the end": (lambda y: torch.mean(y, (-1, -2)), ("AdaptiveAvgPool2d", "Flatten")),
    "from both ends": (lambda y: torch.mean(y, (2, -1)), ("AdaptiveAvgPool2d", "Flatten")),
    "kept": (lambda y: y.mean((2, 3), keepdim=True), ("AdaptiveAvgPool2d",)),
    "mean over rows": (lambda y: y.mean(2), ("AdaptiveAvgPool2d", "Flatten")),
    "mean over columns": (lambda y: y.mean(-1), ("AdaptiveAvgPool2d", "Flatten")),
    "maximum over space": (lambda y: y.amax((2, 3)), ("AdaptiveMaxPool2d", "Flatten")),
    "mean over channels": (lambda y: y.mean(1), ("Apply",)),
    "mean over all": (lambda y: y.mean((1, 2, 3)), ("Apply",)),
    "mean in another type": (lambda y: y.mean((2, 3), dtype=torch.float32), ("Apply",)),
    "softmax": (lambda y: y.softmax(1), ("Softmax",)),
    "F.softmax": (lambda y: F.softmax(y, dim=-1), ("Softmax",)),
    "log softmax": (lambda y: torch.log_softmax(y, 1), ("LogSoftmax",)),
    "softmax in another type": (lambda y: y.softmax(1, torch.float32), ("Apply",)),
    "zeros": (lambda y: F.pad(y, (1, 2, 0, 1)), ("ZeroPad2d",)),
    "zeros beside": (lambda y: F.pad(y, (1, 2)), ("ZeroPad2d",)),
    "a crop": (lambda y: F.pad(y, (-1, 0, 0, -2)), ("ZeroPad2d",)),
    "ones": (lambda y: F.pad(y, (1, 2, 0, 1), value=1.0), ("ConstantPad2d",)),
    "reflection": (lambda y: F.pad(y, (1, 2, 0, 1), "reflect"), ("ReflectionPad2d",)),
    "replication": (lambda y: F.pad(y, (1, 2, 0, 1), "replicate"), ("ReplicationPad2d",)),
    "circle": (lambda y: F.pad(y, (1, 2, 0, 1), mode="circular"), ("CircularPad2d",)),
    "channels": (lambda y: F.pad(y, (0, 0, 0, 0, 1, 0)), ("Apply",)),
    "pixels from channels": (lambda y: F.pixel_shuffle(y, 2), ("PixelShuffle",)),
    "channels from pixels": (lambda y: F.pixel_unshuffle(y, 2), ("PixelUnshuffle",)),
    "gate of halves": (lambda y: F.glu(y, 1), ("GLU",)),
    "larger": (lambda y: F.interpolate(y, scale_factor=2, mode="bilinear"), ("Upsample",)),
    "to a size": (lambda y: F.interpolate(y, (7, 5)), ("Upsample",)),
    "smaller without aliases": (
        lambda y: F.interpolate(y, scale_factor=0.5, mode="bilinear", antialias=True),
        ("Apply",),
    ),
    "a multiple": (lambda y: y * 3, ("Apply",)),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("known", [False, True], ids=["without inputs", "with inputs"])
def test_calls_are_layers(name: str, known: bool) -> None:
    call, kinds = CALLS[name]
    model = ready(Apply(lambda m, x: call(m.c(x)), c=conv(4, 4)))
    network = rmfx.to_sequential(rmfx.trace(model, *([image(2, 4, 8, 6)] if known else [])))
    assert tuple(type(layer).__name__ for layer in network)[1:] == kinds
    for x in (image(2, 4, 8, 6), image(1, 4, 6, 10)):
        torch.testing.assert_close(network(x), model(x), rtol=1e-12, atol=1e-12)


def test_dimensions_that_are_known_go_one_after_the_other() -> None:
    model = ready(Apply(lambda m, x: m.c(x).mean(3).mean(2), c=conv(4, 4)))
    network = rmfx.to_sequential(rmfx.trace(model, image(2, 4, 8, 6)))
    kinds = ["Conv2d", "AdaptiveAvgPool2d", "Flatten", "AdaptiveAvgPool1d", "Flatten"]
    assert [type(layer).__name__ for layer in network] == kinds
    torch.testing.assert_close(network(image(2, 4, 8, 6)), model(image(2, 4, 8, 6)))


@pytest.mark.parametrize("name", ["mean over space", "softmax", "zeros", "maximum over space"])
def test_so_are_those_of_an_exported_program(name: str) -> None:
    call, kinds = CALLS[name]
    model = ready(Apply(lambda m, x: call(m.c(x)), c=conv(4, 4)))
    program = torch.export.export(model, (image(2, 4, 8, 6),))
    network = rmfx.to_sequential(rmfx.remove_noops(program))
    assert tuple(type(layer).__name__ for layer in network) == ("Conditions", "Conv2d", *kinds)
    torch.testing.assert_close(network(image(2, 4, 8, 6)), model(image(2, 4, 8, 6)))


def test_a_call_that_writes_stays_a_call() -> None:
    model = ready(Apply(lambda m, x: F.softmax(m.c(x), 1).mul_(2).mean((2, 3)), c=conv(4, 4)))
    gm = rmfx.trace(model)
    if rmfx.is_plain(gm):
        assert any(isinstance(layer, Call) for layer in rmfx.to_sequential(gm))


class Named(nn.Module):
    """Layers whose names other things of a Sequential bear."""

    def __init__(self) -> None:
        super().__init__()
        self.append, self.conditions = conv(4, 4), conv(4, 4)
        self.mean, self.stage = conv(4, 4), nn.Sequential(conv(4, 4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.stage(self.mean(self.conditions(self.append(x)))).mean((2, 3))
        return y


def test_layers_keep_their_names() -> None:
    model = ready(Named())
    network = rmfx.to_sequential(rmfx.remove_noops(model))
    names = [name for name, _ in network.named_children()]
    assert names[1:] == ["conditions", "mean", "stage_0", "stage_1", "mean_1", "mean_1_1"]
    assert names[0].startswith("append_")
    assert all(name.isidentifier() for name in names)
    torch.testing.assert_close(network(image(2, 4, 5, 5)), model(image(2, 4, 5, 5)))
