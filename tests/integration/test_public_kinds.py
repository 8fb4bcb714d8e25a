"""Networks of public kinds, rebuilt in small: every residual connection goes, in every holding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import conv, conv_bn, ready
from torch import Tensor, fx, nn
from torch.nn.utils.parametrizations import weight_norm

import rmfx
from rmfx.testing import assert_equivalent

DOUBLE = torch.float64


def conv1d(n_in: int, n_out: int, kernel: int, dilation: int = 1) -> nn.Conv1d:
    return nn.Conv1d(n_in, n_out, kernel, padding=dilation * (kernel - 1) // 2, dilation=dilation)


# ---- a vocoder: transposed convolutions, dilated blocks beside each other, normed weights --------
class DilatedBlocks(nn.Module):
    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.first = nn.ModuleList(
            weight_norm(conv1d(channels, channels, kernel, d)) for d in (1, 3)
        )
        self.last = nn.ModuleList(weight_norm(conv1d(channels, channels, kernel)) for _ in (1, 3))

    def forward(self, x: Tensor) -> Tensor:
        for first, last in zip(self.first, self.last, strict=True):
            y = first(F.leaky_relu(x, 0.1))
            x = x + last(F.leaky_relu(y, 0.1))
        return x


class Vocoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = weight_norm(conv1d(5, 8, 7))
        self.up = weight_norm(nn.ConvTranspose1d(8, 4, 4, 2, padding=1))
        self.blocks = DilatedBlocks(4, 3)
        self.last = weight_norm(conv1d(4, 1, 7))

    def forward(self, mel: Tensor) -> Tensor:
        x = self.up(F.leaky_relu(self.first(mel), 0.1))
        return torch.tanh(self.last(F.leaky_relu(self.blocks(x), 0.1)))


# ---- speech: a mask of the places that hold sound ------------------------------------------------
class MaskedSpeech(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = conv1d(3, 6, 5)
        self.inner = nn.ModuleList(conv1d(6, 6, 3) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.first(x).masked_fill(mask == 0, 0.0)
        for first, last in zip(self.inner[::2], self.inner[1::2], strict=True):
            y = torch.relu(first(x * mask)) * mask
            x = x + last(y) * mask
        return x * mask


# ---- Go: a vector of the whole board added at every point ----------------------------------------
class GlobalPoolingBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.last_norm = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.first, self.board = conv(channels, channels), conv(channels, 3)
        self.bias, self.last = nn.Linear(6, channels), conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(x))
        board = F.relu(self.board(y))
        whole = torch.cat([board.mean((2, 3)), board.amax((2, 3))], 1)
        y = self.first(y) + self.bias(whole)[:, :, None, None]
        return x + self.last(F.relu(self.last_norm(y)))


def go_tower() -> nn.Module:
    return nn.Sequential(conv(3, 6), GlobalPoolingBlock(6), GlobalPoolingBlock(6), conv(6, 2, 1))


# ---- spikes and quantised values -----------------------------------------------------------------
class SpikingBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.last = conv_bn(channels, channels), conv_bn(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        spikes = (self.first(x) > 0.1).to(x.dtype)
        return torch.clamp(torch.round((x + self.last(spikes)) * 4) / 4, -8, 8)


def spiking() -> nn.Module:
    return nn.Sequential(conv(3, 6), SpikingBlock(6), SpikingBlock(6), conv(6, 2, 1))


# ---- super-resolution: a border written by slices ------------------------------------------------
class BorderBlock(nn.Module):
    """A 1x1 and a 3x3 convolution whose border is what the first gives for zeros."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.widen, self.narrow = conv(channels, 8, 1), nn.Conv2d(8, channels, 3)
        self.last = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(self.widen(x), (1, 1, 1, 1))
        border = self.widen.bias.view(1, -1, 1, 1)
        y[:, :, 0:1, :] = border
        y[:, :, -1:, :] = border
        y[:, :, :, 0:1] = border
        y[:, :, :, -1:] = border
        return x + self.last(F.relu(self.narrow(y)))


def super_resolution() -> nn.Module:
    return nn.Sequential(
        conv(3, 6), BorderBlock(6), BorderBlock(6), conv(6, 12), nn.PixelShuffle(2)
    )


Model = Callable[[], nn.Module]
KINDS: dict[str, tuple[Model, int, list[tuple[Any, ...]]]] = {
    "vocoder": (Vocoder, 2, [(2, 5, 16)]),
    "speech": (MaskedSpeech, 2, [(2, 3, 16), (2, 1, 16)]),
    "go": (go_tower, 2, [(2, 3, 9, 9)]),
    "spiking": (spiking, 2, [(2, 3, 8, 9)]),
    "super-resolution": (super_resolution, 2, [(2, 3, 8, 9)]),
}


def inputs_of(shapes: list[tuple[Any, ...]], more: int = 0) -> tuple[Tensor, ...]:
    """Random inputs; one of a single channel is a mask of zeros and ones."""
    torch.manual_seed(2)
    made = (
        torch.randn(*(n + more * (i != 1) for i, n in enumerate(s)), dtype=DOUBLE) for s in shapes
    )
    return tuple((x > 0).to(DOUBLE) if x.shape[1] == 1 else x for x in made)


def compiled_report(model: nn.Module, inputs: tuple[Tensor, ...]) -> rmfx.Report:
    reports: list[rmfx.Report] = []
    options = {"backend": "eager", "on_report": reports.append}
    torch._dynamo.reset()
    with torch.no_grad():
        y = torch.compile(model, backend="rmfx", options=options)(*inputs)
        wanted = model(*inputs)
    assert (y - wanted).abs().max() <= 1e-10 * wanted.abs().max()
    (report,) = reports
    return report


@pytest.mark.parametrize("kind", KINDS)
def test_all_residual_connections_go(kind: str) -> None:
    make, sites, shapes = KINDS[kind]
    model, inputs = ready(make()), inputs_of(shapes)
    ways: dict[str, Any] = {"module": model, "exported": torch.export.export(model, inputs)}
    if kind not in ("vocoder", "super-resolution"):  # which torch.fx does not see through
        ways["traced"] = fx.symbolic_trace(model)
    for way, held in ways.items():
        converted = rmfx.remove_residuals(held, inputs)
        report = rmfx.report(converted)
        assert (report.removed, report.refused) == (sites, 0), f"{way}\n{report}"
        assert_equivalent(model, converted, inputs)
        if way != "exported":  # which holds for the sizes of its example
            assert_equivalent(model, converted, inputs_of(shapes, more=3))
    report = compiled_report(model, inputs)
    assert (report.removed, report.refused) == (sites, 0), f"compiled\n{report}"
