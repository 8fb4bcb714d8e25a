"""Networks of half precision whose batch norms are kept in float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from builders import Residual, basic_branch, chain, conv, ready
from torch import nn

import rmfx


def mixed(model: nn.Module, dtype: torch.dtype) -> Any:
    """The model in a narrow type, its batch norms in float32."""
    model = ready(model, dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    return model


def preactivation() -> nn.Module:
    return chain(nn.BatchNorm2d(4), nn.ReLU(), conv(), nn.BatchNorm2d(4), nn.ReLU(), conv())


MODELS = {
    "behind": lambda: Residual(basic_branch()),
    "before": lambda: chain(conv(), Residual(preactivation()), Residual(preactivation())),
    "two in a row": lambda: Residual(chain(conv(), nn.BatchNorm2d(4), nn.BatchNorm2d(4))),
    "between": lambda: chain(
        Residual(basic_branch()), nn.BatchNorm2d(4), nn.ReLU(), Residual(basic_branch())
    ),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=[*MODELS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("fold", [True, False])
def test_batch_norms_in_float32_are_folded_into_narrow_layers(
    make: Any, dtype: torch.dtype, example: bool, fold: bool
) -> None:
    torch.manual_seed(3)
    model = mixed(make(), dtype)
    x = torch.randn(2, 4, 7, 8).to(dtype)
    converted = rmfx.remove_residuals(model, x if example else None, fold_batch_norm=fold)
    assert rmfx.report(converted).adds_left == 0, str(rmfx.report(converted))
    assert all(p.dtype == dtype for m in converted.modules() for p in _of_layers(m))
    for y in (x, torch.randn(3, 4, 9, 5).to(dtype)):
        found = converted(y)
        assert found.dtype == dtype
        exact = copy.deepcopy(model).double()(y.double())
        own, ours = ((z.double() - exact).abs().max() for z in (model(y), found))
        # Folded weights are rounded once where the batch norm's were not.
        assert ours <= 4 * own + torch.finfo(dtype).eps * exact.abs().max()


def _of_layers(module: nn.Module) -> list[nn.Parameter]:
    return [] if isinstance(module, nn.BatchNorm2d) else list(module.parameters(recurse=False))
