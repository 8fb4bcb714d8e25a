"""Plain networks as `nn.Sequential`; what is not plain is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import (
    Apply,
    Residual,
    adds,
    basic_branch,
    chain,
    conv,
    conv_bn,
    conv_branch,
    image,
    ready,
)
from torch import Tensor, nn

import rmfx

pytestmark = pytest.mark.oldest


class SmallResNet(nn.Module):
    """A resnet in small, with the usual ways to flatten."""

    def __init__(self, flatten: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = chain(conv_bn(3, 4, stride=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
        self.layer1 = chain(Residual(basic_branch()), nn.ReLU(inplace=True))
        self.layer2 = chain(
            Residual(basic_branch(4, 8, stride=2), conv_bn(4, 8, 1, stride=2)), nn.ReLU()
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 5)
        self.flatten = flatten

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.flatten(self.layer2(self.layer1(self.stem(x)))))
        return y


FLATTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "mean over space": lambda x: x.mean((2, 3)),
    "mean of two dimensions": lambda x: x.mean(3).mean(dim=2),
    "torch.mean": lambda x: torch.mean(x, dim=(-1, -2)),
    "flatten": lambda x: torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1),
    "view": lambda x: (lambda y: y.view(y.size(0), -1))(nn.functional.adaptive_avg_pool2d(x, 1)),
    "view with a constant": lambda x: nn.functional.adaptive_avg_pool2d(x, 1).view(-1, 8),
    "squeeze": lambda x: nn.functional.adaptive_avg_pool2d(x, (1, 1)).squeeze(-1).squeeze(-1),
    "maximum": lambda x: x.amax((2, 3)),
}


@pytest.mark.parametrize("name", FLATTEN)
def test_converted_resnet_is_a_sequential(name: str) -> None:
    model = ready(SmallResNet(FLATTEN[name]))
    x = image(2, 3, 33, 29)
    converted = rmfx.remove_residuals(model)
    assert not rmfx.is_plain(rmfx.trace(model))
    assert rmfx.is_plain(converted)
    sequential = rmfx.to_sequential(converted)
    assert type(sequential) is nn.Sequential
    with torch.no_grad():
        assert torch.allclose(sequential(x), model(x), rtol=1e-9)
        assert torch.equal(sequential(x), converted(x))
    assert not sequential.training
    assert repr(sequential)


def test_sequential_has_copies_of_its_own() -> None:
    converted = rmfx.remove_residuals(ready(Residual(conv_branch())))
    sequential = rmfx.to_sequential(converted)
    with torch.no_grad():
        next(sequential.parameters()).zero_()
    assert next(converted.parameters()).any()


def test_sequential_can_be_exported_and_converted_again() -> None:
    sequential = rmfx.to_sequential(rmfx.remove_residuals(ready(Residual(conv_branch()))))
    program = torch.export.export(sequential, (image(),))
    assert torch.allclose(program.module()(image()), sequential(image()))
    again = rmfx.remove_residuals(sequential)
    assert torch.allclose(again(image()), sequential(image()))


NOT_PLAIN: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "a fork": (lambda m, x: x + torch.relu(m.c(x)), "x is read by c, add"),
    "two outputs": (lambda m, x: (m.c(x),), "container"),
    "a value that nobody reads": (lambda m, x: torch.zeros(2), "x is read by nothing"),
    "a product with a parameter": (lambda m, x: m.c(x) * m.p, "p reads nothing"),
    "a size that is computed": (
        lambda m, x: (lambda y: y.view(y.size(1), -1))(m.c(x)),
        "c is read by size, reshape",
    ),
}


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_error_names_the_node_that_is_not_plain(name: str) -> None:
    function, reason = NOT_PLAIN[name]
    gm = rmfx.trace(ready(Apply(function, c=conv(), p=nn.Parameter(torch.ones(1)))))
    assert not rmfx.is_plain(gm)
    with pytest.raises(rmfx.NotPlainError, match=f"not plain: .*{reason}"):
        rmfx.to_sequential(gm)


def _gated(*, refused: bool) -> nn.Module:
    """A squeeze-excite gate behind a residual connection, which goes or stays."""
    branch = chain(conv(), nn.Softmax(1), conv()) if refused else conv_branch()
    gate = Apply(lambda m, x: x * m.g(x.mean((2, 3), True)).sigmoid(), g=conv())
    return ready(chain(Residual(branch), gate))


def test_a_gate_is_named_where_no_sum_stayed() -> None:
    told = _told(rmfx.remove_residuals(_gated(refused=False)))
    assert re.search(r"(\w+) is read by \w+, \w+, and \w+ puts \1 and \w*sigmoid together", told)
    assert "no sum stayed" in told
    assert "rmfx.report" not in told


def test_the_report_is_named_where_a_sum_stayed() -> None:
    told = _told(rmfx.remove_residuals(_gated(refused=True)))
    assert re.search(r"(\w+) is read by \w+, (\w*add), and \2 puts \1 and \w+ together", told)
    assert "print(rmfx.report(result)) says of each sum why it stayed" in told


def test_a_network_that_nobody_has_converted_is_advised_to_be() -> None:
    told = _told(_gated(refused=False))
    assert "; remove_residuals makes chains of residual networks" in told
    assert "rmfx.report" not in told


def _told(model: nn.Module) -> str:
    with pytest.raises(rmfx.NotPlainError) as caught:
        rmfx.to_sequential(model)
    return str(caught.value)


def test_two_inputs_are_not_plain() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x * y

    gm = rmfx.trace(Two())
    with pytest.raises(rmfx.NotPlainError, match="it has 2 inputs: x, y"):
        rmfx.to_sequential(gm)


def test_further_arguments_of_a_layer_are_kept_or_refused() -> None:
    transposed = nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1)
    model = ready(Apply(lambda m, x: m.t(x, output_size=[18, 14]), t=transposed))
    gm = rmfx.trace(model)
    if rmfx.is_plain(gm):
        assert torch.equal(rmfx.to_sequential(gm)(image()), model(image()))
    else:
        with pytest.raises(rmfx.NotPlainError, match="t"):
            rmfx.to_sequential(gm)


def test_network_that_returns_its_input_is_an_empty_sequential() -> None:
    gm = rmfx.trace(nn.Identity())
    assert rmfx.is_plain(gm)
    assert torch.equal(rmfx.to_sequential(gm)(image()), image())


def test_one_module_called_twice_becomes_two_layers() -> None:
    act = nn.PReLU()
    gm = rmfx.trace(ready(chain(conv(), act, conv(), act)))
    sequential = rmfx.to_sequential(gm)
    assert len(sequential) == 4
    assert torch.equal(sequential(image()), gm(image()))


def test_training_mode_carries_over() -> None:
    gm = rmfx.remove_residuals(ready(Residual(conv_branch())))
    assert rmfx.to_sequential(gm.train()).training
    assert adds(gm) == 0


def test_an_exported_chain_is_plain() -> None:
    model = ready(chain(conv(3, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    gm = rmfx.remove_noops(torch.export.export(model, (image(2, 3, 8, 8),)))
    assert rmfx.is_plain(gm)
    x = image(2, 3, 8, 8)
    torch.testing.assert_close(rmfx.to_sequential(gm)(x), model(x), rtol=0, atol=1e-12)


def test_any_module_may_be_asked() -> None:
    assert not rmfx.is_plain(ready(Residual(basic_branch())))
    with pytest.raises(rmfx.NotPlainError, match="is read by"):
        rmfx.to_sequential(ready(Residual(basic_branch())))
    model = ready(chain(conv_bn(3, 4), nn.ReLU()))
    assert rmfx.is_plain(model)
    assert torch.equal(rmfx.to_sequential(model)(image(2, 3, 5, 5)), model(image(2, 3, 5, 5)))
