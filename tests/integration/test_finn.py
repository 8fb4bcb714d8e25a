"""The code of docs/finn.md runs as it stands there: brevitas quantises a chain, QONNX runs it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import variables_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "finn.md"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The variables that the page's code leaves behind."""
    pytest.importorskip("brevitas", reason="pip install brevitas==0.13.4")
    pytest.importorskip("qonnx", reason="pip install qonnx==1.0.0")
    return variables_of(PAGE, tmp_path_factory.mktemp("finn"))


def counted(page: dict[str, Any], form: str) -> Counter[str]:
    return Counter(node.op_type for node in page["files"][form].graph.node)


@pytest.mark.parametrize("form", ["plain", "residual"])
def test_the_file_computes_what_the_quantised_network_does(page: dict[str, Any], form: str) -> None:
    assert torch.equal(page["run"](page["files"][form], page["images"][:1]), page["one"][form])
    right = (page["logits"][form].argmax(1) == page["labels"]).sum()
    assert right >= 495
    assert counted(page, form)["Quant"] > 2 * counted(page, form)["Conv"]


def test_the_plain_file_has_no_fork_and_no_join(page: dict[str, Any]) -> None:
    assert counted(page, "residual")["Add"] == 5 == page["forks"](page["files"]["residual"])
    assert counted(page, "plain")["Add"] == 0 == page["forks"](page["files"]["plain"])
