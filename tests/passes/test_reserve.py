"""Channels that blocks let pass: exactly these, and the others as before; in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import image, ready
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rmfx
from rmfx.errors import OptionError
from rmfx.models import cifar_resnet, rmrep
from rmfx.models.repvgg import RepVGGBlock
from rmfx.testing import assert_equivalent

LIMIT = 1e-10


class Sum(nn.Module):
    """The sum of some branches, and what follows it."""

    def __init__(self, *branches: nn.Module, then: nn.Module | None = None) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.then = then or nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.branches
        total = first(x)
        for branch in others:
            total = total + branch(x)
        return self.then(total)  # type: ignore[no-any-return]


def conv(n_in: int, n_out: int, kernel: int, groups: int = 1, *, norm: bool = True) -> nn.Module:
    layers: list[nn.Module] = [
        nn.Conv2d(n_in, n_out, kernel, padding=kernel // 2, groups=groups, bias=not norm)
    ]
    return nn.Sequential(*layers, *([nn.BatchNorm2d(n_out)] if norm else []))


@st.composite
def branches(draw: st.DrawFn, channels: int) -> nn.Module:
    """A linear branch that keeps channels and size."""
    kernel = draw(st.sampled_from([1, 3, 5]))
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 4, channels) if channels % g == 0]))
    kind = draw(st.sampled_from(["conv", "pair", "nested", "pool", "norm", "plain", "padded"]))
    if kind == "conv":
        return conv(channels, channels, kernel, groups, norm=draw(st.booleans()))
    if kind == "pair":  # wider between the two; the second may work group by group
        inner = conv(channels, 2 * channels, 1, norm=draw(st.booleans()))
        return nn.Sequential(inner, conv(2 * channels, channels, 1, groups))
    if kind == "nested":
        return Sum(conv(channels, channels, 3), nn.Identity(), then=conv(channels, channels, 1))
    if kind == "pool":
        pool = nn.AvgPool2d(3, 1, padding=1)
        return nn.Sequential(pool, nn.BatchNorm2d(channels), nn.Dropout(0.5))
    if kind == "padded":
        return nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3))
    return nn.BatchNorm2d(channels) if kind == "norm" else nn.Identity()


ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "relu": lambda _: nn.ReLU(),
    "relu6": lambda _: nn.ReLU6(),
    "leaky": lambda _: nn.LeakyReLU(0.1),
    "prelu": lambda channels: nn.PReLU(channels),
    "silu": lambda _: nn.SiLU(),
    "none": lambda _: nn.Sequential(),
}


def values(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)  # type: ignore[no-any-return]


@settings(deadline=None)
@given(st.data())
def test_the_first_channels_pass_and_the_others_stay(data: st.DataObject) -> None:
    channels = data.draw(st.sampled_from([4, 6, 9, 12]))
    parts = data.draw(st.lists(branches(channels), min_size=1, max_size=3))
    act, before = (data.draw(st.sampled_from(list(ACTIVATIONS))) for _ in range(2))
    block = Sum(conv(channels, channels, 3), *parts, then=ACTIVATIONS[act](channels))
    front = nn.Sequential(conv(3, channels, 1), ACTIVATIONS[before](channels))
    model = ready(nn.Sequential(front, block))
    x = image(2, 3, data.draw(st.integers(5, 9)), 7)
    reserved = data.draw(st.integers(1, channels - 1))

    given_inputs = x if data.draw(st.booleans()) else None
    net, report = rmfx.reserve(model, reserved / channels, given_inputs, every=1)

    assert [row.reserved for row in report.blocks if row.place == "1"] == [reserved]
    came, made, was = values(model[0], x), values(net, x), values(model, x)
    assert torch.equal(made[:, :reserved], came[:, :reserved])
    torch.testing.assert_close(made[:, reserved:], was[:, reserved:], rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in net.parameters()) < sum(p.numel() for p in model.parameters())

    plain = rmfx.remove_residuals(net, x)
    assert_equivalent(net, plain, x, tolerance=LIMIT)
    if not any(isinstance(m, nn.ReflectionPad2d) for m in model.modules()):
        assert rmfx.is_plain(plain)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_blocks_in_a_row_all_reserve(act: str) -> None:
    """What the second one starts from is what the first one gives now."""
    blocks = [Sum(conv(8, 8, 3), conv(8, 8, 1), then=ACTIVATIONS[act](8)) for _ in range(3)]
    model, x = ready(nn.Sequential(conv(3, 8, 3), *blocks)), image(2, 3, 6, 7)
    net, report = rmfx.reserve(model, 0.25, every=1, blocks="*")
    assert [row.reserved for row in report.blocks] == [2, 2, 2]
    expected = values(model[0], x)
    for block in model[1:]:
        expected = torch.cat([expected[:, :2], values(block, expected)[:, 2:]], 1)
    torch.testing.assert_close(values(net, x), expected, rtol=1e-12, atol=1e-12)
    assert rmfx.is_plain(rmfx.remove_residuals(net, x))


def repvgg(*, before: nn.Module | None = None) -> nn.Module:
    """Six blocks of 8 channels behind an activation."""
    blocks = (RepVGGBlock(8, 8) for _ in range(6))
    return ready(nn.Sequential(nn.Conv2d(3, 8, 1), before or nn.ReLU(), *blocks))


def test_repvgg_becomes_an_rmrep() -> None:
    """The network that rmfx.models builds with the same ratio, parameter for parameter."""
    for ratio in (0.25, 0.75):
        net, _ = rmfx.reserve(rmrep(13, 0.0, 10).eval(), ratio)
        built = rmrep(13, ratio, 10)
        ours, theirs = ([p.shape for p in m.parameters()] for m in (net, built))
        assert sorted(ours) == sorted(theirs)


def test_where_relu_follows_relu_every_block_is_one_convolution() -> None:
    net, report = rmfx.reserve(repvgg(), 0.5)
    assert [row.reserved for row in report.blocks] == [0, 4] * 3
    merged = rmfx.merge_branches(net, image(1, 3, 8, 8))
    assert rmfx.is_plain(merged)
    assert sum(isinstance(m, nn.Conv2d) for m in merged.modules()) == 7
    assert sum(isinstance(m, nn.ReLU) for m in merged.modules()) == 7
    assert_equivalent(net, merged, image(2, 3, 9, 7), tolerance=LIMIT)


def test_max_pooling_leaves_what_relu_gave() -> None:
    """The stem of a network may pool; nothing is below 0 behind it either."""
    front = nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    net, _ = rmfx.reserve(repvgg(before=front), 0.5, every=1)
    assert rmfx.is_plain(rmfx.merge_branches(net, image(1, 3, 8, 8)))


@pytest.mark.parametrize(
    ("every", "reserved"),
    [(1, [2] * 6), (2, [0, 2, 0, 2, 0, 2]), (3, [0, 0, 2, 0, 0, 2]), (6, [0, 0, 0, 0, 0, 2])],
)
def test_every_so_many_blocks(every: int, reserved: list[int]) -> None:
    _, report = rmfx.reserve(repvgg(), 0.25, every=every)
    assert [row.reserved for row in report.blocks] == reserved


def test_blocks_by_name() -> None:
    _, report = rmfx.reserve(repvgg(), 0.25, every=1, blocks=("3", "6"))
    assert [row.place for row in report.blocks if row.reserved] == ["3", "6"]
    assert report.reserving == 2
    assert "2 of 6 blocks reserve" in str(report)
    assert report.to_dict()["blocks"][1]["reserved"] == 2


def test_what_was_trained_can_be_deployed() -> None:
    torch.manual_seed(0)
    net, _ = rmfx.reserve(repvgg(), 0.5)
    net = net.float().train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(4):
        x = torch.randn(8, 3, 8, 8)
        optimizer.zero_grad()
        net(x).square().mean().backward()
        assert all(p.grad is not None for p in net.parameters())
        optimizer.step()
    net = net.double().eval()
    x = image(2, 3, 9, 7)
    assert_equivalent(net, rmfx.merge_branches(net, x), x, tolerance=LIMIT)


def test_the_model_is_not_changed() -> None:
    model, x = repvgg(), image(2, 3, 8, 8)
    before, state = values(model, x), copy.deepcopy(model.state_dict())
    net, _ = rmfx.reserve(model, 0.5)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1.0)
    assert torch.equal(values(model, x), before)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


class Tapped(nn.Module):
    """A block of which one branch is read elsewhere, too."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.one(x)
        return torch.relu(y + self.two(x)), y


def reason(model: Any) -> str:
    with pytest.raises(OptionError, match="no block reserves channels") as told:
        rmfx.reserve(model.eval(), 0.5, every=1)
    return str(told.value)


def test_why_a_block_does_not_reserve() -> None:
    assert "the size changes" in reason(RepVGGBlock(4, 4, 2))
    assert "4 channels become 6" in reason(RepVGGBlock(4, 6))
    three = Sum(*(nn.Conv2d(4, 4, 2) for _ in range(3)), then=nn.ReLU())
    assert reason(three).count("the size changes") == 1
    assert "one is read elsewhere" in reason(Tapped())
    shared = nn.Conv2d(4, 4, 3, padding=1)
    assert "nowhere are parallel" in reason(Sum(shared, shared))
    assert "nowhere are parallel" in reason(cifar_resnet(8))  # its branches have activations
    model, x = cifar_resnet(8).eval(), torch.ones(1, 3, 8, 8)
    net, report = rmfx.reserve(model, 0)  # asks for nothing
    assert not report.blocks
    assert torch.equal(values(net, x), values(model, x))


def test_numbers_that_make_no_sense() -> None:
    for ratio in (-0.1, 1.0, float("nan")):
        with pytest.raises(OptionError, match="ratio"):
            rmfx.reserve(repvgg(), ratio)
    with pytest.raises(OptionError, match="every"):
        rmfx.reserve(repvgg(), every=0)
    with pytest.raises(OptionError, match="no block reserves channels"):
        rmfx.reserve(repvgg(), 0.01)


def test_a_ratio_of_nothing_changes_nothing() -> None:
    model, x = repvgg(), image(2, 3, 8, 8)
    net, report = rmfx.reserve(model, 0.0)
    assert report.reserving == 0
    assert torch.equal(values(net, x), values(model, x))


def test_one_channel_is_always_computed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), RepVGGBlock(4, 4), RepVGGBlock(4, 4)).eval()
    net, report = rmfx.reserve(model, 0.99)
    assert max(row.reserved for row in report.blocks) == 3
    assert net(torch.randn(1, 3, 8, 8)).shape == (1, 4, 8, 8)
    with pytest.raises(OptionError, match="blocks='stage9"):
        rmfx.reserve(model, 0.5, blocks="stage9.*")
