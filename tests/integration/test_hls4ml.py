"""The code of docs/hls4ml.md runs as it stands there, and hls4ml's C++ computes the same."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import variables_of

import rmfx.cost

PAGE = Path(__file__).resolve().parents[2] / "docs" / "hls4ml.md"
pytestmark = [pytest.mark.hls4ml, pytest.mark.slow]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The variables that the page's code leaves behind."""
    pytest.importorskip("hls4ml")
    if shutil.which("g++") is None:
        pytest.skip("hls4ml compiles with g++")
    return variables_of(PAGE, tmp_path_factory.mktemp("hls4ml"))


def test_plain_network_computes_what_the_residual_one_does(page: dict[str, Any]) -> None:
    expected, found = page["expected"], page["found"]
    assert page["error"](expected, found) < 2e-4
    assert torch.equal(expected.argmax(1), found.argmax(1))
    assert (expected.argmax(1) == page["labels"]).float().mean() > 0.7


def test_the_error_is_that_of_fixed_point_numbers(page: dict[str, Any]) -> None:
    """The residual network, with the same numbers, is as far from PyTorch."""
    expected, images = page["expected"], page["images"]
    plain = page["error"](expected, page["found"])
    residual = page["error"](expected, page["simulate"](page["residual"], images))
    assert 0 < plain < 2 * residual


@pytest.mark.parametrize("site", ["3", "4"])
def test_a_lost_carry_would_be_noticed(page: dict[str, Any], site: str) -> None:
    broken = copy.deepcopy(page["plain"])
    with torch.no_grad():
        broken.get_submodule(f"{site}.conv2").weight[:, -8:] = 0
        found = broken(page["images"])
    assert page["error"](page["expected"], found) > 0.1


def test_streams_of_the_plain_network_are_neither_cloned_nor_added(page: dict[str, Any]) -> None:
    plain, residual = (
        [layer.class_name for layer in page[name].get_layers()] for name in ("hardware", "residual")
    )
    assert not {"Clone", "Merge"} & set(plain)
    assert residual.count("Clone") == residual.count("Merge") == 2


def test_repeated_slopes_of_prelu_are_read_correctly(page: dict[str, Any]) -> None:
    expected = page["other"](page["pictures"]).permute(0, 2, 3, 1)
    assert page["error"](expected, page["found_other"]) < 2e-4


def test_what_a_designer_asks_for_is_as_the_page_says(page: dict[str, Any]) -> None:
    """Multipliers, pace, and values that wait, by what hls4ml made of both networks."""
    plain, residual = page["figures"](page["hardware"]), page["figures"](page["residual"])
    assert (residual, plain) == ((4968, 900, 1116), (7720, 900, 1516))
    fifos = sum(skip.fifo for skip in rmfx.cost.skips(page["model"], page["images"][:1]))
    assert plain[2] < residual[2] + fifos == 1612
