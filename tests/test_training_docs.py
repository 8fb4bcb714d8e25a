"""The code of docs/training.md runs as it stands there: in one process, and in two."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builders import python_blocks

PAGE = Path(__file__).resolve().parent.parent / "docs" / "training.md"
BLOCKS = python_blocks(PAGE)
SCRIPTS = [block for block in BLOCKS if "__main__" in block]
pytestmark = pytest.mark.slow


def test_code_in_one_process_runs_as_written() -> None:
    names: dict[str, Any] = {}
    for block in BLOCKS:  # one goes on where the one before ends
        if block not in SCRIPTS:
            exec(compile(block, str(PAGE), "exec"), names)
    assert 0 < names["left"] < names["held"]
    assert names["accuracy"](names["network"]) > 0.85


def test_script_for_several_processes_runs_as_written(tmp_path: Path) -> None:
    (script,) = SCRIPTS
    (tmp_path / "train.py").write_text(script)
    (command,) = re.findall(r"^torchrun (.*)$", PAGE.read_text(), re.M)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *command.split()],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    pattern = r"2 processes, 0\.(3\d|40) of the multiply-adds, accuracy (0\.[89]\d|1\.00)\n"
    assert re.fullmatch(pattern, done.stdout), done.stdout
