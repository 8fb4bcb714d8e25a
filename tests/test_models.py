"""The networks that come with rmfx: their sizes, and that they deploy as they were trained."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from builders import ready
from torch import nn

import rmfx
import rmfx.models
from rmfx.models import (
    RMNeXt,
    cifar_resnet,
    mobilenet_v2,
    rmnext41x5_16,
    rmnext50x6_32,
    rmnext101x6_16,
    rmnext152x6_32,
    rmrep,
)
from rmfx.models.repvgg import RepVGGBlock, ReservingBlock
from rmfx.testing import assert_equivalent

IMAGE = (1, 3, 224, 224)


def numbers(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_rmnext_has_the_sizes_of_the_paper() -> None:
    """RMNeXt-50x6_32: 40.8 M parameters trained, 7.04 G multiply-adds; 8.24 G deployed."""
    model = rmnext50x6_32().eval()
    x = torch.zeros(IMAGE)
    assert round(numbers(model) / 1e6, 1) == 40.8
    assert round(rmfx.cost.count(model, x).macs / 1e9, 2) == 7.04
    plain = rmfx.remove_residuals(model, x, strict=True)
    assert rmfx.is_plain(plain)
    assert round(rmfx.cost.count(plain, x).macs / 1e9, 2) == 8.24
    # The paper's 47.6 M counts the batch norms of the deployed network; without them it is 47.5 M.
    norms = rmfx.remove_residuals(model, x, strict=True, fold_batch_norm=False)
    assert round(numbers(plain) / 1e6, 1) == 47.5
    assert round(numbers(norms) / 1e6, 1) == 47.6


@pytest.mark.parametrize(
    ("make", "layers"), [(rmnext41x5_16, 41), (rmnext101x6_16, 101), (rmnext152x6_32, 152)]
)
def test_the_name_of_an_rmnext_tells_its_layers(make: Callable[[], RMNeXt], layers: int) -> None:
    with torch.device("meta"):
        model = make()
    convolutions = [m for m in model.stages.modules() if isinstance(m, nn.Conv2d)]
    shortcuts = [m for m in convolutions if m.stride == (2, 2) and m.kernel_size == (1, 1)]
    assert len(convolutions) - len(shortcuts) + 2 == layers  # the stem has two


@pytest.mark.parametrize(
    "model",
    [
        RMNeXt((1, 2, 1, 1), 6, 16, 10),
        RMNeXt((2, 1, 1, 1), 5, 32, 10),
        rmrep(9, 0.75, 10),
        rmrep(13, 0.25, 10),
        rmrep(6, 0.0, 10),
        mobilenet_v2(1.0, 10),
        mobilenet_v2(1.5, 10),
        cifar_resnet(8, "A"),
        cifar_resnet(8, "B"),
        rmrep(6, 0.5, 10, widths=(4, 4, 8, 8), strides=(1, 1, 2, 1, 2)),
        RMNeXt((1, 2), 3, 4, 10, widths=(4, 8), strides=(1, 1, 1, 2)),
        cifar_resnet(8, "A", widths=(4, 7, 7)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_what_is_deployed_is_plain_and_computes_the_same(model: nn.Module) -> None:
    model = ready(model)
    x = torch.randn(2, 3, 40, 40).double()
    plain = rmfx.remove_residuals(model, x, strict=True)
    assert rmfx.is_plain(plain)
    assert rmfx.cost.count(plain, x).adds == 0
    assert_equivalent(model, plain, x, tolerance=1e-10)


@pytest.mark.slow
def test_the_deepest_network_is_deployed_exactly() -> None:
    """With statistics of a batch, as training leaves them: others make more of any rounding."""
    torch.manual_seed(0)
    model = rmrep(133, 0.75).double()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.1)
            norm.momentum = None  # the mean of all that is seen
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 96, 96).double())
    x = torch.randn(2, 3, 96, 96).double()
    plain = rmfx.remove_residuals(model.eval(), x, strict=True)
    assert rmfx.is_plain(plain)
    assert len(assert_equivalent(model, plain, x, tolerance=1e-10).joins) == 133


def test_repvgg_becomes_one_convolution_a_block() -> None:
    x = torch.randn(1, 3, 32, 32).double()
    merged = rmfx.merge_branches(ready(rmrep(9, 0.5, 10)), x)
    convolutions = [m for m in merged.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 9
    assert all(conv.kernel_size == (3, 3) for conv in convolutions)


@pytest.mark.parametrize(("depth", "ratio"), [(21, 0.25), (37, 0.25), (69, 0.5), (133, 0.75)])
def test_every_second_block_of_an_rmrep_reserves(depth: int, ratio: float) -> None:
    with torch.device("meta"):
        model = rmrep(depth, ratio)
        without = rmrep(depth, 0.0)
    assert len(model.blocks) == depth
    reserving = [block for block in model.blocks if isinstance(block, ReservingBlock)]
    assert depth / 2 - 4 <= len(reserving) <= depth / 2
    assert all(b.reserved == ratio * (b.reserved + b.made) for b in reserving)
    assert all(isinstance(block, RepVGGBlock) for block in without.blocks)


def test_reserved_channels_pass() -> None:
    block = ready(ReservingBlock(8, 6))
    x = torch.rand(2, 8, 5, 5).double()
    y = block(x)
    assert torch.equal(y[:, :6], x[:, :6])
    assert not torch.equal(y[:, 6:], x[:, 6:])


def test_mobilenet_is_the_one_of_torchvision() -> None:
    torchvision = pytest.importorskip("torchvision")
    theirs, ours = torchvision.models.mobilenet_v2().eval(), mobilenet_v2().eval()
    x = torch.randn(1, 3, 64, 64)
    pairs = zip(theirs.state_dict().values(), ours.state_dict().values(), strict=True)
    for theirs_value, our_value in pairs:
        our_value.copy_(theirs_value)
    assert torch.equal(ours(x), theirs(x))


def test_wide_necks_cost_nothing_where_nothing_is_carried() -> None:
    """A neck without a skip is merged away, so its width is not seen any more."""
    x = torch.zeros(1, 3, 64, 64)
    costs = []
    for free in (1.0, 2.0):
        blocks = mobilenet_v2(free, 10).eval().blocks[0:2]
        model = nn.Sequential(nn.Conv2d(3, 32, 1), blocks[0].depthwise, blocks[0].project)
        model.append(blocks[1].expand)
        costs.append(rmfx.cost.count(rmfx.merge_convs(model.eval(), x, policy="all"), x).macs)
    assert costs[0] == costs[1]


def test_numbers_that_make_no_network() -> None:
    with pytest.raises(ValueError, match="depth must be at least 5"):
        rmrep(4)
    with pytest.raises(ValueError, match="ratio must be"):
        rmrep(21, 1.0)
    with pytest.raises(ValueError, match="four widths and five strides"):
        rmrep(21, widths=(8, 8))
    for widths in ((16, 32), (16, 8, 8), (0, 1, 2)):
        with pytest.raises(ValueError, match="widths must be three"):
            cifar_resnet(20, widths=widths)
    with pytest.raises(ValueError, match="free must leave a channel"):
        mobilenet_v2(0.01)


def test_every_function_can_be_called_without_arguments() -> None:
    """The command line makes models that way."""
    for name in rmfx.models.__all__:
        parameters = inspect.signature(getattr(rmfx.models, name)).parameters.values()
        if name.islower():
            assert all(p.default is not p.empty for p in parameters), name
