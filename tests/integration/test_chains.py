"""The code of docs/bounds_and_stages.md: bounds stay the same, and one tensor crosses a cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import python_blocks

import rmfx

PAGE = Path(__file__).resolve().parents[2] / "docs" / "bounds_and_stages.md"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def variables(block: int) -> dict[str, Any]:
    names: dict[str, Any] = {"torch": torch, "rmfx": rmfx}
    exec(compile(python_blocks(PAGE)[block], str(PAGE), "exec"), names)
    return names


@pytest.mark.parametrize("reach", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("method", ["ibp", "crown_ibp", "crown"])
def test_no_bound_moves(method: str, reach: float) -> None:
    pytest.importorskip("bound_propagation", reason="pip install bound-propagation==0.4.7")
    page = variables(0)
    before, after = (page["bounds"](page[n], method, reach) for n in ("model", "plain"))
    width = (before[1] - before[0]).mean()
    assert width > reach / 10
    assert (before - after).abs().max() < 1e-4 * width


def test_one_tensor_crosses_a_cut_inside_a_block() -> None:
    pytest.importorskip("torchvision")
    page = variables(1)
    two, one = page["received"].values()
    assert two == [(2, 128, 8, 8)] * 2
    assert one == [(2, 256, 8, 8)]
