"""One thing that changes is one place: what is taken out there is refused, and back in it works."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, Residual, chain, conv, image, ready
from torch import nn

import rmfx
from rmfx import choices, fuzz
from rmfx.algebra.activation import TABLE
from rmfx.frontend.calls import CALLS
from rmfx.ir.kinds import NEUTRAL
from rmfx.passes.pruning import METERS
from rmfx.timing.runtimes import RUNTIMES

ROOT = Path(__file__).resolve().parents[1]
Change = tuple[str, str, str]  # a file, some text of it, and what comes to stand there


def changed(folder: Path, changes: list[Change], code: str) -> None:
    """Run some code in a copy of rmfx with a few places of it changed."""
    for name in ("rmfx", "passes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file, before, after in changes:
        text = (folder / file).read_text()
        assert text.count(before) == 1, (file, before)
        (folder / file).write_text(text.replace(before, after))
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def removed(model: nn.Module) -> bool:
    return rmfx.report(rmfx.remove_residuals(model, image())).removed == 1


def way(model: nn.Module) -> str | None:
    """How the carry of the one site passes the activation."""
    (row,) = rmfx.report(rmfx.remove_residuals(model, image())).rows
    return row.strategy


def test_an_activation_needs_no_entry_and_a_row_of_the_table_says_what_else_it_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    by_module = ready(Residual(chain(conv(), nn.LeakyReLU(), conv())))
    parts = {"a": conv(), "b": conv()}
    by_function = ready(Apply(lambda m, x: x + m.b(F.leaky_relu(m.a(x))), **parts))
    assert way(by_module) == way(by_function) == "per-channel"
    monkeypatch.delitem(TABLE, nn.LeakyReLU)
    assert way(by_module) == "masked"
    monkeypatch.delitem(CALLS, F.leaky_relu)
    monkeypatch.delitem(CALLS, torch.ops.aten.leaky_relu.default)
    assert way(by_function) == "masked"


def test_a_gate_is_an_entry_of_what_is_neutral(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(m: Any, x: Any) -> Any:
        y = m.a(x)
        return x + m.b(torch.maximum(y, m.c(y)))

    model = ready(Apply(forward, a=conv(), b=conv(), c=conv()))
    assert removed(model)
    monkeypatch.delitem(NEUTRAL, torch.maximum)
    assert not removed(model)


def test_what_may_be_chosen_is_what_there_is() -> None:
    assert tuple(RUNTIMES) == choices.RUNTIMES
    assert (*METERS, "latency") == choices.COSTS
    assert [fuzz.load_pass(name).__name__ for name in choices.PASSES] == list(choices.PASSES)


@pytest.mark.slow
def test_a_runtime_is_a_word_and_a_row(tmp_path: Path) -> None:
    changes = [
        ("rmfx/choices.py", '"openvino")', '"openvino", "traced")'),
        (
            "rmfx/timing/runtimes.py",
            "RUNTIMES = {\n",
            textwrap.dedent("""\
                def _traced(form: Form, threads: int) -> Run:
                    made = torch.jit.trace(form.gm, form.inputs)
                    return lambda: made(*form.inputs)


                RUNTIMES = {
                    "traced": Runtime(_traced),
                """),
        ),
    ]
    code = """
        import torch, rmfx
        from rmfx.timing.speed import Settings
        model, x = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1)).eval(), torch.ones(1, 3, 4, 4)
        fast = rmfx.optimize(model, x, runtime="traced", threads=1, rounds=1, seconds=0.0)
        assert rmfx.remove_residuals(fast, x, minimise="traced")
        assert Settings(("traced",))
    """
    changed(tmp_path, changes, code)


@pytest.mark.slow
def test_a_kind_of_file_is_a_row(tmp_path: Path) -> None:
    changes = [
        (
            "rmfx/files/formats.py",
            '    ".pt2": Format(_write_program, _read_program),',
            '    ".program": Format(_write_program, _read_program),\n'
            '    ".pt2": Format(_write_program, _read_program),',
        )
    ]
    code = """
        import pathlib, torch
        from rmfx.files.saving import save
        gm = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1)).eval())
        assert save(gm, pathlib.Path("net.program"), (torch.ones(1, 3, 4, 4),)).error == 0
    """
    changed(tmp_path, changes, code)


@pytest.mark.slow
def test_a_column_of_the_report_is_a_field_and_a_row(tmp_path: Path) -> None:
    changes = [
        ("rmfx/report.py", "    carry: int = 0\n", "    carry: int = 0\n    dims: int = 0\n"),
        (
            "rmfx/report.py",
            "    *(*HEAD, SIZE, GAIN, CARRY),\n",
            '    *(*HEAD, SIZE, GAIN, CARRY),\n    Column("axes", "dims"),\n',
        ),
        (
            "rmfx/removal/rows.py",
            "        carry=max(carries, default=0),\n",
            "        carry=max(carries, default=0),\n        dims=site.dims,\n",
        ),
    ]
    code = """
        import rmfx.models
        report = rmfx.report(rmfx.remove_residuals(rmfx.models.cifar_resnet(8).eval()))
        assert "axes" in str(report) and report.to_dict()["sites"][0]["dims"] == 2
    """
    changed(tmp_path, changes, code)
