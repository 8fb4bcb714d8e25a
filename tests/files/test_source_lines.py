"""Files of code are named without the folders of the machine that they stand on."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from rmfx.files.source_lines import short_path, shorten_stacks

pytestmark = pytest.mark.oldest


def test_a_file_is_named_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert short_path(str(tmp_path / "nets" / "block.py")) == "nets/block.py"
    assert short_path("nets/block.py") == "nets/block.py"
    assert short_path("<stdin>") == "<stdin>"


def test_a_file_elsewhere_is_named_relative_to_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", ["/", str(tmp_path), str(tmp_path / "lib")])
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert short_path(str(tmp_path / "lib" / "nets" / "block.py")) == "nets/block.py"
    assert short_path(torch.nn.__file__) == "torch/nn/__init__.py"
    # An environment inside the working directory is not what the package is called by.
    inside = tmp_path / "work" / ".venv" / "site-packages" / "nets" / "block.py"
    assert short_path(str(inside)) == "nets/block.py"


def test_a_file_of_another_machine_keeps_its_name_alone() -> None:
    assert short_path("/home/somebody/secret/block.py") == "block.py"
    assert short_path(r"C:\Users\somebody\secret\block.py") == "block.py"
    assert short_path(r"C:\Python\Lib\site-packages\nets\block.py") == "nets/block.py"


@pytest.mark.skipif(os.name != "posix", reason="the folder that one is in cannot be deleted")
def test_a_deleted_working_directory_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert short_path("/somewhere/block.py") == "block.py"


def test_stacks_keep_lines_and_code() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    node = next(iter(gm.graph.find_nodes(op="call_module", target="0")))
    node.meta["stack_trace"] = 'File "/x/a/nets.py", line 3, in forward\n    return f(x)'
    shorten_stacks(gm)
    assert node.meta["stack_trace"] == 'File "nets.py", line 3, in forward\n    return f(x)'
