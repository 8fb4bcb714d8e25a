"""The command `rmfx` as a user sees it: output, exit codes, messages, what is left on the disk."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import rmfx
import rmfx.cli.doctor
import rmfx.demo
from rmfx.cli import main
from rmfx.models import DigitsNet
from rmfx.timing import runtimes

DIGITS = "rmfx.models:DigitsNet"
SHAPE = "--input-shape=1,1,28,28"


class Chain(nn.Module):
    """No residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.bn = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class Softmaxed(nn.Module):
    """A residual connection around what no rule can carry a value through."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + torch.softmax(y, 1)


class TwoInputs(nn.Module):
    """Adds its inputs after one layer each; not a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(4, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([self.left(a), self.right(b)], 1)


class Talkative(Chain):
    """Prints, which must not end up in the JSON."""

    def forward(self, x: Tensor) -> Tensor:
        sys.stdout.write("hello from the model\n")
        return super().forward(x)


class Clamped(nn.Module):
    """A residual connection around ReLU6 that reads the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(nn.functional.relu6(self.first(x)))  # type: ignore[no-any-return]


class Raised(Clamped):
    """The same around a clamp that lets some negative values pass, too."""

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.hardtanh(self.first(x), -2, 6)
        return x + self.last(y)  # type: ignore[no-any-return]


def photos() -> list[tuple[Tensor, Tensor]]:
    """Batches of pictures with values between 10 and 20."""
    generator = torch.Generator().manual_seed(0)
    pictures = 10 + 10 * torch.rand(3, 4, 1, 8, 8, generator=generator)
    return [(batch, torch.zeros(4)) for batch in pictures]


def leaves() -> nn.Module:
    sys.exit("no licence")


def not_finite() -> nn.Module:
    model = Chain()
    nn.init.constant_(model.conv.weight, float("nan"))
    return model


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Models of this file are named `nets:NAME`; the current folder is an empty one."""
    monkeypatch.setitem(sys.modules, "nets", sys.modules[__name__])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Trained weights of the digits network, as a file of their own."""
    path = tmp_path / "trained.safetensors"
    save_file(rmfx.demo.load_model().state_dict(), path)
    return path


def fails(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 1) -> str:
    """Runs a command that must fail; returns its one line on stderr."""
    if code == 2:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    else:
        assert main(arguments) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert "Traceback" not in output.err
    lines = output.err.strip().splitlines()
    assert len(lines) == 1 or code == 2  # with wrong usage argparse shows the usage as well
    return lines[-1]


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


# ---- convert ------------------------------------------------------------------------------------


def test_a_range_proves_that_a_carry_passes(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("nets:Clamped", "--input-shape=1,1,8,8", "--activation", "identity")
    (site,) = run_json(capsys, "report", *asked)["report"]["sites"]
    assert site["status"] == "refused"
    found = run_json(capsys, "convert", *asked, "--input-range", "0", "6", "-o", "net.pt2")
    (site,) = found["report"]["sites"]
    assert (site["status"], site["strategy"]) == ("removed", "identity")
    assert found["output"]["error"] < 1e-5


def test_a_negative_range_is_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("nets:Clamped", "--input-shape=1,1,8,8", "--activation", "identity")
    found = run_json(capsys, "report", *asked, "--input-range", "-1", "-.5")
    assert found["report"]["refused"] == 1


def test_relu_takes_a_large_gain_by_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("nets:Raised", "--input-shape=1,1,8,8", "--input-range", "-9000", "9000")
    (site,) = run_json(capsys, "report", *asked, "--activation", "relu")["report"]["sites"]
    assert site["status"] == "refused"
    assert "name 'scale' beside 'relu'" in site["reason"]
    found = run_json(capsys, "convert", *asked, "--activation", "relu,scale", "-o", "net.pt2")
    (site,) = found["report"]["sites"]
    assert (site["status"], site["strategy"], site["gain"]) == ("removed", "scale", 2**13)


def test_calibration_measures_a_shift(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("nets:Clamped", "--input-shape=1,1,8,8", "--activation", "shift")
    assert run_json(capsys, "report", *asked)["report"]["refused"] == 1
    given = (*asked, "--calibration", "nets:photos", "-o", "net.pt2")
    found = run_json(capsys, "convert", *given)
    (site,) = found["report"]["sites"]
    assert (site["strategy"], site["exactness"]) == ("shift", "calibrated range")
    assert found["output"]["free_batch"]
    torch.manual_seed(0)
    model, program = Clamped().eval(), torch.export.load("net.pt2").module()
    for pictures, _ in photos():
        torch.testing.assert_close(program(pictures), model(pictures))


def test_convert_writes_a_network_without_residuals(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plain.pt2"
    assert main(["convert", DIGITS, SHAPE, "--weights", str(weights), "-o", str(out)]) == 0
    text = capsys.readouterr().out
    assert "5 of 5 residual connections removed" in text
    assert "layer2.0" in text
    assert "for inputs (any, 1, 28, 28)" in text
    images, labels = rmfx.demo.load_digits()
    program = torch.export.load(out).module()
    expected = rmfx.demo.load_model()(images)
    found = program(images)
    assert torch.equal(found.argmax(1), expected.argmax(1))
    assert float((found.argmax(1) == labels).double().mean()) > 0.97
    assert sorted(os.listdir(tmp_path)) == ["plain.pt2", "trained.safetensors"]


def test_convert_as_json_is_one_object(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_json(capsys, "convert", DIGITS, SHAPE, "--weights", str(weights), "-o", "plain.pt2")
    assert found["output"]["path"] == "plain.pt2"
    assert found["output"]["size"] == (tmp_path / "plain.pt2").stat().st_size
    assert found["output"]["error"] <= found["output"]["tolerance"] == 1e-4
    assert found["cost"]["before"]["adds"] == 5
    assert found["cost"]["after"]["adds"] == 0
    assert len(found["report"]["sites"]) == 5
    # Every join was compared, by a comparison that would have seen a missing skip.
    joins = found["report"]["verification"]["joins"]
    assert len(joins) == 5
    assert all(join["error"] < 1e-3 * join["sensitivity"] for join in joins)


def test_convert_to_onnx(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    found = run_json(
        capsys, "convert", DIGITS, SHAPE, "--weights", str(weights), "-o", "plain.onnx"
    )
    assert found["output"]["free_batch"]
    assert found["cost"]["after"]["adds"] == 0


def test_convert_reads_what_torch_export_saved(capsys: pytest.CaptureFixture[str]) -> None:
    program = torch.export.export(rmfx.demo.load_model(), (torch.zeros(1, 1, 28, 28),))
    torch.export.save(program, "residual.pt2")
    found = run_json(capsys, "convert", "residual.pt2", "-o", "plain.pt2")
    assert found["cost"]["after"]["adds"] == 0


def test_a_program_for_one_batch_size_is_pruned(capsys: pytest.CaptureFixture[str]) -> None:
    program = torch.export.export(rmfx.demo.load_model(), (torch.zeros(1, 1, 28, 28),))
    torch.export.save(program, "whole.pt2")
    assert main(["prune", "whole.pt2", "--target=0.5", "-o", "small.pt2"]) == 0
    assert torch.export.load("small.pt2").module()(torch.zeros(1, 1, 28, 28)).shape == (1, 10)


def test_convert_in_float64_is_exact_to_float64(
    weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", DIGITS, SHAPE, "--weights", str(weights), "-o", "plain.pt2"]
    found = run_json(capsys, *command, "--dtype", "float64")
    assert found["output"]["error"] <= 1e-10


def test_convert_with_batch_norm_kept(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", DIGITS, SHAPE, "--weights", str(weights), "-o", "plain.pt2"]
    found = run_json(capsys, *command, "--no-fold-batch-norm")
    assert found["cost"]["after"]["adds"] == 0


def test_convert_a_torchvision_network(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    command = ["convert", "torchvision:resnet18", "--input-shape", "1,3,64,64", "-o", "r18.pt2"]
    found = run_json(capsys, *command)
    assert found["cost"]["before"]["adds"] == 8
    assert found["cost"]["after"]["adds"] == 0


def test_convert_a_network_with_two_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    shapes = ("--input-shape", "2,3", "--input-shape", "2,4")
    assert run_json(capsys, "convert", "nets:TwoInputs", *shapes, "-o", "two.pt2")


def test_a_network_without_residuals_stays_and_the_report_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["convert", "nets:Chain", SHAPE, "-o", "chain.pt2"]) == 0
    assert "no residual connections" in capsys.readouterr().out
    assert Path("chain.pt2").is_file()


# ---- report -------------------------------------------------------------------------------------


def test_report_lists_every_site_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", DIGITS, SHAPE]) == 0
    text = capsys.readouterr().out
    assert all(place in text for place in ("layer1", "layer2.0", "layer2.1", "layer3.0"))
    assert "multiply-adds" in text
    assert os.listdir(tmp_path) == []


def test_report_as_json_matches_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "report", DIGITS, SHAPE)
    gm = rmfx.remove_residuals(DigitsNet().eval(), torch.zeros(1, 1, 28, 28))
    places = [row["place"] for row in found["report"]["sites"]]
    assert places == [row.place for row in rmfx.report(gm).rows]


def test_report_of_a_network_without_residuals(capsys: pytest.CaptureFixture[str]) -> None:
    kept = run_json(capsys, "report", DIGITS, SHAPE, "--policy", "profitable")["report"]
    assert (kept["removed"], kept["kept"]) == (0, len(kept["sites"]))
    found = run_json(capsys, "report", "nets:Chain", SHAPE)
    assert found["report"]["sites"] == []


def test_a_refused_site_is_reported_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "report", "nets:Softmaxed", SHAPE)
    (row,) = found["report"]["sites"]
    assert row["status"] == "refused"
    assert "softmax" in row["reason"]


def test_strict_fails_on_a_refused_site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, "convert", "nets:Softmaxed", SHAPE, "--strict", "-o", "out.pt2")
    assert "softmax" in message
    assert os.listdir(tmp_path) == []


# ---- bench --------------------------------------------------------------------------------------

BENCH = ("bench", DIGITS, SHAPE, "--runtimes=eager", "--batch=1", "--threads=1", "--rounds=2")


def test_bench_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(BENCH) == 0
    text = capsys.readouterr().out
    assert "converted/original (quartiles)" in text
    assert "threads 1; rounds 2; precision float32" in text
    assert os.listdir(tmp_path) == []


def test_bench_of_several_networks_as_json_and_as_a_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ("bench", "nets:Chain", *BENCH[1:], "-o", "latency.json")
    found = run_json(capsys, *command)
    assert [row["network"] for row in found["rows"]] == ["nets:Chain", DIGITS]
    assert all(row["ratio"]["median"] > 0 for row in found["rows"])
    assert json.loads(Path("latency.json").read_text()) == found
    assert os.listdir() == ["latency.json"]


def test_bench_draws(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main([*BENCH, "--plot", "latency.svg"]) == 0
    assert "<svg" in Path("latency.svg").read_text()


def test_bench_shows_what_failed_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(form: object, threads: int) -> runtimes.Run:
        raise ValueError("no such kernel")

    monkeypatch.setitem(runtimes.RUNTIMES, "inductor", runtimes.Runtime(fail))
    assert main([*BENCH, "--runtimes=inductor,eager", "--json"]) == 1
    output = capsys.readouterr()
    rows = json.loads(output.out)["rows"]
    assert [bool(row["failure"]) for row in rows] == [True, False]
    assert "rmfx: 1 of 2 measurements failed: ValueError: no such kernel" in output.err


# ---- demo ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_demo_without_a_compiler_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*given: object, **options: object) -> None:
        raise RuntimeError("no C++ compiler\nand a long explanation")

    monkeypatch.setattr(torch, "compile", fail)
    assert main(["demo"]) == 0
    text = capsys.readouterr().out
    assert "Not timed: inductor: RuntimeError: no C++ compiler\n" in text
    assert "5 of 5 residual connections removed" in text
    assert "0 answers differ" in text
    assert "does not make a CPU faster" in text


@pytest.mark.slow
def test_demo_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "demo")
    assert found["right_before"] == found["right_after"] > 0.97 * found["digits"]
    assert found["changed"] == 0
    assert found["largest_difference"] < 1e-4
    assert [speed["runtime"] for speed in found["speeds"]] == ["eager", "inductor"]


# ---- bad input ----------------------------------------------------------------------------------


def test_a_report_without_inputs_says_how_to_give_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", DIGITS]) == 0
    text = capsys.readouterr().out
    assert "Nothing was run and nothing was verified, as its inputs are not known" in text
    assert "give --inputs FILE, or give --input-shape, such as 1,3,224,224." in text


def test_bad_input_shapes_are_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for shape in ("", "1,x", "1,0,28", "-1,3", "1,,3", "1x3"):
        for given in ([f"--input-shape={shape}"], ["--input-shape", shape]):
            message = fails(capsys, "report", DIGITS, *given, code=2)
            assert "is not a list of sizes like 1,3,224,224" in message
    assert "is not a list of shares" in fails(capsys, "prune", DIGITS, "--target", "-1,.5", code=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["convert", DIGITS], "required: -o"),
        (["convert", DIGITS, "-o", "net.pth"], "must end in .pt2 or .onnx"),
        (["convert", DIGITS, "-o", "net.pt2"], "give --input-shape"),
        (["report", DIGITS, "--dtype", "int8"], "invalid choice: 'int8'"),
        (["explode"], "invalid choice: 'explode'"),
        (["report", DIGITS, "--input-range", "1"], "expected 2 arguments"),
        (["report", DIGITS, "--input-range", "1", "0"], "1 0 are not two finite numbers"),
        (["report", DIGITS, "--input-range", "0", "inf"], "0 inf are not two finite numbers"),
        (["report", DIGITS, "--input-range", "nan", "1"], "not two finite numbers"),
        (["report", DIGITS, "--input-range", "1", "1"], "not two finite numbers"),
        (["report", DIGITS, "--calibration", "nets"], "'nets' is no name like package.module"),
        (["report", DIGITS, "--calibration", ":data"], "':data' is no name like package.module"),
        (["convert", DIGITS, "-o", "n.pt2", "--tolerance", "nan"], "not a number, 0 or above"),
        (["fuzz", "--time", "-1"], "not a number, 0 or above"),
        (["report", DIGITS, "--activation", "magic"], "unknown: 'magic'"),
        (["report", DIGITS, "--activation", "gelu"], "choose from auto, relu, identity"),
        (["report", DIGITS, "--activation", "random"], "unknown: 'random'"),
        (["report", DIGITS, "--activation", "relu,auto"], "'auto' stands alone"),
        (["fuzz", "--activation", "gelu"], "choose from auto, random, relu"),
        (["fuzz", "--activation", "random,relu"], "'random' stands alone"),
        (["bench"], "required: MODEL"),
        (["bench", DIGITS, "--runtimes", "eager,abacus"], "unknown: 'abacus'"),
        (["bench", DIGITS, "--batch", "1,0"], "is not a list of sizes like 1,8"),
        (["bench", DIGITS, "--threads", "1,2"], "is not a whole number above 0"),
        (["bench", DIGITS, "--threads", "100000"], "100000 threads are more than"),
        (["bench", DIGITS, "-o", "times.csv"], "must end in .json"),
        (["bench", DIGITS, "--plot", "times.gif"], "must end in .svg or .png"),
        (["bench", DIGITS], "give --input-shape"),
    ],
)
def test_wrong_usage_exits_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, *arguments, code=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nothing:net"], "no module 'nothing'"),
        (["report", "resnet18"], "names no model"),
        (["report", "absent.pt2"], "there is no file"),
        (["report", DIGITS, "--weights", "absent.safetensors"], "cannot be read"),
        (["report", DIGITS, SHAPE, SHAPE], "inputs are (x), and 2 shapes were given"),
        (["report", DIGITS, "--input-shape", "1,3,28,28"], "fails on inputs of shape (1, 3, 28,"),
        (
            ["report", "nets:TwoInputs", "--input-shape", "2,3"],
            "inputs are (a, b), and 1 shape was",
        ),
        (["report", "nets:not_finite", SHAPE], "conv"),
        (["report", "nets:Chain", "--input-shape", "1,1,999999,999999"], "not enough memory"),
        (["report", "nets:leaves", SHAPE], "raised SystemExit: no licence, at "),
        (["report", DIGITS, SHAPE, "--calibration", "nets:leaves"], "raised SystemExit: no li"),
        (["report", DIGITS, SHAPE, "--calibration", "nothing:data"], "no module 'nothing'"),
        (["report", DIGITS, SHAPE, "--calibration", "nets:DIGITS"], "is a str, not a function"),
        (["bench", "nothing:net", SHAPE], "no module 'nothing'"),
        (["bench", DIGITS, SHAPE, "-o", "no/folder/out.json"], "cannot be written: No such file"),
        (["convert", DIGITS, SHAPE, "-o", "no/folder/out.pt2"], "cannot be written: No such file"),
        (["convert", DIGITS, SHAPE, "-o", "/proc/out.pt2"], "/proc/out.pt2 cannot be written"),
        (
            ["convert", DIGITS, SHAPE, "-o", "o.pt2", "--tolerance", "1e-30"],
            "the written file differs",
        ),
    ],
)
def test_what_cannot_be_done_exits_with_1_and_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, *arguments)
    assert os.listdir(tmp_path) == []


def test_a_program_says_for_which_inputs_it_was_exported(
    capsys: pytest.CaptureFixture[str],
) -> None:
    image = torch.zeros(2, 1, 28, 28)
    for free, given, told in (
        ({}, "3,1,28,28", "(2, 1, 28, 28)"),
        ({0: torch.export.Dim.AUTO}, "3,2,28,28", "(any, 1, 28, 28)"),
    ):
        program = torch.export.export(rmfx.demo.load_model(), (image,), dynamic_shapes=(free,))
        torch.export.save(program, "net.pt2")
        for command in (["report"], ["convert", "-o", "out.pt2"]):
            message = fails(capsys, *command, "net.pt2", "--input-shape", given)
            assert f"the program was exported for inputs {told}; --input-shape must fit" in message


def test_a_corrupt_weights_file_is_named(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights.write_bytes(weights.read_bytes()[:5000])
    message = fails(capsys, "convert", DIGITS, SHAPE, "--weights", str(weights), "-o", "o.pt2")
    assert "trained.safetensors is damaged" in message
    assert os.listdir() == ["trained.safetensors"]


def test_weights_of_another_network_are_refused(
    weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = fails(capsys, "report", "nets:Chain", "--weights", str(weights))
    assert "does not fit the model" in message


def test_an_unwritable_place_is_found_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = fails(capsys, "convert", "nothing:net", "-o", "no/folder/out.pt2")
    assert "cannot be written" in message


def test_prints_of_the_model_stay_out_of_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "nets:Talkative", SHAPE, "--json"]) == 0
    output = capsys.readouterr()
    json.loads(output.out)
    assert "hello from the model" in output.err


def test_traceback_shows_where_an_error_arose() -> None:
    with pytest.raises(rmfx.RmfxError):
        main(["report", "nothing:net", "--traceback"])


def test_wrong_usage_shows_how_its_command_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["report", DIGITS, "--rounds=1"], ["convert", DIGITS, "-o", "n.pt2"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert f"usage: rmfx {arguments[0]} [-h]" in capsys.readouterr().err


def test_an_interruption_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(path: Path, data: object) -> None:
        with path.open("wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupt)
    message = fails(capsys, "convert", DIGITS, SHAPE, "-o", "out.pt2", code=130)
    assert message == "rmfx: interrupted"
    assert os.listdir(tmp_path) == []


# ---- as a process of its own --------------------------------------------------------------------


def test_version_and_module_form() -> None:
    command = [sys.executable, "-m", "rmfx", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"rmfx {importlib.metadata.version('rmfx')}\n"


def test_models_are_listed_as_other_commands_take_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    names = json.loads(capsys.readouterr().out)
    assert {"rmfx.models:rmnext50x6_32", DIGITS} <= names.keys()
    assert "rmfx.models:CifarResNet" not in names  # which needs arguments
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    assert "CIFAR ResNet of `depth` layers" in text
    assert "N, H and W are free, such as --input-shape 1,3,64,64." in text
    assert main(["report", "rmfx.models:cifar_resnet", "--input-shape", "1,3,32,32"]) == 0
    assert "9 of 9 residual connections removed" in capsys.readouterr().out


def test_the_doctor_lists_what_is_there_and_converts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run_json(capsys, "doctor")
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert found["versions"].keys() == {"rmfx", "torch", "Python"}
    assert found["system"].startswith(platform.system())
    assert found["failure"] == ""
    extras = {extra["name"]: extra for extra in found["extras"]}
    assert {"onnx", "html"} <= extras.keys()
    assert not extras.keys() & {"dev", "docs"}
    for extra in extras.values():
        for package, version in extra["versions"].items():
            assert importlib.metadata.version(package) == version
    monkeypatch.setattr(rmfx.cli.doctor, "remove_residuals", lambda model, _: model)
    assert main(["doctor"]) == 1
    output = capsys.readouterr()
    assert "it still has residual connections" in output.out
    assert output.err.startswith("rmfx: the self-test failed: ")


def test_an_extra_lists_what_it_includes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is there already, and where extras include extras."""
    needed = [
        "tabulate>=0.9",
        'pytest>=8; extra == "onnx"',
        "no-such-package; extra == 'spiking'",
        'rmfx[onnx,spiking]; extra == "int8"',
        'numpy; extra == "bench"',
        'rmfx[int8]; extra == "bench"',
        'rmfx[bench]; extra == "dev"',
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needed)
    extras = {extra.name: extra for extra in rmfx.cli.doctor._extras()}
    assert list(extras) == ["onnx", "spiking", "int8", "bench"]
    assert extras["bench"].versions.keys() == {"numpy", "pytest"}
    assert extras["bench"].missing == extras["int8"].missing == ("no-such-package",)


@pytest.mark.parametrize("command", ["demo", "models", "doctor", "report", "fuzz"])
def test_every_command_describes_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    first = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([command, "--help"])
    usage, sentence, *_ = capsys.readouterr().out.split("\n\n")
    assert usage.startswith(f"usage: rmfx {command} ")
    told = " ".join(sentence.split())
    assert told.endswith(".")
    assert told[1:-1] in " ".join(first.split())


def test_help_names_every_kind_of_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["convert", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("torchvision:", "timm:", "module:factory", ".pt2"))


def test_help_says_what_is_safe_to_open(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["report", "--help"], ["convert", "--help"]):
        with pytest.raises(SystemExit):
            main(arguments)
        text = capsys.readouterr().out
        assert ".pt2" in text
        assert "code that runs" in " ".join(text.split())


FULL_DISK = """
import resource, sys
from rmfx.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, 2 * (int(sys.argv[1]),))
sys.exit(main(["convert", "rmfx.models:DigitsNet", "--input-shape=1,1,28,28", "-o", "o.pt2"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [1000, 300_000])
def test_a_full_disk_is_one_line(size: int, tmp_path: Path) -> None:
    """In a process of its own: torch's writer would end it."""
    command = [sys.executable, "-c", FULL_DISK, str(size)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "rmfx: o.pt2 cannot be written: File too large\n"
    assert os.listdir(tmp_path) == []


SLOW_WRITER = """
import signal, sys, time
from pathlib import Path
from rmfx.cli import main

def write_slowly(path, data):
    with path.open("wb") as file:
        file.write(b"half")
    Path("writing").touch()
    time.sleep(60)

Path.write_bytes = write_slowly
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
sys.exit(main(["convert", "rmfx.models:DigitsNet", "--input-shape=1,1,28,28", "-o", "o.pt2"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_killed_process_leaves_nothing(number: int, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW_WRITER)
    command = [sys.executable, "slow.py"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE)
    try:
        while not (tmp_path / "writing").exists():
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=30) == 130
    finally:
        process.kill()
        process.communicate()
    assert sorted(os.listdir(tmp_path)) == ["slow.py", "writing"]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX pipe")
def test_a_reader_that_leaves_causes_no_traceback(tmp_path: Path) -> None:
    command = f"{sys.executable} -m rmfx report {DIGITS} {SHAPE} | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
