"""`rmfx fuzz` finds a broken pass, makes the network small and prints a program that fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import rmfx
from rmfx import fuzz, testing
from rmfx.cli import main
from rmfx.fuzz import WRONG, draw_case, without_names
from rmfx.testing import Act, Conv, Join, NetworkSpec, Norm, Recall, Save, Split, trial
from rmfx.testing.case import Case
from rmfx.testing.fuzz_report import FuzzReport
from rmfx.testing.script import layout, script
from rmfx.testing.shrink import runs, shrink
from rmfx.testing.trial import NotHeldError, held

PASSES = """
import signal

import torch
from torch import nn
import rmfx


def keeps(model, inputs):
    return model


def forgets_slopes(model, inputs):
    plain = rmfx.remove_residuals(model, inputs)
    for module in plain.modules():
        if isinstance(module, nn.PReLU):
            module.weight.data.fill_(1.0)
    return plain


def forgets_skips(model, inputs):
    plain = rmfx.remove_residuals(model, inputs)
    for row in rmfx.report(plain).rows:
        if row.status == "removed":
            raise RuntimeError(f"removed {row.join}")
    return plain


calls = []


def stops_by_SIGINT(model, inputs, number=signal.SIGINT):
    calls.append(model)
    if len(calls) == 4:
        signal.raise_signal(number)
    return model


def stops_by_SIGTERM(model, inputs):
    return stops_by_SIGINT(model, inputs, signal.SIGTERM)


def gives_up(model, inputs):
    if any(isinstance(module, nn.Hardswish) for module in model.modules()):
        raise rmfx.TraceError("no hardswish")
    return model


not_a_function = 3
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "own_passes.py").write_text(PASSES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_passes", raising=False)


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert main(["fuzz", *arguments, "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def run_script(text: str) -> subprocess.CompletedProcess[str]:
    """Runs a printed program as a user would, from the folder of the passes."""
    Path("found.py").write_text(text)
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, "found.py"]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


# ---- the command --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.PASSES)
def test_the_built_in_passes_hold(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "--pass", name, "--examples", "6", "--seed", "5")
    assert found["failure"] is None
    assert found["examples"] == 6
    assert found["without_inputs"] > 0
    assert 0 <= found["error"] < 1e-10
    assert found["removed"] > 0 or name != "remove_residuals"
    assert found["removed"] == 0 or name in ("remove_residuals", "merge_branches")


@pytest.mark.slow
@pytest.mark.parametrize("frontend", fuzz.FRONTENDS)
def test_networks_are_held_in_every_way(frontend: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "--frontend", frontend, "--examples", "5")
    assert found["failure"] is None
    assert found["removed"] > 3
    assert found["joins"] > 3 or frontend == "compiled"  # of which only outputs can be seen
    if frontend in ("exported", "compiled"):
        assert found["without_inputs"] == 0


def test_the_tables_say_what_occurred(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuzz", "--examples", "8", "--activation", "random"]) == 0
    text = capsys.readouterr().out
    assert "squeeze and excite inside a branch" in text
    assert "sites removed" in text
    assert "sites refused" in text
    assert "8 networks (seed 0, module) through remove_residuals" in text
    assert "largest error" in text


def test_the_same_seed_draws_the_same_networks(capsys: pytest.CaptureFixture[str]) -> None:
    first, second, other = (
        run_json(capsys, "--pass", "own_passes:keeps", "--examples", "10", "--seed", seed)
        for seed in ("1", "1", "2")
    )
    assert first == second
    assert first["features"] != other["features"]
    assert draw_case(7, seed=1).spec == draw_case(7, seed=1, transform="merge_convs").spec


def test_a_time_limit_ends_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "--pass", "own_passes:keeps", "--time", "0.5")
    assert found["examples"] > 0


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_an_interrupted_run_says_what_it_has_tried(
    number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_json(capsys, "--pass", f"own_passes:stops_by_{number}", "--examples", "9", code=130)
    assert 0 < found["examples"] < 4
    assert sum(found["features"].values()) > 0
    assert found["failure"] is None


@pytest.mark.slow
def test_a_failure_is_told_though_making_it_small_was_interrupted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trial, "shrink", interrupt)
    asked = ("--pass", "own_passes:gives_up", "--seed", "3")
    found = run_json(capsys, *asked, code=130)
    assert found["failure"]["kind"] == "TraceError"
    assert found["examples"] == found["failure"]["example"] + 1
    assert run_script(found["failure"]["script"]).returncode == 1


def test_what_does_not_apply_to_a_pass_is_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    told = {}
    for name in ("own_passes:keeps", "remove_residuals"):
        assert main(["fuzz", "--pass", name, "--examples", "1"]) == 0
        told[name] = capsys.readouterr().out.split("\n\n")[-1]
        assert told[name].startswith("1 network (seed 0, module) through ")
    assert "without example inputs" not in told["own_passes:keeps"]
    assert "\nOutputs compared; largest error 0.0e+00 in float64." in told["own_passes:keeps"]
    line = r"\n\d sites? removed, \d refused, outputs and \d joins? compared; largest error "
    assert re.search(line, told["remove_residuals"])


def test_nothing_is_said_to_be_compared_where_nothing_was() -> None:
    report = FuzzReport("own", "module", 0, examples=2, skipped=2)
    assert report.summary().endswith("features.\nNothing was compared.")


def test_tables_have_no_rows_of_zeros(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuzz", "--pass", "own_passes:keeps", "--examples", "1"]) == 0
    table, *_ = capsys.readouterr().out.split("\n\n")
    assert not [line for line in table.splitlines() if line.endswith(" 0")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "most"),
    [
        ("forgets_slopes", WRONG, 3),
        ("forgets_skips", "RuntimeError", 2),
        ("gives_up", "TraceError", 1),
    ],
)
def test_a_broken_pass_is_found_and_its_network_made_small(
    name: str, kind: str, most: int, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_json(capsys, "--pass", f"own_passes:{name}", "--seed", "3", code=1)
    failure = found["failure"]
    assert failure["kind"] == kind
    assert found["examples"] == failure["example"] + 1
    spec = eval(failure["spec"], vars(testing))
    assert len(spec.body) <= most
    assert len(failure["spec"]) < 120
    done = run_script(failure["script"])
    assert done.returncode == 1
    assert ("the networks differ" if kind == WRONG else kind) in done.stderr


def test_the_program_is_printed_and_one_line_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuzz", "--pass", "own_passes:gives_up", "--seed", "3"]) == 1
    output = capsys.readouterr()
    report, program, _ = output.out.split("\n\n", 2)
    assert report.splitlines()[-1].endswith(" fails: TraceError.")  # and no table before it
    assert len(report.splitlines()) == 3
    assert program.startswith("# own_passes:gives_up: TraceError: no hardswish")
    assert "\nspec = NetworkSpec(" in output.out
    assert "from own_passes import gives_up" in output.out
    assert "TraceError: no hardswish" in output.err.splitlines()[-1]
    assert "Traceback" not in output.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pass", "nonsense"], "choose from remove_residuals"),
        (["--pass", "no_such_module:f"], "there is no module 'no_such_module'"),
        (["--pass", "own_passes:no_such_function"], "no_such_function"),
        (["--pass", "own_passes:not_a_function"], "not a function"),
        (["--examples", "0"], "0"),
        (["--examples", "many"], "many"),
        (["--time", "0"], "seconds=0.0 must be a number above 0"),
        (["--frontend", "onnx"], "onnx"),
        (["--activation", "nonsense"], "nonsense"),
        (["--activation", "auto,masked"], "auto"),
        (["--activation", "relu", "--pass", "merge_convs"], "remove_residuals only"),
    ],
)
def test_wrong_usage_is_told(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["fuzz", *arguments])
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err.splitlines()[-1]


def test_examples_or_seconds_must_be_given() -> None:
    with pytest.raises(rmfx.RmfxError, match="never end"):
        fuzz.fuzz(examples=None)


# ---- the printed program ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("frontend", fuzz.FRONTENDS)
@pytest.mark.parametrize("activation", ["auto", ("masked", "shift")])
def test_a_printed_program_runs(frontend: str, activation: str | tuple[str, ...]) -> None:
    block = Join(((Conv(3, 3, (3, 3), padding=1), Norm(3), Act("silu"), Conv(3, 3, (1, 1))), ()))
    spec = NetworkSpec(((2, 3, 7, 7),), (Conv(3, 3, (1, 1)), block, block, Act("relu")))
    case = Case(
        spec,
        "remove_residuals",
        frontend,
        activation,
        without_inputs=frontend in ("module", "traced"),
        input_range=activation != "auto",
        calibrated=activation != "auto" and frontend != "compiled",
        changes=("fused Adam step", "new .data") if frontend == "compiled" else (),
    )
    text = script(case, "a reason\nover two lines")
    assert max(map(len, text.splitlines())) <= 100
    done = run_script(text)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Equivalence") == 1 + (frontend in ("module", "traced"))


def test_a_long_spec_is_laid_out_over_lines_and_stays_the_same() -> None:
    for example in range(30):
        spec = draw_case(example, seed=0).spec
        assert eval(layout(spec), vars(testing)) == spec


# ---- making networks small ----------------------------------------------------------------------


def holds(spec: NetworkSpec, kind: type) -> bool:
    return kind.__name__ in repr(spec)


@pytest.mark.parametrize("kind", [Split, Recall, Norm])
def test_shrinking_keeps_what_fails_and_little_else(kind: type) -> None:
    specs = (draw_case(example, seed=0).spec for example in range(500))
    spec = next(spec for spec in specs if holds(spec, kind) and len(repr(spec)) > 1000)
    small = shrink(spec, lambda spec: holds(spec, kind))
    assert holds(small, kind)
    assert runs(small)
    assert len(repr(small)) < 130, small


def test_shrinking_stops_when_its_time_is_over() -> None:
    spec = draw_case(0, seed=0).spec
    assert shrink(spec, lambda spec: True, seconds=0) == spec


def test_a_network_that_writes_into_its_inputs_is_not_a_smaller_one() -> None:
    assert not runs(NetworkSpec(((1, 2, 3, 3),), (Act("relu", "module in-place"),)))
    assert not runs(NetworkSpec(((1, 2, 3, 3),), (Recall("nobody"),)))
    assert runs(NetworkSpec(((1, 2, 3, 3),), (Save("s"), Recall("s"))))


def test_reasons_lose_names_and_numbers() -> None:
    assert without_names("body_1, y: the operands have no common source") == (
        "the operands have no common source"
    )
    seen = "body_3_add: an in-place operation writes to memory that is read elsewhere (iadd_1)"
    assert without_names(seen) == "an in-place operation writes to memory that is read elsewhere"
    assert without_names("x: a parameter of module body.3.operands.1 is tied; Conv2d") == (
        "a parameter of module NAME is tied; Conv2d"
    )


def test_what_torch_cannot_export_says_nothing_about_the_pass() -> None:
    class Unexportable(nn.Module):
        def forward(self, x: Any) -> Any:
            return x if x.sum().item() > 0 else -x

    spec = draw_case(0, seed=0).spec
    with pytest.raises(NotHeldError):
        held(Unexportable(), spec.inputs(), "exported")
