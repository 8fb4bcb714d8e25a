"""Files of networks that change what they hold when they are called."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import Apply, conv, image
from torch import Tensor, nn

import rmfx
from rmfx.errors import RmfxError
from rmfx.files.saving import save


def counting(m: Any, x: Tensor) -> Any:
    m.count.mul_(0.9)
    return x + m.a(x) * m.count


def network(forward: Any) -> nn.Module:
    model = Apply(forward, a=conv()).eval()
    model.register_buffer("count", torch.ones(1))
    return model.requires_grad_(False)


def test_a_file_holds_the_state_that_the_model_has(tmp_path: Path) -> None:
    model, x = network(counting), image(dtype=torch.float32)
    gm = rmfx.remove_residuals(model, x)
    save(gm, tmp_path / "net.pt2", (x,), reference=model)
    assert float(model.get_buffer("count")) == float(gm.get_buffer("count")) == 1.0
    loaded, own = torch.export.load(tmp_path / "net.pt2").module(), copy.deepcopy(model)
    for _ in range(3):
        torch.testing.assert_close(loaded(x), own(x))


def test_a_format_without_state_is_refused(tmp_path: Path) -> None:
    model, x = network(counting), image(dtype=torch.float32)
    with pytest.raises(RmfxError, match="differs from the original"):
        save(rmfx.remove_residuals(model, x), tmp_path / "net.onnx", (x,), reference=model)
    assert not (tmp_path / "net.onnx").exists()
    assert float(model.get_buffer("count")) == 1.0


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_network_that_writes_to_its_input_is_written(tmp_path: Path, suffix: str) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        x.mul_(2)
        return x + m.a(x)

    model, x = network(forward), image(dtype=torch.float32)
    before = x.clone()
    saved = save(rmfx.remove_residuals(model, x), tmp_path / f"net{suffix}", (x,), reference=model)
    assert saved.error < 1e-5
    assert torch.equal(x, before)
